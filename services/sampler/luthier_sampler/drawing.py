"""Choosing tokens from rows of logits, all rows at once and each by its own numbers only.

Dimensions: B rows, V vocabulary, C = V / SPAN parts of a row, N draws per row, R rows of those that
are truncated, K candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SPAN = 128
"""Neighbouring tokens that are looked at as one first; a row of V is gone through once, not sorted
and not cumulated."""
NUM_CANDIDATES = 256
"""Most likely tokens among which top_p is looked for before the whole row is sorted."""


def argmax(scores_BV: Tensor) -> Tensor:
    """The highest-scored token of each row, int64[B]; the lowest id among equals."""
    # torch's own argmax goes through a row one number at a time on a CPU.
    parts_BCS = _parts(scores_BV, -torch.inf)
    part_B1 = parts_BCS.amax(-1).argmax(-1, keepdim=True)
    within_B = _pick(parts_BCS, part_B1)[:, 0].argmax(-1)
    return part_B1[:, 0] * SPAN + within_B


def draw(logprobs_BV: Tensor, uniforms_BN: Tensor) -> Tensor:
    """The tokens at which each row's cumulated probability passes its uniform numbers, int64[B, N].

    Logprobs need not be normalised; float64 uniforms[B, N] in [0, 1).
    """
    parts_BCS = _parts(logprobs_BV.exp(), 0.0)
    cumulated_BC = parts_BCS.sum(-1).double().cumsum(-1)
    targets_BN = uniforms_BN * cumulated_BC[:, -1:]
    # right: never a part or token of probability 0, where the cumulated probability stands still.
    part_BN = torch.searchsorted(cumulated_BC, targets_BN, right=True)
    part_BN = part_BN.clamp_(max=cumulated_BC.shape[1] - 1)
    before_BN = F.pad(cumulated_BC, (1, 0)).gather(1, part_BN)
    within_BNS = _pick(parts_BCS, part_BN).double().cumsum(-1)
    # The part's sum was rounded to float32, so what is left may be a little more than it holds.
    most_BN = torch.nextafter(within_BNS[..., -1], torch.zeros_like(targets_BN))
    left_BN = torch.minimum(targets_BN - before_BN, most_BN)
    token_BN1 = torch.searchsorted(within_BNS, left_BN[..., None], right=True)
    return (part_BN * SPAN + token_BN1[..., 0]).clamp_(max=logprobs_BV.shape[1] - 1)


def truncate(logprobs_BV: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """The logprobs with -inf for tokens outside top_k, then outside top_p of the rest.

    top_p keeps the most likely tokens until they hold top_p of the probability, at least one. Of
    equally likely tokens the lower ids come first. Rows with top_k of at most 0 and top_p of 1 stay
    as they are. Twin of truncate_by_sort, which takes over the rows that a few candidates do not
    settle.
    """
    vocab_size = logprobs_BV.shape[1]
    rows = [row for row, (k, p) in enumerate(zip(top_k, top_p, strict=True)) if k > 0 or p < 1]
    if not rows:
        return logprobs_BV
    ks = [top_k[row] if 0 < top_k[row] < vocab_size else vocab_size for row in rows]
    num_candidates = max(NUM_CANDIDATES, 1 + max((k for k in ks if k < vocab_size), default=0))
    if 4 * num_candidates > vocab_size:
        return truncate_by_sort(logprobs_BV, top_k, top_p)
    device = logprobs_BV.device
    rows_R = torch.tensor(rows, device=device)
    k_R1 = torch.tensor(ks, device=device)[:, None]
    p_R1 = torch.tensor([top_p[row] for row in rows], dtype=torch.float64, device=device)[:, None]
    logprobs_RV = logprobs_BV[rows_R]
    best_RK = logprobs_RV.topk(num_candidates, dim=-1).values
    probs_RK = best_RK.double().exp()
    inside_k_RK = torch.arange(num_candidates, device=device) < k_R1
    held_R1 = torch.where(
        k_R1 < vocab_size,
        (probs_RK * inside_k_RK).sum(-1, keepdim=True),
        logprobs_RV.exp().sum(-1, keepdim=True, dtype=torch.float64),
    )
    kept_RK = inside_k_RK & (probs_RK.cumsum(-1) - probs_RK < p_R1 * held_R1)
    num_kept_R1 = kept_RK.sum(-1, keepdim=True).clamp_(min=1)
    last_R1 = best_RK.gather(1, num_kept_R1 - 1)
    next_R1 = best_RK.gather(1, num_kept_R1.clamp(max=num_candidates - 1))
    truncated_BV = logprobs_BV.index_copy(
        0, rows_R, logprobs_RV.masked_fill(logprobs_RV < last_R1, -torch.inf)
    )
    # The kept reach beyond the candidates, or equals of the last one are in line behind it.
    unsettled = ((num_kept_R1 == num_candidates) | (next_R1 == last_R1))[:, 0].tolist()
    if left := [row for row, open_end in zip(rows, unsettled, strict=True) if open_end]:
        truncated_BV[left] = truncate_by_sort(
            logprobs_BV[left], [top_k[row] for row in left], [top_p[row] for row in left]
        )
    return truncated_BV


def truncate_by_sort(logprobs_BV: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """Reference for truncate: every row sorted."""
    device, vocab_size = logprobs_BV.device, logprobs_BV.shape[1]
    k_B1 = torch.tensor([[k if k > 0 else vocab_size] for k in top_k], device=device)
    p_B1 = torch.tensor([[p] for p in top_p], dtype=torch.float64, device=device)
    sorted_BV, ids_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(vocab_size, device=device)
    sorted_BV = sorted_BV.masked_fill(rank_V >= k_B1, -torch.inf)
    probs_BV = sorted_BV.double().softmax(-1)
    # top_p of 1 is off: the cumulated probability reaches 1 before the last token by rounding.
    outside_BV = (probs_BV.cumsum(-1) - probs_BV >= p_B1) & (p_B1 < 1)
    outside_BV[:, 0] = False
    kept_BV = torch.empty_like(sorted_BV)
    return kept_BV.scatter_(1, ids_BV, sorted_BV.masked_fill(outside_BV, -torch.inf))


def _parts(values_BV: Tensor, filler: float) -> Tensor:
    """[B, C, SPAN], filled up at the end."""
    missing = -values_BV.shape[1] % SPAN
    if missing:
        values_BV = F.pad(values_BV, (0, missing), value=filler)
    return values_BV.view(len(values_BV), -1, SPAN)


def _pick(parts_BCS: Tensor, part_BN: Tensor) -> Tensor:
    """[B, N, SPAN]: the parts of those numbers."""
    return parts_BCS.gather(1, part_BN[..., None].expand(-1, -1, SPAN))
