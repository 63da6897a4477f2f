"""Child processes that cannot outlive `luthier up`: each in a session of its own, killed whole."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from luthier_core.errors import ConfigError

_PR_SET_PDEATHSIG = 1


def dies_with_parent() -> Callable[[], None] | None:
    """What a child calls before it executes, so that the kernel ends it with us (Linux only)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: no import in the child
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def signal_group(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a child and all of its descendants in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


async def run_to_end(argv: Sequence[str], environ: Mapping[str, str], log_file: Path) -> str:
    """The last line a helper program prints; ConfigError with its last complaint if it fails.

    Cancelling kills it.
    """
    with log_file.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=dict(environ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            preexec_fn=dies_with_parent(),
        )
    try:
        output, _ = await process.communicate()
    finally:
        signal_group(process.pid, signal.SIGKILL)
    lines = output.decode(errors="replace").split("\n")
    printed = [line for line in lines if line.strip()]
    if process.returncode != 0:
        raise ConfigError(last_line(log_file) or f"{argv[0]} exited with {process.returncode}")
    if not printed:
        raise ConfigError(f"{' '.join(argv)} printed nothing")
    return printed[-1].strip()


def last_line(log_file: Path) -> str:
    """The last line of a log, at most 300 characters; empty if there is none."""
    try:
        with log_file.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    filled = [line.strip() for line in lines if line.strip()]
    return filled[-1][:300] if filled else ""
