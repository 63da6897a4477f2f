"""What a person sees of a stack: a live table on a terminal, else one line per event."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.console import Console
from rich.live import Live

from luthier.up.status import PartStatus, parts_table


@contextmanager
def outlives_its_reader() -> Iterator[None]:
    """A terminal that was closed must not keep the parts from draining.

    rich turns a broken pipe into SystemExit.
    """
    with suppress(OSError, SystemExit):
        yield


class View(Protocol):
    """Shown to the person who started the stack."""

    def say(self, text: str) -> None:
        """A message that stays."""

    def event(self, text: str) -> None:
        """Something that happened to a part."""

    def show(self, parts: Sequence[PartStatus]) -> None:
        """How the parts are now."""


class LogView:
    """One line per event: for files, pipes and `--run`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        with outlives_its_reader():
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def event(self, text: str) -> None:
        self.say(f"{time.strftime('%H:%M:%S')} {text}")

    def show(self, parts: Sequence[PartStatus]) -> None:
        pass


class LiveView(LogView):
    """The table at the foot of the terminal; messages scroll above it."""

    def __init__(self, console: Console, live: Live) -> None:
        super().__init__(console)
        self._live = live

    def show(self, parts: Sequence[PartStatus]) -> None:
        with outlives_its_reader():
            self._live.update(parts_table(parts), refresh=True)


@contextmanager
def open_view(*, quiet_stdout: bool) -> Iterator[View]:
    """The view that fits standard output; `quiet_stdout` leaves that to somebody else."""
    console = Console(stderr=quiet_stdout)
    if quiet_stdout or not console.is_terminal:
        yield LogView(console)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield LiveView(console, live)
