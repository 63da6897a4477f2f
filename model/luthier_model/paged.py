"""Attention over a paged KV cache: the sampler's AttentionContext.

The cache is cut into blocks of block_tokens slots, one slot per token; a sequence owns the blocks
of its block table, in order. One block after the last is nobody's and stays zero: padding reads it,
because a masked key still poisons the sum if it holds another tenant's NaN (0 * NaN).

What a token attends to decides its result to the last bit, and not what else is in the step: keys
are padded to a multiple of KEY_MULTIPLE and query rows of ROW_MULTIPLE, so that every product runs
through the same code whatever the batch (measured on CPU, float32; docs/sampler.md).

Dimensions: T packed query tokens, H query heads, K key/value heads, G = H / K, Dh features per
head, B sequences, Q query tokens and L keys of the longest of them, S cache slots.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from luthier_model.attention import capped_attention
from luthier_model.base import ModelFacts
from luthier_model.products import ROW_MULTIPLE, round_up

KEY_MULTIPLE = 16
"""A register's floats: a masked key in a lane of its own adds an exact zero."""


@dataclass(frozen=True, slots=True)
class Span:
    """The packed tokens of one sequence: the last num_queries of its num_keys tokens."""

    num_queries: int
    num_keys: int
    block_table: Sequence[int]


