"""Results of training and sampling requests."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from luthier.types._base import ResponseBase, StopReason
from luthier.types.tensor import TensorData

LossFnOutput = Mapping[str, TensorData]
"""Of one datum: `logprobs`, float32 in the shape of its target_tokens, and what the loss adds."""
FILLER_LOGPROB = -99999.0
"""In an unused cell of a table of top logprobs."""


@dataclass(frozen=True, slots=True)
class ForwardBackwardOutput:
    """Result of forward, forward_backward and forward_backward_custom.

    `loss_fn_outputs[i]` belongs to `data[i]`. `metrics` are reduced over all chunks of the call;
    `loss:sum` is the loss, a sum over tokens and datums in nats.
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[LossFnOutput]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """`metrics["loss:sum"]`."""
        return self.metrics["loss:sum"]


class OptimStepResponse(ResponseBase):
    """Result of optim_step: the server's metrics, such as `grad_norm`, as they are."""

    metrics: dict[str, float] | None = None


class SaveWeightsResponse(ResponseBase):
    """Where the state was saved: `tinker://<run>/weights/<name>`."""

    path: str


class SaveWeightsForSamplerResponse(ResponseBase):
    """Where the weights were saved: `tinker://<run>/sampler_weights/<name>`."""

    path: str


class SaveWeightsExternalResponse(ResponseBase):
    """Where files for download were saved: `tinker://<run>/external_weights/<name>`."""

    path: str
    size_bytes: int | None = None


class LoadWeightsResponse(ResponseBase):
    """What was loaded, and into which run."""

    path: str | None = None
    model_id: str | None = None


class TopkLogprobs(NamedTuple):
    """The k likeliest tokens of every position: int32[n, k] and float32[n, k], in nats."""

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    def tolist(self) -> list[list[tuple[int, float]] | None]:
        """A list of (token, logprob) for every position; None where there are none."""
        rows: list[list[tuple[int, float]] | None] = []
        for tokens, logprobs in zip(self.token_ids.tolist(), self.logprobs.tolist(), strict=True):
            pairs = zip(tokens, logprobs, strict=True)
            rows.append([pair for pair in pairs if pair[1] > FILLER_LOGPROB] or None)
        return rows


@dataclass(frozen=True, slots=True, eq=False)
class SampledSequence:
    """One sample of n tokens. The token that stopped it is its last.

    `tokens_np` int32[n]; `logprobs_np` float32[n] in nats; `topk_logprobs_np` [n, k].
    Arrays are read-only; the properties without `_np` give the same as lists.
    """

    stop_reason: StopReason
    sequence_id: str
    tokens_np: NDArray[np.int32]
    logprobs_np: NDArray[np.float32] | None = None
    topk_logprobs_np: TopkLogprobs | None = None

    @property
    def tokens(self) -> list[int]:
        """Token ids."""
        return list(self.tokens_np.tolist())

    @property
    def logprobs(self) -> list[float] | None:
        """One per token, in nats."""
        return None if self.logprobs_np is None else list(self.logprobs_np.tolist())

    @property
    def topk_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """The likeliest tokens at every position, if topk_sample_logprobs asked for them."""
        return None if self.topk_logprobs_np is None else self.topk_logprobs_np.tolist()


class PromptAltTokens(NamedTuple):
    """Draws at every prompt position: int64 and float32 tensors [len(prompt) - 1, k]."""

    tokens: TensorData
    logprobs: TensorData


@dataclass(frozen=True, slots=True, eq=False)
class SampleResponse:
    """Result of one sampling request: as many sequences as were asked for.

    Of a prompt of T tokens: `prompt_logprobs_np` float32[T] in nats, NaN for the first;
    `topk_prompt_logprobs_np` [T, k]; `target_prompt_logprobs` float32[T - 1, K];
    `prompt_cache_hit_tokens` of them were computed before.
    """

    sequences: list[SampledSequence]
    prompt_logprobs_np: NDArray[np.float32] | None = None
    topk_prompt_logprobs_np: TopkLogprobs | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens: PromptAltTokens | None = None
    prompt_cache_hit_tokens: int = 0

    @property
    def prompt_logprobs(self) -> list[float | None] | None:
        """One per prompt token, in nats; None for the first, and if they were not asked for."""
        if self.prompt_logprobs_np is None:
            return None
        values: list[Any] = self.prompt_logprobs_np.tolist()
        return [None if value != value else value for value in values]

    @property
    def topk_prompt_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """The likeliest tokens at every prompt position, if they were asked for."""
        if self.topk_prompt_logprobs_np is None:
            return None
        return self.topk_prompt_logprobs_np.tolist()
