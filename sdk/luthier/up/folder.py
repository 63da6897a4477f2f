"""The data folder of one stack: where things are in it, its lock, and its secrets."""

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from luthier_core.auth import new_api_key
from luthier_core.errors import ConfigError

ORPHAN_WAIT_S = 25.0
"""How long a start waits for the Valkey of an `up` that was killed; it flushes and leaves."""


class DataFolder:
    """Paths in DIR, and the lock that this process holds on it."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self.lock_fd = lock_fd
        self.config_file = path / "luthier.toml"
        self.secret_file = path / "secret"
        self.api_key_file = path / "api-key"
        self.admin_key_file = path / "admin-key"
        self.status_file = path / "status.json"
        self.endpoint_file = path / "endpoint"
        self.logs = path / "logs"
        self.models = path / "models"
        self.objects = path / "objects"
        self.valkey = path / "valkey"

    def secret(self) -> bytes:
        """The server secret, 32 bytes; made at the first start."""
        if not self.secret_file.exists():
            write_private(self.secret_file, secrets.token_hex(32) + "\n")
        try:
            secret = bytes.fromhex(self.secret_file.read_text().strip())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.secret_file}: {error}") from error
        if len(secret) != 32:
            raise ConfigError(f"{self.secret_file}: expected 32 bytes in hex, got {len(secret)}")
        return secret

    def api_key(self) -> tuple[str, bool]:
        """The key of the default tenant, and whether it was made just now."""
        return _key_in(self.api_key_file)

    def admin_key(self) -> str:
        """The operator's key, which `luthier admin` uses on this machine."""
        return _key_in(self.admin_key_file)[0]

    def log_file(self, part: str) -> Path:
        return self.logs / f"{part}.log"

    def clear_last(self) -> None:
        """Forgets where a killed stack listened; moves the last logs aside, one generation deep."""
        self.endpoint_file.unlink(missing_ok=True)
        self.status_file.unlink(missing_ok=True)
        for log in self.logs.glob("*.log"):
            log.replace(log.with_suffix(".log.old"))


@contextlib.contextmanager
def open_data_folder(path: Path) -> Iterator[DataFolder]:
    """DIR, made if need be and locked for this process; ConfigError where that cannot be."""
    path = path.absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"--data {path}: {error.strerror}") from error
    try:
        _lock(lock_fd, path)
        folder = DataFolder(path, lock_fd)
        try:
            for sub in (folder.logs, folder.models, folder.objects, folder.valkey):
                sub.mkdir(mode=0o700, exist_ok=True)
            folder.clear_last()
        except OSError as error:
            raise ConfigError(f"--data {path}: {error.filename}: {error.strerror}") from error
        yield folder
    finally:
        os.close(lock_fd)


def is_locked(path: Path) -> bool:
    """Whether a stack runs on DIR."""
    try:
        fd = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _lock(lock_fd: int, path: Path) -> None:
    """Takes the lock and leaves our pid in it; ConfigError naming the holder.

    Valkey inherits the descriptor and with it the lock: two servers on one append-only file would
    destroy it, so a killed `up` still holds DIR until its Valkey has ended.
    """
    deadline = time.monotonic() + ORPHAN_WAIT_S
    while not _try_lock(lock_fd):
        holder = os.pread(lock_fd, 20, 0).decode(errors="replace").strip()
        if _is_alive(holder) or time.monotonic() > deadline:
            raise ConfigError(f"--data {path}: in use by another luthier up, pid {holder}")
        time.sleep(0.1)
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, f"{os.getpid()}\n".encode(), 0)


def _try_lock(lock_fd: int) -> bool:
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError):
        return False
    return True


@contextlib.contextmanager
def runtime_folder(environ: Mapping[str, str]) -> Iterator[Path]:
    """A private folder (mode 0700) for sockets, with a short path; gone at exit."""
    base = environ.get("XDG_RUNTIME_DIR", "")
    usable = base.startswith("/") and len(base) < 60 and os.access(base, os.W_OK | os.X_OK)
    path = Path(tempfile.mkdtemp(prefix="luthier-", dir=base if usable else "/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _key_in(path: Path) -> tuple[str, bool]:
    """The API key in a file, and whether it was made just now."""
    if path.exists():
        return path.read_text().strip(), False
    key = new_api_key()
    write_private(path, f"{key}\n")
    return key, True


def write_private(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one step, readable by its owner only, safe on disk."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
