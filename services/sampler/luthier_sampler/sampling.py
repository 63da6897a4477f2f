"""From logits to tokens and logprobs; and when a sequence stops.

Every row depends on its own logits, parameters and random number only, never on its neighbours.

Dimensions: B sequences, V vocabulary.
"""

from collections.abc import Sequence as Seq
from hashlib import blake2b
from struct import pack
from typing import Protocol

import torch
from torch import Tensor

from luthier_sampler.drawing import argmax, draw, truncate
from luthier_sampler.sequence import SampleRequest, Sequence


def uniform(seed: int, position: int) -> float:
    """A random number in [0, 1) that is a function of its arguments: 52 bits of a hash.

    Counted, not drawn from a state: a preempted or retried sequence gets the same numbers.
    """
    digest = blake2b(pack("<QQ", seed % 2**64, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) / 2**52


def sample(
    logits_BV: Tensor, specs: Seq[SampleRequest], uniforms: Seq[float], *, tempered: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens int64[B], and the float32[B, V] logprobs that they are reported with.

    float32 logits. Temperature first, then top_k, then top_p among what top_k left. Logprobs are of
    the raw model; `tempered`: after temperature, before top_k and top_p (at temperature 0 raw).
    """
    raw_BV = logits_BV.log_softmax(-1)
    temperatures = [spec.temperature for spec in specs]
    if not any(temperatures):
        return argmax(logits_BV), raw_BV
    device = logits_BV.device
    temperature_B1 = torch.tensor(temperatures, device=device)[:, None]
    tempered_BV = raw_BV
    if set(temperatures) - {0.0, 1.0}:
        divisor_B1 = temperature_B1.masked_fill(temperature_B1 == 0, 1.0)
        tempered_BV = (logits_BV / divisor_B1).log_softmax(-1)
    kept_BV = truncate(tempered_BV, [s.top_k for s in specs], [s.top_p for s in specs])
    uniforms_B1 = torch.tensor(uniforms, dtype=torch.float64, device=device)[:, None]
    tokens_B = draw(kept_BV, uniforms_B1)[:, 0]
    if 0.0 in temperatures:
        tokens_B = torch.where(temperature_B1[:, 0] == 0, argmax(logits_BV), tokens_B)
    return tokens_B, tempered_BV if tempered else raw_BV


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that stop strings need."""

    def decode(
        self,
        token_ids: list[int],
        skip_special_tokens: bool = ...,
        clean_up_tokenization_spaces: bool | None = ...,
    ) -> str: ...


WINDOW_MARGIN_TOKENS = 8
"""Tokens decoded before those that can hold a stop string: a window that begins inside a character
or at a word's space decodes differently at its left edge."""


def stop_reason(sequence: Sequence, tokenizer: Tokenizer) -> str:
    """Why the sequence ends with its last token: stop, length, or "" if it goes on."""
    request = sequence.request
    if sequence.tokens[-1] in request.stop_tokens:
        return "stop"
    if request.spec.stop_strings and _completes_stop_string(sequence, tokenizer):
        return "stop"
    return "length" if sequence.num_new_tokens >= request.max_new_tokens else ""


def _completes_stop_string(sequence: Sequence, tokenizer: Tokenizer) -> bool:
    """A stop string is in the generated text; an earlier one would have ended the sequence."""
    stop_strings = sequence.request.spec.stop_strings
    # A token holds at least a byte, so a match that the last one completes begins in here.
    window = max(len(stop.encode()) for stop in stop_strings) + WINDOW_MARGIN_TOKENS
    start = max(sequence.num_prompt_tokens, len(sequence.tokens) - window)
    text = tokenizer.decode(
        sequence.tokens[start:], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return any(stop in text for stop in stop_strings)
