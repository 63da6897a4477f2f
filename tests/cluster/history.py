"""What Redis did, step by step, in its own order: from its MONITOR feed.

Each call of the function library is followed there by the commands that it ran. So this sees which
admission entered the log, under which epoch an outcome was written, and how often.
"""

import asyncio
import contextlib
import re
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Self

_LINE = re.compile(rb'^\+?[\d.]+ \[\d+ (\S+)\] "(\w+)"(.*)$')
_ARGUMENT = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_RUN_KEY = re.compile(r"\{(.+:train:\d+)\}:(h|log|r:(\d+))")
MAX_LINE_BYTES = 4 * 1024 * 1024
RECONNECT_S = 0.01


OWNERS_CALLS = ("begin", "commit", "trim", "release", "ffwd", "publish", "fail_range", "blame")
"""Functions whose first argument is the caller's epoch."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the function library."""

    name: str
    epoch: int

    @classmethod
    def of(cls, arguments: list[str]) -> Self:
        """From name, number of keys, keys, arguments."""
        name = arguments[0].removeprefix("lu1_")
        first = 2 + int(arguments[1])
        return cls(name, int(arguments[first]) if name in OWNERS_CALLS else 0)


@dataclass(slots=True)
class RunHistory:
    """What was done to one run."""

    told: dict[int, int] = field(default_factory=dict)
    """seq -> what its admission was stamped with; it has entered the log"""
    commits: list[tuple[int, int]] = field(default_factory=list)
    """(epoch, seq)"""
    outcomes: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    """seq -> how often its outcome was written"""
    owners: list[str] = field(default_factory=list)
    """name/incarnation of each who acquired it"""
    epoch: int = 0
    """Of the newest owner."""
    stale_writes: list[str] = field(default_factory=list)
    """Calls that wrote something under another epoch than the newest."""
    num_trims: int = 0
    num_refused: int = 0
    """Commits that were fenced, late or out of order."""

    @property
    def pending(self) -> bool:
        """Whether something in the log has no outcome."""
        return self.told.keys() > self.outcomes.keys()


class History:
    """Every run's, and how often a request was recognised as a repeat."""

    def __init__(self) -> None:
        self.runs: defaultdict[str, RunHistory] = defaultdict(RunHistory)
        self.num_restarts = 0
        """So often Redis went away, and something it did then may have gone unseen."""
        self._call = _Call("", 0)
        self._has_committed = True
        self._run = ""

    def _line(self, line: bytes) -> None:
        match = _LINE.match(line)
        if match is None:
            return
        source, command, rest = match[1], match[2].decode().upper(), match[3]
        arguments = [argument.decode("latin-1") for argument in _ARGUMENT.findall(rest)]
        if source != b"lua":
            self._end_of_call()
            self._call = _Call.of(arguments) if command == "FCALL" else _Call("", 0)
        elif arguments and (key := _RUN_KEY.fullmatch(arguments[0])):
            self._inner(command, key, arguments[1:])

    def _inner(self, command: str, key: re.Match[str], arguments: list[str]) -> None:
        run, name = self.runs[key[1]], self._call.name
        if name in OWNERS_CALLS and command not in ("HMGET", "HGET"):
            stale = self._call.epoch != run.epoch
            if stale and name not in run.stale_writes:
                run.stale_writes.append(name)
        match command, key[2].partition(":")[0], name:
            case "XADD", "log", _:
                fields = dict(zip(arguments[1::2], arguments[2::2], strict=True))
                seq = 0 if arguments[0] == "0-1" else int(arguments[0].removesuffix("-0"))
                run.told[seq] = int(fields["told"])
            case "XTRIM", "log", _:
                run.num_trims += 1
            case "HSET", "r", _:
                run.outcomes[int(key[3])] += 1
            case "HSET", "h", "commit" if arguments[0] == "committed":
                self._has_committed = True
                run.commits.append((self._call.epoch, int(arguments[1])))
            case "HSET", "h", "acquire":
                run.owners.append(arguments[3])
                run.epoch = int(arguments[1])
            case "HMGET", "h", "commit":
                self._run, self._has_committed = key[1], False

    def _end_of_call(self) -> None:
        if not self._has_committed:
            self.runs[self._run].num_refused += 1
        self._has_committed = True

    async def follow(self, path: str, watched: asyncio.Event) -> None:
        """For ever; sets `watched` once it sees what is done."""
        while True:
            with contextlib.suppress(OSError):
                await self._follow_one(path, watched)
            self.num_restarts += 1
            await asyncio.sleep(RECONNECT_S)

    async def _follow_one(self, path: str, watched: asyncio.Event) -> None:
        reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE_BYTES)
        try:
            writer.write(b"MONITOR\r\n")
            if await reader.readline() == b"+OK\r\n":
                watched.set()
            while line := await reader.readline():
                self._line(line)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def watching(redis_url: str) -> AsyncIterator[History]:
    """The history from now until the end of the block; `redis_url` is that of a Unix socket."""
    history, watched = History(), asyncio.Event()
    following = asyncio.create_task(history.follow(redis_url.removeprefix("unix://"), watched))
    try:
        await watched.wait()
        yield history
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
