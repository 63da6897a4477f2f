"""What a policy-gradient user watches beside the loss: ratios, clipping, distance to the sampler.

A client merges the metrics of a request's chunks by the reduction in their name, means weighted by
the number of datums. So a `:mean` here is the mean over datums of a datum's own mean over its
targets: then the merged number is that of the whole request, whatever the chunks.

Arrays are flat: the targets of all datums end to end. N datums.
"""

from collections.abc import Sequence

import numpy as np

from luthier_core.losses import CLIP_HIGH, CLIP_LOW, RATIO_MASK, loss_spec
from luthier_trainer.packing import Array, Example, is_policy_target


def loss_metrics(
    loss_fn: str, examples: Sequence[Example], logprobs: Sequence[Array]
) -> dict[str, float]:
    """name:reduction -> value, of one request; `logprobs` as unpacked, one array per example."""
    spec = loss_spec(loss_fn)
    names = (*spec.inputs, *spec.token_inputs, *spec.config)
    inputs = {name: _flat([e.loss_inputs[name] for e in examples]) for name in dict.fromkeys(names)}
    if "weights" in inputs:
        return {"weights:sum": float(inputs["weights"].sum())}
    starts = np.cumsum([0, *(array.size for array in logprobs[:-1])])
    is_action = is_policy_target(inputs["logprobs"], inputs["advantages"])
    log_ratio = _flat(logprobs) - inputs["logprobs"]
    # A ratio may overflow where the sampler's logprob is nonsense; the user is to see that it did.
    with np.errstate(over="ignore", invalid="ignore"):
        # Schulman's estimators of KL(sampler | model), http://joschu.net/blog/kl-approx.html
        metrics = {
            "num_action_tokens:sum": float(is_action.sum()),
            "kl_k1:mean": _mean(-log_ratio, is_action, starts),
            "kl_k3:mean": _mean(np.expm1(log_ratio) - log_ratio, is_action, starts),
        }
        if RATIO_MASK in inputs:
            log_ratio = _per_sequence(log_ratio, inputs[RATIO_MASK] != 0, starts)
        return metrics | _ratio_metrics(np.exp(log_ratio), is_action, starts, inputs)


def _ratio_metrics(
    ratio: Array, is_action: Array, starts: Array, inputs: dict[str, Array]
) -> dict[str, float]:
    ratio = np.where(is_action, ratio, 1.0)
    metrics = {
        "ratio:mean": 1.0 + _mean(ratio - 1.0, is_action, starts),
        # 1, if there is no action at all: what two equal policies have.
        "ratio:min": float(ratio.min(where=is_action, initial=np.inf)) if is_action.any() else 1.0,
        "ratio:max": float(ratio.max(where=is_action, initial=0.0)) if is_action.any() else 1.0,
    }
    if CLIP_LOW in inputs:
        below, above = ratio < inputs[CLIP_LOW], ratio > inputs[CLIP_HIGH]
        metrics["clip_low_fraction:mean"] = _mean(below, is_action, starts)
        metrics["clip_high_fraction:mean"] = _mean(above, is_action, starts)
        metrics["clip_fraction:mean"] = _mean(below | above, is_action, starts)
    return metrics


def _mean(values: Array, counted: Array, starts: Array) -> float:
    """Mean over datums of the mean over a datum's counted targets, 0 where none is counted."""
    return float(_means(values, counted, starts).mean())


def _means(values: Array, counted: Array, starts: Array) -> Array:
    """float64 [N]"""
    sums = np.add.reduceat(np.where(counted, values, 0.0), starts)
    means: Array = sums / np.maximum(np.add.reduceat(counted, starts, dtype=np.int64), 1)
    return means


def _per_sequence(values: Array, counted: Array, starts: Array) -> Array:
    """Each target gets the mean of its datum."""
    sizes = np.diff([*starts, len(values)])
    return np.repeat(_means(values, counted, starts), sizes)


def _flat(arrays: Sequence[Array]) -> Array:
    """float64, so that a mean over a million targets is as exact as its terms."""
    return np.concatenate([array.reshape(-1) for array in arrays]).astype(np.float64)
