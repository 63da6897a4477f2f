"""Attention over a paged KV cache: the sampler's AttentionContext.

The cache is cut into blocks of block_tokens slots, one slot per token; a sequence owns the blocks
of its block table, in order. One slot after the last block is nobody's and stays zero: padding
reads it, because a masked key still poisons the sum if it holds another tenant's NaN (0 * NaN).

Dimensions: T packed query tokens, H query heads, K key/value heads, G = H / K, Dh features per
head, B sequences with one query token, L keys, S cache slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from luthier_model.attention import capped_attention
from luthier_model.base import ModelFacts


@dataclass(frozen=True, slots=True)
class Span:
    """The packed tokens of one sequence: the last num_queries of its num_keys tokens."""

    num_queries: int
    num_keys: int
    block_table: Sequence[int]


class KvCache:
    """Keys and values of every layer, [S + 1, K, Dh] each; the last slot is padding."""

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
        shape = (facts.num_layers, self.pad_slot + 1, facts.num_kv_heads, facts.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def pad_slot(self) -> int:
        return self.num_blocks * self.block_tokens

    def slots(self, block_table: Sequence[int], start: int, stop: int) -> NDArray[np.int64]:
        """Slots of a sequence's tokens [start, stop)."""
        tokens = np.arange(start, stop)
        table = np.asarray(block_table, dtype=np.int64)
        return table[tokens // self.block_tokens] * self.block_tokens + tokens % self.block_tokens


def block_bytes(facts: ModelFacts, block_tokens: int, dtype: torch.dtype) -> int:
    """Memory of one block: keys and values of every layer."""
    floats_per_token = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim
    return floats_per_token * dtype.itemsize * block_tokens


class PagedAttention:
    """Writes the packed tokens' keys and values into the cache, then attends through block tables.

    `spans` follow the packed tokens; those with one query come first and run as one padded batch.
    Every token's key is written before any is read, so a span may hold several new tokens.
    """

    def __init__(self, cache: KvCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        device = cache.keys.device
        self._new_slots_T = torch.from_numpy(_new_slots(cache, spans)).to(device)
        num_single = sum(span.num_queries == 1 for span in spans)
        assert all(span.num_queries == 1 for span in spans[:num_single])
        self._single = _SingleQueries(cache, spans[:num_single]) if num_single else None
        self._chunks: list[_Chunk] = []
        start = num_single
        for span in spans[num_single:]:
            self._chunks.append(_Chunk(cache, span, start))
            start += span.num_queries

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
        keys_SKD, values_SKD = self._cache.keys[layer], self._cache.values[layer]
        keys_SKD.index_copy_(0, self._new_slots_T, key.transpose(0, 1))
        values_SKD.index_copy_(0, self._new_slots_T, value.transpose(0, 1))
        parts = []
        if self._single is not None:
            parts.append(self._single.attend(query, keys_SKD, values_SKD, scale, window, softcap))
        for chunk in self._chunks:
            parts.append(chunk.attend(query, keys_SKD, values_SKD, scale, window, softcap))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _SingleQueries:
    """Rows [0, B): one query each, over B contexts padded to the longest."""

    def __init__(self, cache: KvCache, spans: Sequence[Span]) -> None:
        device = cache.keys.device
        num_keys_B = np.array([span.num_keys for span in spans])
        slots_BL = np.full((len(spans), num_keys_B.max()), cache.pad_slot)
        for row, span in zip(slots_BL, spans, strict=True):
            row[: span.num_keys] = cache.slots(span.block_table, 0, span.num_keys)
        self._shape = slots_BL.shape
        self._slots = torch.from_numpy(slots_BL.reshape(-1)).to(device)
        self._num_keys_B = torch.from_numpy(num_keys_B).to(device)
        self._padded = bool((num_keys_B != num_keys_B.max()).any())
        self._masks: dict[int | None, Tensor | None] = {}

    def attend(
        self,
        query: Tensor,
        keys_SKD: Tensor,
        values_SKD: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        num_rows, num_keys = self._shape
        num_kv_heads, head_dim = keys_SKD.shape[1:]
        shape = (num_rows, num_keys, num_kv_heads, head_dim)
        keys = keys_SKD.index_select(0, self._slots).view(shape).transpose(1, 2)
        values = values_SKD.index_select(0, self._slots).view(shape).transpose(1, 2)
        # The G query heads of one key head stand where SDPA expects queries: K is not repeated.
        query_BKGD = query[:, :num_rows].transpose(0, 1)
        query_BKGD = query_BKGD.reshape(num_rows, num_kv_heads, -1, head_dim)
        mask = self._mask(window)
        if softcap is None:
            out = F.scaled_dot_product_attention(
                query_BKGD, keys, values, attn_mask=mask, scale=scale
            )
        else:
            out = capped_attention(query_BKGD, keys, values, mask, scale=scale, softcap=softcap)
        return out.reshape(num_rows, -1, head_dim)

    def _mask(self, window: int | None) -> Tensor | None:
        """bool[B, 1, 1, L], True where a key may be seen; None where all may."""
        if window not in self._masks:
            num_keys = self._shape[1]
            key_L = torch.arange(num_keys, device=self._slots.device)
            last_B1 = self._num_keys_B[:, None] - 1
            seen = key_L <= last_B1
            if window is not None:
                seen &= key_L > last_B1 - window
            everything = not self._padded and (window is None or num_keys <= window)
            self._masks[window] = None if everything else seen[:, None, None, :]
        return self._masks[window]


class _Chunk:
    """Rows [start, start + num_queries): consecutive tokens of one sequence."""

    def __init__(self, cache: KvCache, span: Span, start: int) -> None:
        self._rows = slice(start, start + span.num_queries)
        slots = cache.slots(span.block_table, 0, span.num_keys)
        self._slots_L = torch.from_numpy(slots).to(cache.keys.device)
        self._num_before = span.num_keys - span.num_queries
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self,
        query: Tensor,
        keys_SKD: Tensor,
        values_SKD: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        if softcap is not None:
            capped = capped_attention(
                query[:, self._rows],
                keys_SKD.index_select(0, self._slots_L).transpose(0, 1),
                values_SKD.index_select(0, self._slots_L).transpose(0, 1),
                self._mask(window),
                scale=scale,
                softcap=softcap,
            )
            return capped.transpose(0, 1)
        causal = self._num_before == 0 and (window is None or len(self._slots_L) <= window)
        out = F.scaled_dot_product_attention(
            query[None, :, self._rows],
            keys_SKD.index_select(0, self._slots_L).transpose(0, 1)[None],
            values_SKD.index_select(0, self._slots_L).transpose(0, 1)[None],
            attn_mask=None if causal else self._mask(window),
            is_causal=causal,
            scale=scale,
            enable_gqa=query.shape[0] != keys_SKD.shape[1],
        )
        return out[0].transpose(0, 1)

    def _mask(self, window: int | None) -> Tensor:
        """bool[num_queries, L], True where a query row may see a key column."""
        if window not in self._masks:
            key_L = torch.arange(len(self._slots_L), device=self._slots_L.device)
            self._masks[window] = seen_keys(key_L[self._num_before :], key_L, window)
        return self._masks[window]


def seen_keys(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """bool[queries, keys]: a token sees itself and what is before it, at most `window` in all."""
    distance = query_position[:, None] - key_position[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _new_slots(cache: KvCache, spans: Sequence[Span]) -> NDArray[np.int64]:
    """Slots of the packed tokens, int64[T]."""
    return np.concatenate(
        [cache.slots(s.block_table, s.num_keys - s.num_queries, s.num_keys) for s in spans]
    )


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
        outs, start = [], 0
        for span in self._spans:
            rows = slice(start, start + span.num_queries)
            slots = torch.from_numpy(self._cache.slots(span.block_table, 0, span.num_keys))
            new_slots = slots[-span.num_queries :]
            self._cache.keys[layer, new_slots] = key[:, rows].transpose(0, 1)
            self._cache.values[layer, new_slots] = value[:, rows].transpose(0, 1)
            keys_HLD = self._cache.keys[layer, slots].transpose(0, 1).repeat_interleave(group, 0)
            values_HLD = self._cache.values[layer, slots].transpose(0, 1)
            scores_HQL = scale * query[:, rows] @ keys_HLD.transpose(1, 2)
            if softcap is not None:
                scores_HQL = softcap * (scores_HQL / softcap).tanh()
            position_L = torch.arange(span.num_keys)
            seen = seen_keys(position_L[-span.num_queries :], position_L, window)
            weights = scores_HQL.masked_fill(~seen, -torch.inf).softmax(-1)
            outs.append((weights @ values_HLD.repeat_interleave(group, 0)).transpose(0, 1))
            start += span.num_queries
        return torch.cat(outs)
