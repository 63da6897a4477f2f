"""Objects as files of one local folder: temporary file, fsync, link or rename, fsync of the folder.

`blobs/` holds the objects, `tmp/` what is being written, `locks/` the files that writers lock.
Several processes of one machine may share the folder; a network file system is not supported.
"""

import asyncio
import errno
import fcntl
import hashlib
import hmac
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar
from urllib.parse import quote

from luthier_core.blobs import (
    PIECE_BYTES,
    BlobInfo,
    BlobMissing,
    Pieces,
    check_key,
    check_prefix,
)
from luthier_core.errors import Unavailable

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

READ_INLINE_BYTES = 64 * 1024
"""Reads up to here stay on the event loop: 8 µs against 66 µs through a thread.

Writes never do. A thread costs a lone small write 0.15 ms, but fsync waits for the disk (0.2 to
7 ms on those we met), and 16 writes at once take half the time in threads: their fsyncs overlap.
"""

ABANDONED_AFTER_S = 24 * 3600
"""A temporary file of this age was left by a process that died."""

NUM_LOCKS = 256


class DiskBlobs:
    """Blobs on this machine's disk. The ETag is the sha256 of the content."""

    def __init__(
        self,
        root: Path,
        public_url: str,
        secret: bytes,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._blobs, self._tmp, self._locks = root / "blobs", root / "tmp", root / "locks"
        for folder in (self._blobs, self._tmp, self._locks):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._public_url = public_url.rstrip("/")
        # Derived, so that no signature made here can be taken for another use of the secret.
        self._signing_key = hmac.digest(secret, b"signed download links", "sha256")
        self._clock = clock
        self._remove_abandoned()

    async def put(self, key: str, data: bytes) -> str:
        return await _writing(self._replace, self._path(key), data)

    async def put_if_absent(self, key: str, data: bytes) -> bool:
        return await _writing(self._create, self._path(key), data)

    async def put_if_match(self, key: str, data: bytes, etag: str) -> str | None:
        return await _writing(self._swap, self._path(key), data, etag)

    async def get(self, key: str) -> bytes:
        return await self._read(key, Path.read_bytes)

    async def get_with_etag(self, key: str) -> tuple[bytes, str]:
        return await self._read(key, _read_with_etag)

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        try:
            file = await asyncio.to_thread(open, self._path(key), "rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise BlobMissing(key) from None
        with file:
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield piece

    async def put_stream(self, key: str, pieces: Pieces, num_bytes: int) -> None:
        path, written = self._path(key), self._tmp / uuid.uuid4().hex
        try:
            file = await _writing(open, written, "xb", opener=_private)
            with file:
                async for piece in pieces():
                    await _writing(file.write, piece)
                if file.tell() != num_bytes:
                    raise ValueError(f"{key}: {file.tell()} bytes came instead of {num_bytes}")
                await _writing(_flush, file)
            await _writing(self._rename, written, path)
        finally:
            written.unlink(missing_ok=True)

    async def size(self, key: str) -> int | None:
        try:
            return self.file(key).stat().st_size
        except BlobMissing:
            return None

    def file(self, key: str) -> Path:
        """The file that holds the object, for a server that sends files; BlobMissing."""
        path = self._path(key)
        if not path.is_file():
            raise BlobMissing(key)
        return path

    async def head(self, key: str) -> BlobInfo | None:
        # Reads the whole file: the ETag is then that of the bytes on the disk, not of a memory.
        try:
            data, etag = await self.get_with_etag(key)
        except BlobMissing:
            return None
        return BlobInfo(key, len(data), etag)

    async def list(self, prefix: str) -> AsyncIterator[BlobInfo]:
        check_prefix(prefix)
        for info in await asyncio.to_thread(self._scan, prefix):
            yield info

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self._remove, self._path(key))

    async def refuses_damaged(self, key: str) -> bool:
        return True  # nothing lies between us and the file

    def signed_url(self, key: str, expires_s: int) -> str:
        """A link that the gateway serves under /api/v1/files/ after `signature_is_valid`."""
        expires = int(self._clock()) + expires_s
        query = f"expires={expires}&signature={self._signature(check_key(key), expires)}"
        return f"{self._public_url}/api/v1/files/{quote(key)}?{query}"

    def signature_is_valid(self, key: str, expires: int, signature: str) -> bool:
        """Whether signed_url made this signature for this key and time, and it has not passed."""
        expected = self._signature(key, expires)
        return expires > self._clock() and hmac.compare_digest(
            expected.encode(), signature.encode(errors="replace")
        )

    def _signature(self, key: str, expires: int) -> str:
        return hmac.digest(self._signing_key, f"{expires}:{key}".encode(), "sha256").hex()

    async def _read(self, key: str, read: Callable[[Path], T]) -> T:
        path = self._path(key)
        try:
            if path.stat().st_size <= READ_INLINE_BYTES:
                return read(path)
            return await asyncio.to_thread(read, path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise BlobMissing(key) from None

    def _path(self, key: str) -> Path:
        return self._blobs / check_key(key)

    # --- in a thread ------------------------------------------------------------------------------

    def _replace(self, path: Path, data: bytes) -> str:
        with self._written(path, data) as written:
            self._rename(written, path)
        return _etag(data)

    def _rename(self, written: Path, path: Path) -> None:
        _make_folder(path.parent)
        with self._locked(path):
            os.rename(written, path)
            _fsync_folder(path.parent)

    def _create(self, path: Path, data: bytes) -> bool:
        with self._written(path, data) as written:
            try:
                os.link(written, path)
                return True
            except FileExistsError:
                return False
            finally:
                # The loser too: it relies on the winner's object from now on.
                _fsync_folder(path.parent)

    def _swap(self, path: Path, data: bytes, etag: str) -> str | None:
        with self._written(path, data) as written, self._locked(path):
            try:
                if _etag(path.read_bytes()) != etag:
                    return None
            except FileNotFoundError:
                return None
            os.rename(written, path)
            _fsync_folder(path.parent)
        return _etag(data)

    def _remove(self, path: Path) -> None:
        with self._locked(path), suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            _fsync_folder(path.parent)

    @contextmanager
    def _written(self, path: Path, data: bytes) -> Iterator[Path]:
        """A temporary file with the data, durable; the folder of `path` exists inside the block."""
        _make_folder(path.parent)
        written = self._tmp / uuid.uuid4().hex
        try:
            with open(written, "xb", opener=_private) as file:
                file.write(data)
                _flush(file)
            yield written
        finally:
            written.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Alone among the writers of this key, in all processes and threads."""
        number = hashlib.sha256(str(path).encode()).digest()[0] % NUM_LOCKS
        # flock belongs to the open file, so each writer opens its own; closing lets go.
        with open(self._locks / f"{number:02x}", "ab", opener=_private) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _scan(self, prefix: str) -> Sequence[BlobInfo]:
        top = self._blobs / prefix.rpartition("/")[0]
        found = []
        for folder, _, names in os.walk(top):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self._blobs).as_posix()
                if key.startswith(prefix):
                    with suppress(FileNotFoundError):  # deleted while we looked
                        found.append(BlobInfo(key, path.stat().st_size))
        return sorted(found, key=lambda info: info.key)

    def _remove_abandoned(self) -> None:
        for path in self._tmp.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                    path.unlink()


async def _writing(write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `write` returns, done in a thread; Unavailable while the disk is full."""
    try:
        return await asyncio.to_thread(write, *args, **kwargs)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        log.error("no room on the disk of the objects: %s", error)
        raise Unavailable("the disk of the object store is full") from error


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_with_etag(path: Path) -> tuple[bytes, str]:
    data = path.read_bytes()
    return data, _etag(data)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _make_folder(folder: Path) -> None:
    """Create the folder and its parents so that they survive a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    _fsync_folder(folder.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
