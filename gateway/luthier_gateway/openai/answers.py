"""Answers of the OpenAI API, as plain objects: whole ones, and the chunks of a stream."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier_gateway.openai.model_text import ModelText
from luthier_gateway.openai.text import Piece, Token

Answer = dict[str, Any]

NO_LOGPROB = -9999.0
"""What OpenAI writes for a token that is next to impossible; JSON has no infinity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one HTTP request. A prompt counts once, however many samples there are of it."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    """Of the prompts', those that were in the prefix cache."""

    def answer(self) -> Answer:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


class Answers:
    """What both kinds of answers share: the envelope."""

    kind: str
    chunk_kind: str

    def __init__(self, request_id: str, model: str, text: ModelText) -> None:
        self._text = text
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time())}
        self._model = model

    prefix: str

    def whole(self, choices: Sequence[Answer], usage: Usage) -> Answer:
        return {**self._envelope(self.kind, choices), "usage": usage.answer()}

    def chunk(self, choices: Sequence[Answer], usage: Usage | None = None) -> Answer:
        """`usage` is in the last chunk of a stream that was asked for it."""
        chunk = self._envelope(self.chunk_kind, choices)
        return chunk if usage is None else {**chunk, "usage": usage.answer()}

    def _envelope(self, kind: str, choices: Sequence[Answer]) -> Answer:
        return {**self._head, "object": kind, "model": self._model, "choices": list(choices)}


class CompletionAnswers(Answers):
    """Answers to completions. A choice of a chunk has the form of a whole one."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, request_id: str, model: str, text: ModelText, logprobs: int | None) -> None:
        super().__init__(request_id, model, text)
        self._num_logprobs = logprobs

    def choice(self, index: int, piece: Piece, finish_reason: str | None) -> Answer:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": None if self._num_logprobs is None else self._logprobs(piece.tokens),
            "finish_reason": finish_reason,
        }

    part = choice

    def _logprobs(self, tokens: Iterable[Token]) -> Answer:
        listed = list(tokens)
        return {
            "tokens": [self._text.name(token.token) for token in listed],
            "token_logprobs": [_finite(token.logprob) for token in listed],
            "top_logprobs": [self._top(token) for token in listed],
            "text_offset": [token.offset for token in listed],
        }

    def _top(self, token: Token) -> dict[str, float | None] | None:
        """The most likely tokens and the one that came; None where nothing predicts the token."""
        if token.logprob is None:
            return None
        pairs = [*token.topk[: self._num_logprobs], (token.token, token.logprob)]
        return {self._text.name(other): _finite(logprob) for other, logprob in reversed(pairs)}


class ChatAnswers(Answers):
    """Answers to chat completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(
        self, request_id: str, model: str, text: ModelText, top_logprobs: int | None
    ) -> None:
        super().__init__(request_id, model, text)
        self._num_logprobs = top_logprobs

    def choice(self, index: int, piece: Piece, finish_reason: str | None) -> Answer:
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": finish_reason,
        }

    def opening(self, index: int) -> Answer:
        """The first part of a streamed choice."""
        return self._part(index, {"role": "assistant", "content": ""}, None, None)

    def part(self, index: int, piece: Piece, finish_reason: str | None) -> Answer:
        delta = {"content": piece.text} if piece.text else {}
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        return self._part(index, delta, logprobs, finish_reason)

    def _part(
        self, index: int, delta: Answer, logprobs: Answer | None, finish_reason: str | None
    ) -> Answer:
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: Iterable[Token]) -> Answer | None:
        if self._num_logprobs is None:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, token: Token) -> Answer:
        top = [self._scored(*pair) for pair in token.topk[: self._num_logprobs]]
        return {**self._scored(token.token, token.logprob), "top_logprobs": top}

    def _scored(self, token: int, logprob: float | None) -> Answer:
        name = self._text.name(token)
        # A token that is a part of a character has bytes that its text does not tell.
        known = None if "\ufffd" in name else list(name.encode())
        return {"token": name, "logprob": _finite(logprob), "bytes": known}


def _finite(logprob: float | None) -> float | None:
    return NO_LOGPROB if logprob is not None and not math.isfinite(logprob) else logprob
