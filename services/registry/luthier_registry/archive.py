"""A tar of a checkpoint's files, streamed from the object store to the object store.

Uncompressed: weights do not compress. The same files give the same bytes, so to write it twice
changes nothing.
"""

import hashlib
import tarfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from luthier_core.blobs import Blobs
from luthier_core.errors import CheckpointDamaged

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """One file that goes into the tar."""

    name: str
    key: str
    num_bytes: int
    sha256: str


async def write_archive(blobs: Blobs, key: str, files: Sequence[ArchiveFile]) -> None:
    """Store a tar of `files` under `key`; CheckpointDamaged, and no tar, if one has changed."""
    num_bytes = sum(_BLOCK + file.num_bytes + _padding(file) for file in files) + len(_END)
    await blobs.put_stream(key, partial(_tar, blobs, files), num_bytes)


async def copy_file(blobs: Blobs, file: ArchiveFile, key: str) -> None:
    """Store the same bytes under another key."""
    await blobs.put_stream(key, partial(_checked, blobs, file), file.num_bytes)


async def _tar(blobs: Blobs, files: Sequence[ArchiveFile]) -> AsyncIterator[bytes]:
    for file in files:
        info = tarfile.TarInfo(file.name)
        info.size = file.num_bytes
        yield info.tobuf(tarfile.GNU_FORMAT)
        async for piece in _checked(blobs, file):
            yield piece
        yield bytes(_padding(file))
    yield _END


async def _checked(blobs: Blobs, file: ArchiveFile) -> AsyncIterator[bytes]:
    """The file's bytes; CheckpointDamaged instead of their end if they are not those saved."""
    digest, num_left = hashlib.sha256(), file.num_bytes
    async for piece in blobs.stream(file.key):
        digest.update(piece)
        num_left -= len(piece)
        # Before the last one goes: a store that has got every byte keeps the object.
        if num_left <= 0 and digest.hexdigest() != file.sha256:
            break
        yield piece
    if digest.hexdigest() != file.sha256:
        raise CheckpointDamaged(f"file {file.name} has another sha256")


def _padding(file: ArchiveFile) -> int:
    return -file.num_bytes % _BLOCK