class KvCache:
    """Keys and values, [layers, num_blocks + 1, block_tokens, K, Dh]; the last block is padding."""

    def __init__(
        self,
        facts: ModelFacts,
        *,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        block = (block_tokens, facts.num_kv_heads, facts.head_dim)
        shape = (facts.num_layers, num_blocks + 1, *block)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def pad_block(self) -> int:
        return self.num_blocks

    def slots(self, block_table: Sequence[int], start: int, stop: int) -> NDArray[np.int64]:
        """Slots of a sequence's tokens [start, stop)."""
        first = start // self.block_tokens
        table = np.asarray(block_table[first : -(-stop // self.block_tokens)], dtype=np.int64)
        tokens = np.arange(start, stop)
        blocks = table[tokens // self.block_tokens - first]
        return blocks * self.block_tokens + tokens % self.block_tokens

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Make each target block hold what its source holds, in every layer."""
        for cached in (self.keys, self.values):
            cached[:, list(targets)] = cached[:, list(sources)]


def block_bytes(facts: ModelFacts, block_tokens: int, dtype: torch.dtype) -> int:
    """Memory of one block: keys and values of every layer."""
    floats_per_token = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim
    return floats_per_token * dtype.itemsize * block_tokens


class PagedAttention:
    """Writes the packed tokens' keys and values into the cache, then attends through block tables.

    `spans` lie end to end from the first packed token; tokens after them are padding and attend to
    nothing. Every token's key is written before any is read, so a span may hold several new tokens.
    """

    def __init__(self, cache: KvCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        device = cache.keys.device
        self._new_slots = torch.from_numpy(_new_slots(cache, spans)).to(device)
        # What a block held before is still behind its new tokens, and may be another tenant's NaN.
        self._begun_blocks = torch.tensor(_begun_blocks(cache, spans), device=device)
        self._groups = [_Group(cache, group) for group in _of_like_shape(cache, spans)]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """query [H, T, Dh], key and value [K, T, Dh], rotated -> [T, H, Dh]."""
        cached = self._cache.keys[layer], self._cache.values[layer]
        num_new = len(self._new_slots)
        for blocks, new in zip(cached, (key, value), strict=True):
            if len(self._begun_blocks):
                blocks.index_fill_(0, self._begun_blocks, 0)
            slots_SKD = blocks.view(-1, *blocks.shape[2:])
            slots_SKD.index_copy_(0, self._new_slots, new[:, :num_new].transpose(0, 1))
        query_THD = query.transpose(0, 1)
        out_THD = torch.zeros_like(query_THD, memory_format=torch.contiguous_format)
        for group in self._groups:
            group.attend(out_THD, query_THD, *cached, scale, window, softcap)
        return out_THD


class _Group:
    """Sequences that run as one padded batch."""

    def __init__(self, cache: KvCache, spans: Sequence[tuple[int, Span]]) -> None:
        """Spans with the packed position of their first token."""
        device = cache.keys.device
        num_queries = np.array([span.num_queries for _, span in spans])
        num_keys = np.array([span.num_keys for _, span in spans])
        multiple = KEY_MULTIPLE // math.gcd(KEY_MULTIPLE, cache.block_tokens)
        num_blocks = round_up(-(-int(num_keys.max()) // cache.block_tokens), multiple)
        table = np.full((len(spans), num_blocks), cache.pad_block)
        for row, (_, span) in zip(table, spans, strict=True):
            used = span.block_table[:num_blocks]
            row[: len(used)] = used
        self._decodes = int(num_queries.max()) == 1
        width = 1 if self._decodes else round_up(int(num_queries.max()), ROW_MULTIPLE)
        first = np.array([start for start, _ in spans])
        offset_Q = np.arange(width)
        real_BQ = offset_Q < num_queries[:, None]
        # A padding query repeats the sequence's first token: any token will do, it is dropped.
        tokens_BQ = first[:, None] + np.where(real_BQ, offset_Q, 0)
        position_BQ = (num_keys - num_queries)[:, None] + np.where(real_BQ, offset_Q, 0)
        self._shape = tokens_BQ.shape
        self._table = torch.from_numpy(table.reshape(-1)).to(device)
        self._tokens = torch.from_numpy(tokens_BQ.reshape(-1)).to(device)
        self._real = None if real_BQ.all() else torch.from_numpy(real_BQ.reshape(-1)).to(device)
        self._position_BQ = torch.from_numpy(position_BQ).to(device)
        self._num_keys = num_blocks * cache.block_tokens
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self,
        out_THD: Tensor,
        query_THD: Tensor,
        key_blocks: Tensor,
        value_blocks: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        """Fills in the rows of `out` that belong to its sequences."""
        num_rows, width = self._shape
        num_kv_heads, head_dim = key_blocks.shape[2:]
        shape = (num_rows, self._num_keys, num_kv_heads, head_dim)
        keys_BKLD = key_blocks.index_select(0, self._table).view(shape).transpose(1, 2)
        values_BKLD = value_blocks.index_select(0, self._table).view(shape).transpose(1, 2)
        query_NHD = query_THD.index_select(0, self._tokens)
        if self._decodes:
            # The G query heads of one key head stand where SDPA expects queries: K is read once.
            query = query_NHD.view(num_rows, num_kv_heads, -1, head_dim)
            group = query.shape[2]
            query = F.pad(query, (0, 0, 0, round_up(group, ROW_MULTIPLE) - group))
        else:
            query, group = query_NHD.view(num_rows, width, -1, head_dim).transpose(1, 2), None
        mask = self._mask(window, query.dtype)
        if softcap is None:
            out = F.scaled_dot_product_attention(
                query,
                keys_BKLD,
                values_BKLD,
                attn_mask=mask,
                scale=scale,
                enable_gqa=query.shape[1] != num_kv_heads,
            )
        else:
            out = capped_attention(
                query, keys_BKLD, values_BKLD, mask == 0, scale=scale, softcap=softcap
            )
        out = out[:, :, :group] if self._decodes else out.transpose(1, 2)
        out_NHD = out.reshape(num_rows * width, -1, head_dim)
        tokens = self._tokens
        if self._real is not None:
            out_NHD, tokens = out_NHD[self._real], tokens[self._real]
        out_THD.index_copy_(0, tokens, out_NHD)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, Q, L]: 0 where a key may be seen, else -inf."""
        if window not in self._masks:
            key_L = torch.arange(self._num_keys, device=self._table.device)
            seen_NL = seen_keys(self._position_BQ.reshape(-1), key_L, window)
            mask_NL = torch.zeros(seen_NL.shape, dtype=dtype, device=key_L.device)
            mask_NL.masked_fill_(~seen_NL, -torch.inf)
            self._masks[window] = mask_NL.view(*self._shape, -1)[:, None]
        return self._masks[window]


def seen_keys(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """bool[queries, keys]: a token sees itself and what is before it, at most `window` in all."""
    distance = query_position[:, None] - key_position[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _of_like_shape(cache: KvCache, spans: Sequence[Span]) -> Iterable[list[tuple[int, Span]]]:
    """The spans with their first tokens, in groups whose padding at most doubles either side."""

    def shape(span: tuple[int, Span]) -> tuple[int, int]:
        num_blocks = -(-span[1].num_keys // cache.block_tokens)
        return (span[1].num_queries - 1).bit_length(), (num_blocks - 1).bit_length()

    starts = np.cumsum([0, *(span.num_queries for span in spans[:-1])]).tolist()
    ordered = sorted(zip(starts, spans, strict=True), key=shape)
    return [list(group) for _, group in groupby(ordered, key=shape)]


def _new_slots(cache: KvCache, spans: Sequence[Span]) -> NDArray[np.int64]:
    """Slots of the packed tokens, int64[T]."""
    return np.concatenate(
        [cache.slots(s.block_table, s.num_keys - s.num_queries, s.num_keys) for s in spans]
    )


def _begun_blocks(cache: KvCache, spans: Sequence[Span]) -> list[int]:
    """Blocks that these spans are the first to write to, and do not fill."""
    begun = []
    for span in spans:
        index, used = divmod(span.num_keys, cache.block_tokens)
        if 0 < used <= span.num_queries:
            begun.append(span.block_table[index])
    return begun


class PagedAttentionLoop:
    """Reference for PagedAttention: one sequence at a time, softmax written out."""

    def __init__(self, cache: KvCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        self._spans = spans

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """query [H, T, Dh], key and value [K, T, Dh], rotated -> [T, H, Dh]."""
        group = query.shape[0] // key.shape[0]
        keys_SKD = self._cache.keys[layer].view(-1, *key.shape[::2])
        values_SKD = self._cache.values[layer].view(-1, *key.shape[::2])
        outs, start = [], 0
        for span in self._spans:
            rows = slice(start, start + span.num_queries)
            slots = torch.from_numpy(self._cache.slots(span.block_table, 0, span.num_keys))
            new_slots = slots[-span.num_queries :]
            keys_SKD[new_slots] = key[:, rows].transpose(0, 1)
            values_SKD[new_slots] = value[:, rows].transpose(0, 1)
            keys_HLD = keys_SKD[slots].transpose(0, 1).repeat_interleave(group, 0)
            values_HLD = values_SKD[slots].transpose(0, 1).repeat_interleave(group, 0)
            scores_HQL = scale * query[:, rows] @ keys_HLD.transpose(1, 2)
            if softcap is not None:
                scores_HQL = softcap * (scores_HQL / softcap).tanh()
            position_L = torch.arange(span.num_keys)
            seen = seen_keys(position_L[-span.num_queries :], position_L, window)
            weights = scores_HQL.masked_fill(~seen, -torch.inf).softmax(-1)
            outs.append((weights @ values_HLD).transpose(0, 1))
            start += span.num_queries
        return torch.cat(outs)
