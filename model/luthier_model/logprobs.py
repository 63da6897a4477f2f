"""Log-probabilities of given tokens, without ever holding the logits of all positions.

Dimensions: T packed tokens, D hidden size, K targets per position, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier_model.base import BaseModel
from luthier_model.lora import Segment


def token_logprobs(
    model: BaseModel,
    hidden_TD: Tensor,
    targets_T: Tensor,
    segments: Sequence[Segment],
    *,
    chunk_tokens: int,
) -> Tensor:
    """Log-probability in nats of each target under the model at temperature 1.

    int64 targets [T] or [T, K] -> the same shape in the model's compute_dtype. Logits of at most
    `chunk_tokens` rows exist at once; with gradients on and several chunks, backward computes each
    chunk again.
    """
    targets_TK = targets_T if targets_T.dim() == 2 else targets_T[:, None]
    if len(hidden_TD) <= chunk_tokens:
        return target_logprobs(model, hidden_TD, targets_TK, segments).view_as(targets_T)
    starts = range(0, len(hidden_TD), chunk_tokens)
    hidden_chunks = torch.split(hidden_TD, chunk_tokens)
    target_chunks = torch.split(targets_TK, chunk_tokens)
    chunks = []
    for start, hidden, targets in zip(starts, hidden_chunks, target_chunks, strict=True):
        rows = clipped(segments, start, start + len(hidden))
        chunk = checkpoint(target_logprobs, model, hidden, targets, rows, use_reentrant=False)
        assert isinstance(chunk, Tensor)
        chunks.append(chunk)
    return torch.cat(chunks).view_as(targets_T)


def target_logprobs(
    model: BaseModel, hidden_TD: Tensor, targets_TK: Tensor, segments: Sequence[Segment]
) -> Tensor:
    """As token_logprobs, for [T, K], with the logits of all rows at once."""
    logits_TV = model.logits(hidden_TD, segments)
    return logits_TV.log_softmax(dim=-1).gather(1, targets_TK)


def clipped(segments: Sequence[Segment], start: int, stop: int) -> list[Segment]:
    """The parts of the segments inside rows [start, stop), counted from `start`."""
    return [
        Segment(max(s.start, start) - start, min(s.stop, stop) - start, s.adapter)
        for s in segments
        if s.start < stop and s.stop > start
    ]
