"""What is known of a running stack: a JSON file in DIR, and the table that people see."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.table import Table

from luthier.up.folder import is_locked, write_private

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class PartStatus:
    """One part at one moment."""

    name: str
    state: str
    pid: int | None
    port: int | None
    restarts: int


@dataclass(frozen=True, slots=True)
class StackStatus:
    """The whole stack at one moment; `ready_after_s` is None until everything was ready once."""

    url: str
    started_at: float
    """Seconds since the epoch."""
    ready_after_s: float | None
    parts: Sequence[PartStatus]


class StatusFile:
    """DIR/status.json: replaced whole at every change, for `luthier status`."""

    def __init__(self, path: Path, url: str, started_at: float) -> None:
        self.url = url
        self._path = path
        self._started_at = started_at
        self._ready_after_s: float | None = None

    def set_ready(self, parts: Sequence[PartStatus]) -> float:
        """Everything is ready now, for the first time: seconds since the start."""
        self._ready_after_s = time.time() - self._started_at
        self.write(parts)
        return self._ready_after_s

    def write(self, parts: Sequence[PartStatus]) -> None:
        status = StackStatus(self.url, self._started_at, self._ready_after_s, parts)
        write_private(self._path, json.dumps(asdict(status)) + "\n")


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one part, in bytes; PSS counts a page shared by n processes as an nth."""

    rss_bytes: int
    pss_bytes: int


def read_status(data: Path) -> StackStatus | None:
    """The stack that runs on DIR now, or None."""
    if not is_locked(data):
        return None
    try:
        fields = json.loads((data / "status.json").read_text())
    except OSError:
        return None
    parts = [PartStatus(**part) for part in fields.pop("parts")]
    return StackStatus(**fields, parts=parts)


def measure_memory(pid: int | None, *, with_pss: bool) -> Memory | None:
    """Memory of a process and its descendants, None if it has gone. PSS costs milliseconds."""
    if pid is None:
        return None
    try:
        process = psutil.Process(pid)
        infos = [
            part.memory_full_info() if with_pss else part.memory_info()
            for part in (process, *process.children(recursive=True))
        ]
    except psutil.Error:
        return None
    # Only Linux has PSS.
    return Memory(sum(i.rss for i in infos), sum(getattr(i, "pss", 0) for i in infos))


def parts_table(parts: Sequence[PartStatus], *, with_pss: bool = False) -> Table:
    """Part, state, pid, port, restarts and memory in MiB, with the sum at the foot."""
    measured = [measure_memory(part.pid, with_pss=with_pss) for part in parts]
    known = [memory for memory in measured if memory]
    table = Table(show_footer=True)
    table.add_column("part", "all")
    table.add_column("state")
    for name in ("pid", "port", "restarts"):
        table.add_column(name, justify="right")
    table.add_column("memory MB", _mib(sum(m.rss_bytes for m in known)), justify="right")
    if with_pss:
        table.add_column("PSS MB", _mib(sum(m.pss_bytes for m in known)), justify="right")
    for part, memory in zip(parts, measured, strict=True):
        numbers = [_mib(memory.rss_bytes) if memory else "-"]
        if with_pss:
            numbers.append(_mib(memory.pss_bytes) if memory else "-")
        table.add_row(
            part.name,
            part.state,
            str(part.pid or "-"),
            str(part.port or "-"),
            str(part.restarts),
            *numbers,
        )
    return table


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.0f}"
