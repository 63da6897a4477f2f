"""Parameters of training and sampling. The server checks their ranges and names a wrong field."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from luthier.types._base import StrictBase


class AdamParams(StrictBase):
    """AdamW for one step: decoupled decay, bias-corrected moments.

    grad_clip_norm: largest global L2 norm of the gradient; 0 or less is off.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class DimuonParams(StrictBase):
    """One step of the dimuon optimizer, for servers that have it."""

    learning_rate: float
    grad_clip_norm: float = 0.0
    beta1: float = 0.9
    type: Literal["dimuon"] = "dimuon"


OptimParams = AdamParams | DimuonParams


class AdamOptimizerConfig(StrictBase):
    """The run's optimizer is AdamW."""

    type: Literal["adamw"] = "adamw"


class DimuonOptimizerConfig(StrictBase):
    """The run's optimizer is dimuon, for servers that have it."""

    version: Literal[1] = 1
    type: Literal["dimuon"] = "dimuon"


OptimizerConfig = Annotated[
    AdamOptimizerConfig | DimuonOptimizerConfig, Field(discriminator="type")
]


class LoraConfig(StrictBase):
    """Which adapter to train. seed: of its random half; None: the server draws one."""

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class SamplingParams(StrictBase):
    """How to sample.

    max_tokens: None is up to the context's end. temperature: 0 is greedy. top_k: -1 is off.
    top_p: 1 is off. seed: sample i of a request uses seed + i. stop: None stops at the model's
    end of sequence; [] at nothing; else strings, or token ids. The stop is part of the result.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
