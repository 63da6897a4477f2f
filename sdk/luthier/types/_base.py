"""The two bases of our data classes, and the short names that several of them use."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

ModelID = str
"""Of a training run: `<session id>:train:<number>`."""
RequestID = str
TensorDtype = Literal["int64", "float32"]
StopReason = Literal["length", "stop"]
CheckpointType = Literal["training", "sampler", "external"]
SamplingClientKind = Literal["snapshot", "inflight"]
LossFnType = Literal[
    "cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"
]


# defer_build: a validator is made when a class is first used, not for all of them at import.


class StrictBase(BaseModel):
    """What a user builds: frozen, and a name that does not exist is an error at once."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), defer_build=True
    )


class ResponseBase(BaseModel):
    """What a server answers: frozen, and fields that a newer server adds are left out."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", protected_namespaces=(), defer_build=True
    )
