"""The losses as code: one loss per target, to be summed over targets, tokens and datums.

lp are the model's logprobs, q the sampler's (`logprobs` on the wire), A the advantages, w the
weights, lo and hi the clip thresholds, all in nats or plain numbers; the ratio is r = exp(lp - q).
Never a mean: the sum over a request's chunks must be the loss of the whole.

A client marks positions that are not the policy's own, such as a prompt, by q = 0 and A = 0. No
ratio is taken where A = 0, so that whatever stands there cannot overflow into the sum.

Dimensions: T packed tokens, K targets per position, N datums.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from luthier_core.losses import CLIP_HIGH, CLIP_LOW, RATIO_MASK, loss_spec

Inputs = Mapping[str, Tensor]
"""float [T, K] by wire name, with settings and defaults filled in."""
Loss = Callable[[Tensor, Inputs, Tensor], Tensor]
"""(logprobs [T, K], inputs, index of each row's datum int64 [T]) -> losses [T, K]."""


def loss_named(name: str) -> Loss:
    """The loss of that wire name; BadRequest with the names there are."""
    loss_spec(name)
    return _LOSSES[name]


def cross_entropy(logprobs_TK: Tensor, inputs_TK: Inputs, datum_T: Tensor) -> Tensor:
    """-w lp; weights may be negative and of any size."""
    return -inputs_TK["weights"] * logprobs_TK


def importance_sampling(logprobs_TK: Tensor, inputs_TK: Inputs, datum_T: Tensor) -> Tensor:
    """-r A."""
    return -_log_ratio(logprobs_TK, inputs_TK).exp() * inputs_TK["advantages"]


def ppo(logprobs_TK: Tensor, inputs_TK: Inputs, datum_T: Tensor) -> Tensor:
    """-min(r A, clip(r, lo, hi) A). Source: Schulman et al. 2017, arXiv 1707.06347."""
    return _clipped(_log_ratio(logprobs_TK, inputs_TK), inputs_TK)


def cispo(logprobs_TK: Tensor, inputs_TK: Inputs, datum_T: Tensor) -> Tensor:
    """-sg(clip(r, lo, hi)) lp A, no gradient through the ratio. Source: arXiv 2506.13585."""
    ratio = _log_ratio(logprobs_TK.detach(), inputs_TK).exp()
    clipped = ratio.clamp(inputs_TK[CLIP_LOW], inputs_TK[CLIP_HIGH])
    return -clipped * logprobs_TK * inputs_TK["advantages"]


def dro(logprobs_TK: Tensor, inputs_TK: Inputs, datum_T: Tensor) -> Tensor:
    """-(lp A - beta (lp - q)^2 / 2), at every position. Source: arXiv 2405.19107."""
    penalty = 0.5 * inputs_TK["beta"] * (logprobs_TK - inputs_TK["logprobs"]).square()
    return penalty - logprobs_TK * inputs_TK["advantages"]


def gspo(logprobs_TK: Tensor, inputs_TK: Inputs, datum_T: Tensor) -> Tensor:
    """-min(s A, clip(s, lo, hi) A) with one ratio s per datum, through which the gradient flows.

    s = exp(mean of lp - q over the targets that sequence_ratio_mask counts).
    Source: Zheng et al. 2025, arXiv 2507.18071.
    """
    counted = inputs_TK[RATIO_MASK] != 0
    log_ratio_TK = torch.where(counted, logprobs_TK - inputs_TK["logprobs"], 0.0)
    zeros_N = log_ratio_TK.new_zeros(int(datum_T[-1]) + 1)
    num_counted_N = zeros_N.index_add(0, datum_T, counted.to(zeros_N.dtype).sum(1))
    log_ratio_N = zeros_N.index_add(0, datum_T, log_ratio_TK.sum(1)) / num_counted_N.clamp(min=1)
    sequence_TK = log_ratio_N.index_select(0, datum_T)[:, None]
    return _clipped(torch.where(inputs_TK["advantages"] != 0, sequence_TK, 0.0), inputs_TK)


_LOSSES: Mapping[str, Loss] = {
    loss.__name__: loss for loss in (cross_entropy, importance_sampling, ppo, cispo, dro, gspo)
}


def _log_ratio(logprobs_TK: Tensor, inputs_TK: Inputs) -> Tensor:
    return torch.where(inputs_TK["advantages"] != 0, logprobs_TK - inputs_TK["logprobs"], 0.0)


def _clipped(log_ratio_TK: Tensor, inputs_TK: Inputs) -> Tensor:
    """-min(ratio A, clip(ratio, lo, hi) A)."""
    advantages_TK = inputs_TK["advantages"]
    ratio_TK = log_ratio_TK.detach().exp()
    clipped_TK = ratio_TK.clamp(inputs_TK[CLIP_LOW], inputs_TK[CLIP_HIGH]) * advantages_TK
    is_clipped = clipped_TK < ratio_TK * advantages_TK
    # Where the clipped side is the smaller one, the ratio may be infinite, and the gradient of its
    # exp would be 0 * inf.
    free_TK = torch.where(is_clipped, 0.0, log_ratio_TK).exp() * advantages_TK
    return -torch.where(is_clipped, clipped_TK, free_TK)
