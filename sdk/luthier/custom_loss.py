"""The local half of forward_backward_custom: a loss of the user's, made linear in the logprobs.

With logprobs l and a loss C(l), the gradient of C with respect to the weights of the model is that
of sum(dC/dl * l) with dC/dl held fixed: cross_entropy with the weights -dC/dl.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier import types
from luthier.errors import LuthierError

if TYPE_CHECKING:
    import torch

CustomLossFn = Callable[
    [list[types.Datum], list["torch.Tensor"]], tuple["torch.Tensor", Mapping[str, Any]]
]
"""(data, logprobs: one float32 tensor per datum) -> (scalar loss, metrics)."""


def scored(data: Sequence[types.Datum]) -> list[types.Datum]:
    """The data for a forward pass that only scores the targets; ValueError without targets."""
    return [_weighted(datum, datum.loss_fn_inputs.get("weights")) for datum in data]


def linearised(
    data: list[types.Datum], output: types.ForwardBackwardOutput, loss_fn: CustomLossFn
) -> tuple[float, dict[str, float], list[types.Datum]]:
    """The loss, the caller's metrics, and the data whose cross_entropy has the loss's gradient."""
    import torch

    with torch.enable_grad():
        logprobs = [
            outputs["logprobs"].to_torch().requires_grad_() for outputs in output.loss_fn_outputs
        ]
        loss, metrics = loss_fn(data, logprobs)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise LuthierError("loss_fn: the loss it returns must be a scalar torch tensor")
        if not loss.requires_grad:
            raise LuthierError("loss_fn: the loss it returns does not depend on the logprobs")
        loss.backward()  # type: ignore[no-untyped-call]
    weighted = [
        _weighted(datum, _negated_gradient(scores))
        for datum, scores in zip(data, logprobs, strict=True)
    ]
    numbers = {name: float(value) for name, value in metrics.items()}
    return float(loss.detach()), numbers, weighted


def _negated_gradient(logprobs: "torch.Tensor") -> types.TensorData:
    if logprobs.grad is None:  # the loss does not look at this datum
        return types.TensorData.from_numpy(np.zeros(logprobs.shape, np.float32))
    return types.TensorData.from_torch(-logprobs.grad)


def _weighted(datum: types.Datum, weights: types.TensorData | None) -> types.Datum:
    targets = datum.loss_fn_inputs.get("target_tokens")
    if targets is None:
        raise ValueError("loss_fn_inputs: forward_backward_custom needs target_tokens")
    if weights is None:
        weights = types.TensorData.from_numpy(np.zeros(targets.shape, np.float32))
    return types.Datum(datum.model_input, {"target_tokens": targets, "weights": weights})
