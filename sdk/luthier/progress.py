"""One line that says what is being waited for, and a bar for pending futures.

On a terminal the line is rewritten in place on standard error; elsewhere each new sentence is
logged once to `luthier`, at INFO: a thousand waiting samples are one line, not a thousand.
"""

import itertools
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import wait
from typing import TextIO, TypeVar

from luthier.future import APIFuture

T = TypeVar("T")
log = logging.getLogger("luthier")

BAR_WIDTH = 30
REDRAW_S = 0.1
RELOG_S = 60.0
"""The same sentence is not logged again before that."""


class StatusLine:
    """The latest thing that any waiting request says, until it is over. Safe from any thread."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._said: dict[int, str] = {}
        """id of who waits -> its sentence, the latest last."""
        self._logged: dict[str, float] = {}
        self._shown = ""
        self._lock = threading.Lock()

    def show(self, owner: object, sentence: str) -> None:
        """Says what `owner` waits for."""
        with self._lock:
            self._said.pop(id(owner), None)
            self._said[id(owner)] = sentence
            self._draw()

    def clear(self, owner: object) -> None:
        """`owner` waits no longer."""
        with self._lock:
            if self._said.pop(id(owner), None) is not None:
                self._draw()

    def _draw(self) -> None:
        sentence = next(reversed(self._said.values()), "")
        if sentence == self._shown:
            return
        self._shown = sentence
        stream = self._stream or sys.stderr
        if stream is not None and stream.isatty():
            stream.write(f"\r\x1b[K{printable(sentence)[:200]}")
            stream.flush()
        elif sentence and time.monotonic() > self._logged.get(sentence, 0.0):
            if len(self._logged) > 100:
                self._logged.clear()
            self._logged[sentence] = time.monotonic() + RELOG_S
            log.info("%s", sentence)


def progress(
    futures: Iterable[APIFuture[T]],
    description: str = "",
    *,
    timeout: float | None = None,
    stream: TextIO | None = None,
) -> Iterator[T]:
    """The results in the order of `futures`, with a bar of how many are there.

    timeout: seconds for all of them together, else TimeoutError. The bar is drawn on a terminal
    only. Raises what a future raises, when its turn comes.
    """
    pending = list(futures)
    deadline = None if timeout is None else time.monotonic() + timeout
    bar = _Bar(len(pending), description, stream or sys.stderr)
    done = itertools.count(1)
    for future in pending:
        future.future().add_done_callback(lambda _: bar.advance(next(done)))
    try:
        for future in pending:
            while not future.done():
                left_s = REDRAW_S if deadline is None else deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"not within {timeout:g} s")
                wait([future.future()], min(left_s, REDRAW_S))
                bar.draw()
            yield future.result()
        bar.draw()
    except (KeyboardInterrupt, GeneratorExit):
        for future in pending:
            future.cancel()
        raise
    finally:
        bar.end()


class _Bar:
    def __init__(self, total: int, description: str, stream: TextIO) -> None:
        self._total = total
        self._description = description
        self._stream = stream
        self._started = time.monotonic()
        self._done = 0
        self._drawn = False

    def advance(self, done: int) -> None:
        """So many are there; called from any thread, drawn by the one that waits."""
        self._done = max(self._done, done)

    def draw(self) -> None:
        if not self._stream.isatty():
            return
        done = self._done
        filled = BAR_WIDTH * done // max(self._total, 1)
        elapsed_s = time.monotonic() - self._started
        bar = "━" * filled + " " * (BAR_WIDTH - filled)
        self._stream.write(
            f"\r\x1b[K{self._description} {bar} {done}/{self._total} {elapsed_s:.1f} s".lstrip()
        )
        self._stream.flush()
        self._drawn = True

    def end(self) -> None:
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()


def printable(text: str) -> str:
    """One line without control characters: a server's words must not steer the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)
