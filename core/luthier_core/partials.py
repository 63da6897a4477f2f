"""Tokens of a sample that still runs, from a sampler to whoever streams it to a user.

Hints over pub/sub beside the durable outcome: they may be lost or repeated, and the outcome says
all that they say. `offset` tells a reader where the tokens belong; every RESEND_TOKENS tokens a
message has all of them again, so a reader that lost one catches up.
"""

import json
from dataclasses import dataclass

RESEND_TOKENS = 64
"""Messages of a sample of n tokens add up to about n²/128 tokens for it."""

Topk = list[tuple[int, float]]
"""Tokens and logprobs, most likely first."""


@dataclass(frozen=True, slots=True)
class Partial:
    """Tokens [offset, offset + len(tokens)) that sequence `index` of the sample has generated."""

    index: int
    offset: int
    tokens: list[int]
    logprobs: list[float]
    topk: list[Topk]
    """One entry per token if the request wants topk_sample_logprobs, else empty."""


def encode_partials(partials: list[Partial]) -> str:
    # Not by orjson, which has no infinity: a logprob may be one.
    rows = [(p.index, p.offset, p.tokens, p.logprobs, p.topk) for p in partials]
    return json.dumps(rows, separators=(",", ":"))


def decode_partials(message: str) -> list[Partial]:
    return [Partial(*row) for row in json.loads(message)]
