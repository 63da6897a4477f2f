"""From tokens to text while they come: whole characters, up to a stop string.

A streamed answer and one that is sent whole go through the same code, so they are equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from luthier_core.partials import Topk

Decode = Callable[[list[int]], str]
"""Token ids to text, without special tokens."""

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet."""
MAX_PENDING_TOKENS = 16
"""A character has at most 4 bytes: what is not finished by then never will be."""
MAX_WINDOW_TOKENS = 64
"""Of tokens that have no text, so many are decoded again with the next."""


class TextDecoder:
    """Text of one token after the other.

    A few tokens are decoded before each new one: some tokenizers write the space before a word only
    if something comes before the word.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_told = 0
        self._told = ""
        text = decode(list(context))
        if not text.endswith(UNFINISHED):
            self._window, self._num_told, self._told = list(context), len(context), text

    def push(self, token: int) -> str:
        """The text that this token finishes; empty inside a character."""
        self._window.append(token)
        text = self._decode(self._window)
        num_pending = len(self._window) - self._num_told
        if text.endswith(UNFINISHED) and num_pending < MAX_PENDING_TOKENS:
            return ""
        return self._tell(text)

    def flush(self) -> str:
        """What is left of a character that never came to its end."""
        return self._tell(self._decode(self._window))

    def _tell(self, text: str) -> str:
        new = text[len(self._told) :]
        if new or len(self._window) > MAX_WINDOW_TOKENS:
            self._window = self._window[self._num_told :]
            self._num_told, self._told = len(self._window), self._decode(self._window)
        return new


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a text; `offset` is where its text begins, in characters of the whole text."""

    token: int
    logprob: float | None
    """None for the first token of a prompt."""
    topk: Topk
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text with its tokens."""

    text: str
    tokens: list[Token]


@dataclass(slots=True)
class Transcript:
    """The text of one sequence. It ends before a stop string; EOS is no part of it."""

    decoder: TextDecoder
    eos: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    tokens: list[int] = field(default_factory=list)
    """All that have come, the stop included."""
    stopped: bool = False
    """A stop string has come."""
    _held: str = ""
    """Text that is not given out: it may be the beginning of a stop string."""
    _num_told: int = 0
    _waiting: list[Token] = field(default_factory=list)

    def push(
        self, tokens: Sequence[int], logprobs: Sequence[float | None], topk: Sequence[Topk]
    ) -> Piece:
        """The text that is certain with these tokens."""
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            if self.stopped or token in self.eos:
                continue
            offset = self._num_told + len(self._held)
            self._waiting.append(Token(token, logprobs[i], topk[i] if topk else [], offset))
            self._append(self.decoder.push(token))
        return self._release(len(self._held) if self.stopped else self._num_certain())

    def end(self) -> Piece:
        """The rest."""
        if not self.stopped:
            self._append(self.decoder.flush())
        piece = self._release(len(self._held))
        if self.stopped:
            return piece
        return Piece(piece.text, piece.tokens + self._waiting)

    def _append(self, text: str) -> None:
        self._held += text
        found = [at for at in map(self._held.find, self.stops) if at >= 0]
        if found:
            self._held, self.stopped = self._held[: min(found)], True

    def _num_certain(self) -> int:
        """Characters of what is held that are no beginning of a stop string."""
        size = len(self._held)
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for start in range(max(0, size - longest), size):
            if any(stop.startswith(self._held[start:]) for stop in self.stops):
                return start
        return size

    def _release(self, size: int) -> Piece:
        text, self._held = self._held[:size], self._held[size:]
        self._num_told += size
        told = [token for token in self._waiting if token.offset < self._num_told]
        self._waiting = self._waiting[len(told) :]
        return Piece(text, told)
