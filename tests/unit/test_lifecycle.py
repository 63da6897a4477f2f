"""How a service ends when its parent has gone."""

import subprocess
import sys

import pytest

SERVICE = """
import asyncio, os, signal, sys, time
from luthier_core import lifecycle

lifecycle.ORPHAN_S = {orphan_s}

async def serve():
    async with lifecycle.service_lifetime() as stop:
        print("ready", flush=True)
        {busy}

sys.exit(lifecycle.run_service(serve()))
"""
BUSY = {
    "a drain without end": "await stop.wait(); await asyncio.Event().wait()",
    "a loop that is stuck": "time.sleep(600)",
    "a thread that is waited for": "await stop.wait(); await asyncio.to_thread(time.sleep, 600)",
    "an end that waits for a thread": (
        "import threading; threading.Thread(target=time.sleep, args=(600,)).start(); return 0"
    ),
}
LIMIT_S = 60.0
"""Far above what any of this takes; only a process that does not end reaches it."""


def start(busy: str, *, orphan_s: float) -> subprocess.Popen[str]:
    """A service that is ready, with a parent that holds its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE.format(busy=busy, orphan_s=orphan_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("busy", BUSY)
def test_a_part_ends_soon_after_its_parent_whatever_it_does_and_says_where_it_was(
    busy: str,
) -> None:
    with start(BUSY[busy], orphan_s=0.1) as process:
        try:
            _, said = process.communicate(timeout=LIMIT_S)  # closes its standard input
        finally:
            process.kill()
    assert process.returncode == 1
    assert "Timeout (0:00:00.1" in said
    assert "most recent call first" in said


def test_a_part_that_drains_in_time_ends_as_it_likes() -> None:
    with start("await stop.wait(); return 7", orphan_s=LIMIT_S) as process:
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == 7
