"""The losses by their name on the wire. Every loss is a sum over tokens and datums, never a mean.

Dimensions: T packed tokens, K targets per position.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from luthier_core.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss and the float inputs, beside target_tokens, that each datum must carry for it."""

    inputs: tuple[str, ...]
    total: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    """(logprobs_TK, inputs_TK by name) -> float32 scalar."""


def cross_entropy(logprobs_TK: Tensor, inputs_TK: Mapping[str, Tensor]) -> Tensor:
    """Negated sum over targets of weight * logprob; weights may be negative and of any size.

    Source: Tinker documentation, loss functions, cross_entropy.
    """
    return -(inputs_TK["weights"] * logprobs_TK).sum()


LOSSES: dict[str, Loss] = {"cross_entropy": Loss(inputs=("weights",), total=cross_entropy)}


def loss_named(name: str) -> Loss:
    """The loss of that wire name; BadRequest with the names there are."""
    if name not in LOSSES:
        raise BadRequest(f"loss_fn: {name!r} is not known; allowed: {', '.join(LOSSES)}")
    return LOSSES[name]
