"""Runner: the tensors of one step, and the model call.

Dimensions: T packed tokens of the step, D hidden size, B chunks that sample, V vocabulary.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from luthier_model.base import BaseModel
from luthier_model.lora import Segment
from luthier_model.paged import KvCache, PagedAttention, Span
from luthier_model.products import ROW_MULTIPLE, round_up
from luthier_sampler.sequence import Chunk

SCORE_CHUNK_TOKENS = 128
"""Prompt positions whose logits exist at once."""
SIZES_PER_DOUBLING = 8
"""Numbers of rows that steps have, between one power of two and the next: oneDNN keeps 0.6 MB of
compiled products for each of them and each shape of a layer, for up to 1,024 pairs (measured)."""


class Runner:
    """The model over the KV cache. Holds no state of a request but what its blocks hold."""

    def __init__(self, model: BaseModel, cache: KvCache) -> None:
        self.model = model
        self.cache = cache

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits float32[B, V] of the last rows of the chunks that sample, in their order.

        Chunks of one token come first. Fills in prompt logprobs where a request wants them.
        """
        hidden_TD = self._hidden(chunks)
        stops = np.cumsum([chunk.num_tokens for chunk in chunks]).tolist()
        for chunk, stop in zip(chunks, stops, strict=True):
            if chunk.sequence.computes_scores:
                self._score_prompt(chunk, hidden_TD[stop - chunk.num_tokens : stop])
        sampling = [
            (chunk, stop - 1) for chunk, stop in zip(chunks, stops, strict=True) if chunk.samples
        ]
        rows = [row for _, row in sampling]
        segments = _segments((chunk, 1) for chunk, _ in sampling)
        return self._logits(hidden_TD[self._tensor(rows)], segments)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """(source, target) pairs of KV-cache blocks."""
        if copies:
            sources, targets = zip(*copies, strict=True)
            self.cache.copy_blocks(sources, targets)

    def _hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        tokens: list[int] = []
        positions: list[int] = []
        for chunk in chunks:
            tokens += chunk.sequence.tokens[chunk.start : chunk.stop]
            positions += range(chunk.start, chunk.stop)
        spans = [Span(c.num_tokens, c.stop, c.sequence.block_table) for c in chunks]
        num_rows = padded_rows(len(tokens))
        padding = [0] * (num_rows - len(tokens))
        return self.model.hidden(
            self._tensor(tokens + padding),
            self._tensor(positions + padding),
            PagedAttention(self.cache, spans),
            _padded(_segments((chunk, chunk.num_tokens) for chunk in chunks), num_rows),
        )

    def _logits(self, hidden_MD: Tensor, segments: list[Segment]) -> Tensor:
        if not segments:
            return hidden_MD.new_empty(0, self.model.facts.vocab_size, dtype=torch.float32)
        num_rows = padded_rows(len(hidden_MD))
        padded_MD = F.pad(hidden_MD, (0, 0, 0, num_rows - len(hidden_MD)))
        return self.model.logits(padded_MD, _padded(segments, num_rows))[: len(hidden_MD)]

    def _score_prompt(self, chunk: Chunk, hidden_TD: Tensor) -> None:
        """What the request wants to know of the positions that the chunk's rows predict."""
        request = chunk.sequence.request
        if request.scores.first is None:
            return
        first = max(chunk.start + 1, request.scores.first)
        stop = min(chunk.stop + 1, len(request.prompt))
        for start in range(first, stop, SCORE_CHUNK_TOKENS):
            num_rows = min(SCORE_CHUNK_TOKENS, stop - start)
            rows_TD = hidden_TD[start - 1 - chunk.start :][:num_rows]
            logits_TV = self._logits(rows_TD, [Segment(0, num_rows, request.adapter)])
            request.scores.put(start, logits_TV, request.prompt)

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.model.device)


def padded_rows(num_rows: int) -> int:
    """From 1 on: the next of the numbers of rows that steps have, all multiples of ROW_MULTIPLE."""
    doubling = 1 << (num_rows - 1).bit_length()
    return round_up(num_rows, max(ROW_MULTIPLE, doubling // (2 * SIZES_PER_DOUBLING)))


def _padded(segments: list[Segment], num_rows: int) -> list[Segment]:
    """The segments of that many rows: those that ROW_MULTIPLE asks for belong to the last one."""
    last = segments[-1]
    stop = round_up(last.stop, ROW_MULTIPLE)
    padded = [*segments[:-1], Segment(last.start, stop, last.adapter)]
    return padded if stop == num_rows else [*padded, Segment(stop, num_rows, None)]


def _segments(rows: Iterable[tuple[Chunk, int]]) -> list[Segment]:
    """Runs of rows with one adapter, from (chunk, number of its rows)."""
    segments: list[Segment] = []
    start, before = 0, None
    for chunk, num_rows in rows:
        adapter = chunk.sequence.request.adapter
        if segments and adapter is before:
            segments[-1] = Segment(segments[-1].start, start + num_rows, adapter)
        else:
            segments.append(Segment(start, start + num_rows, adapter))
        start, before = start + num_rows, adapter
    return segments
