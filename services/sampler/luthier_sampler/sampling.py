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

from luthier_sampler.sequence import SampleRequest, Sequence, TopkTable


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
    if all(spec.temperature == 0 for spec in specs):
        return logits_BV.argmax(-1), raw_BV
    device = logits_BV.device
    temperature_B1 = torch.tensor([[spec.temperature] for spec in specs], device=device)
    greedy_B1 = temperature_B1 == 0
    tempered_BV = (logits_BV / temperature_B1.masked_fill(greedy_B1, 1.0)).log_softmax(-1)
    uniforms_B1 = torch.tensor(uniforms, dtype=torch.float64, device=device)[:, None]
    drawn_B = draw(truncate(tempered_BV, specs), uniforms_B1)
    tokens_B = torch.where(greedy_B1[:, 0], logits_BV.argmax(-1), drawn_B)
    return tokens_B, torch.where(greedy_B1, raw_BV, tempered_BV) if tempered else raw_BV


def draw(logprobs_BV: Tensor, uniforms_B1: Tensor) -> Tensor:
    """The token at which each row's cumulated probability passes its uniform number, int64[B].

    Logprobs need not be normalised; float64 uniforms[B, 1] in [0, 1).
    """
    cumulated_BV = logprobs_BV.double().exp().cumsum(-1)
    # right: never a token of probability 0, where the cumulated probability stands still.
    drawn_B1 = torch.searchsorted(cumulated_BV, uniforms_B1 * cumulated_BV[:, -1:], right=True)
    return drawn_B1[:, 0].clamp_(max=logprobs_BV.shape[1] - 1)


def truncate(logprobs_BV: Tensor, specs: Seq[SampleRequest]) -> Tensor:
    """The logprobs with -inf for tokens outside top_k, then outside top_p of the rest.

    top_p keeps the most likely tokens until they hold top_p of the probability, at least one. Of
    equally likely tokens the lower ids come first. Only rows that ask for it are sorted.
    """
    rows = [row for row, spec in enumerate(specs) if spec.top_k > 0 or spec.top_p < 1]
    if not rows:
        return logprobs_BV
    device, vocab_size = logprobs_BV.device, logprobs_BV.shape[1]
    top_k = [[specs[row].top_k if specs[row].top_k > 0 else vocab_size] for row in rows]
    top_p = [[specs[row].top_p] for row in rows]
    rows_R = torch.tensor(rows, device=device)
    sorted_RV, ids_RV = logprobs_BV[rows_R].sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(vocab_size, device=device)
    sorted_RV = sorted_RV.masked_fill(rank_V >= torch.tensor(top_k, device=device), -torch.inf)
    probs_RV = sorted_RV.double().softmax(-1)
    before_RV = probs_RV.cumsum(-1) - probs_RV
    outside_RV = before_RV >= torch.tensor(top_p, dtype=torch.float64, device=device)
    outside_RV[:, 0] = False
    kept_RV = torch.empty_like(sorted_RV)
    kept_RV.scatter_(1, ids_RV, sorted_RV.masked_fill(outside_RV, -torch.inf))
    return logprobs_BV.index_copy(0, rows_R, kept_RV)


def most_likely(logprobs_BV: Tensor, k: int) -> TopkTable:
    """The k most likely tokens of each row, most likely first; filler beyond the vocabulary."""
    table = TopkTable.filler(len(logprobs_BV), k)
    found = logprobs_BV.topk(min(k, logprobs_BV.shape[1]), dim=-1)
    table.token_ids[:, : found.indices.shape[1]] = found.indices.cpu().numpy()
    table.logprobs[:, : found.values.shape[1]] = found.values.cpu().numpy()
    return table


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
