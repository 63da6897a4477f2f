"""What a request may ask of an engine: refused at the door, it cannot hurt the others of a step."""

import math
from dataclasses import dataclass

import numpy as np

from luthier_core.errors import BadRequest, InvalidField
from luthier_sampler.sequence import SampleRequest

MAX_TOPK_LOGPROBS = 100
"""Bounds a response: prompt length x k cells of 8 bytes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model and the KV cache allow."""

    vocab_size: int
    max_context_tokens: int
    num_cache_tokens: int

    @property
    def context_tokens(self) -> int:
        """Longest sequence: a sequence that fits the whole cache can always be run alone."""
        return min(self.max_context_tokens, self.num_cache_tokens)

    def max_new_tokens(self, spec: SampleRequest) -> int:
        """Tokens that a sequence may generate: at least one, as scoring a full context asks."""
        # The last token is never fed to the model, so it may lie just beyond the context.
        room = max(1, self.context_tokens - len(spec.prompt))
        return room if spec.max_tokens is None else min(spec.max_tokens, room)


def check(spec: SampleRequest, limits: Limits) -> None:
    """BadRequest names the first field whose value this engine does not take."""
    _check_prompt(spec, limits)
    _in_range("num_samples", spec.num_samples, 1)
    _in_range("max_tokens", spec.max_tokens if spec.max_tokens is not None else 1, 1)
    _in_range("topk_prompt_logprobs", spec.topk_prompt_logprobs, 0, MAX_TOPK_LOGPROBS)
    _in_range("prompt_alt_tokens_k", spec.prompt_alt_tokens_k, 0, MAX_TOPK_LOGPROBS)
    if spec.prompt_logprobs_last_n is not None:
        last = len(spec.prompt) - 1
        _in_range("prompt_logprobs_last_n", spec.prompt_logprobs_last_n, 1, last)
    _in_range("topk_sample_logprobs", spec.topk_sample_logprobs, 0, MAX_TOPK_LOGPROBS)
    if not (math.isfinite(spec.temperature) and spec.temperature >= 0):
        raise InvalidField(f"temperature={spec.temperature}: must be a finite number from 0")
    _in_range("top_k", spec.top_k, -1)
    if not 0 < spec.top_p <= 1:
        raise InvalidField(f"top_p={spec.top_p}: must be above 0 and at most 1")
    if "" in spec.stop_strings:
        raise InvalidField("stop: a stop string must not be empty")


def _check_prompt(spec: SampleRequest, limits: Limits) -> None:
    num_tokens = len(spec.prompt)
    if num_tokens == 0:
        raise InvalidField("prompt: must have at least one token")
    if num_tokens > limits.max_context_tokens:
        context = f"the model's context of {limits.max_context_tokens}"
        raise BadRequest(f"prompt: {num_tokens} tokens are more than {context}")
    if num_tokens > limits.num_cache_tokens:
        cache = f"the {limits.num_cache_tokens} that this sampler's KV cache holds"
        raise BadRequest(f"prompt: {num_tokens} tokens are more than {cache}")
    tokens = np.asarray(spec.prompt)
    if tokens.min() < 0 or tokens.max() >= limits.vocab_size:
        raise InvalidField(f"prompt: token ids must be from 0 to {limits.vocab_size - 1}")


def _in_range(name: str, value: int, least: int, most: int | None = None) -> None:
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidField(f"{name}={value}: must be {allowed}")
