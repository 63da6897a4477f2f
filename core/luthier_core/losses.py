"""The losses by wire name: what each datum must carry, and what a request may set.

One table for the gateway, which refuses, and the trainer, which computes.
Source: wire protocol 7.3.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from luthier_core.errors import InvalidField, Unsupported
from luthier_core.proto import wire_pb2 as wire


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """Inputs have the shape of target_tokens, which every loss needs."""

    inputs: tuple[str, ...]
    """Must be in each datum, beside target_tokens."""
    token_inputs: tuple[str, ...] = ()
    """May be in a datum; one that is named like a setting replaces it, token by token."""
    config: Mapping[str, float] = field(default_factory=dict)
    """What loss_fn_config may set, with the defaults."""


CLIP_LOW, CLIP_HIGH, RATIO_MASK = "clip_low_threshold", "clip_high_threshold", "sequence_ratio_mask"

_POLICY_INPUTS = ("logprobs", "advantages")
_CLIPS = (CLIP_LOW, CLIP_HIGH)

LOSSES: Mapping[str, LossSpec] = {
    "cross_entropy": LossSpec(inputs=("weights",)),
    "importance_sampling": LossSpec(inputs=_POLICY_INPUTS),
    "ppo": LossSpec(
        inputs=_POLICY_INPUTS, token_inputs=_CLIPS, config={CLIP_LOW: 0.8, CLIP_HIGH: 1.2}
    ),
    "cispo": LossSpec(
        inputs=_POLICY_INPUTS, token_inputs=_CLIPS, config={CLIP_LOW: 0.0, CLIP_HIGH: 4.0}
    ),
    "dro": LossSpec(inputs=_POLICY_INPUTS, config={"beta": 0.05}),
    "gspo": LossSpec(
        inputs=_POLICY_INPUTS,
        token_inputs=(*_CLIPS, RATIO_MASK),
        config={CLIP_LOW: 0.8, CLIP_HIGH: 1.2},
    ),
}

_REFUSED: Mapping[str, str] = {
    "stable_reinforce": "its formula is not published, and a guess would train something else",
    "custom": "loss graphs are not run on this server; forward_backward_custom with a function "
    "computes any loss in the client",
}


def loss_spec(name: str) -> LossSpec:
    """The loss of that wire name; Unsupported with the reason, or InvalidField with the names."""
    if name in _REFUSED:
        raise Unsupported(f"loss_fn: {name!r}: {_REFUSED[name]}; supported are {sorted(LOSSES)}")
    if name not in LOSSES:
        raise InvalidField(f"loss_fn: {name!r} is not one of {sorted(LOSSES)}")
    return LOSSES[name]


def loss_config(request: wire.ForwardBackwardRequest) -> dict[str, float]:
    """The loss's settings: the request's over the defaults. InvalidField names key and range.

    A key that the loss does not have is refused: ignoring a misspelt one would train another loss.
    """
    defaults = loss_spec(request.loss_fn).config
    given: dict[str, float] = dict(request.loss_fn_config)
    # Newer clients write numbers into both maps, and text into this one only.
    for key, value in request.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise InvalidField(f"loss_fn_config.{key}: must be a number")
        given[key] = value.number
    for key, number in given.items():
        if key not in defaults:
            raise InvalidField(
                f"loss_fn_config.{key}: {request.loss_fn} has no such setting; it has "
                f"{sorted(defaults)}"
            )
        if not 0 <= number < math.inf:
            raise InvalidField(f"loss_fn_config.{key}: {number}; must be finite and at least 0")
    config = {**defaults, **given}
    if CLIP_LOW in config and config[CLIP_LOW] > config[CLIP_HIGH]:
        raise InvalidField(
            f"loss_fn_config.{CLIP_LOW}: {config[CLIP_LOW]} is above {CLIP_HIGH}, which is "
            f"{config[CLIP_HIGH]}"
        )
    return config
