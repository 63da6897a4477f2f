"""Objects by key, with create-if-absent and compare-and-swap: the long-term truth of a deployment.

A key is a relative path such as `t/ann/sessions/4f.json`; no key is the folder of another. Both
stores keep the same promises (tests/contract/test_blobs.py): a write is there whole and for good
once its call returns, or it is not there; of two writers that race on one condition, one wins.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from luthier_core.config import Config
from luthier_core.errors import ConfigError, LuthierError, Unavailable

_PART = re.compile(r"[A-Za-z0-9:._=+-]{1,255}")
MAX_KEY_CHARS = 1000
OUTAGE_RETRY_S = 1.0
PIECE_BYTES = 1024 * 1024
READS_AT_ONCE = 32
T = TypeVar("T")

Pieces = Callable[[], AsyncIterator[bytes]]
"""The bytes of an object, from their beginning at every call."""


class BlobMissing(KeyError):
    """No object has this key."""


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One object, without its bytes."""

    key: str
    num_bytes: int
    etag: str = ""
    """Changes with the content; empty in listings."""


class Blobs(Protocol):
    """An object store. Unavailable if it cannot be reached; ValueError on a key that is none."""

    async def put(self, key: str, data: bytes) -> str:
        """Store or replace; the new ETag."""

    async def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store unless the key exists; whether this call stored it."""

    async def put_if_match(self, key: str, data: bytes, etag: str) -> str | None:
        """Replace if the object still has this ETag; the new ETag, or None if it has not."""

    async def get(self, key: str) -> bytes:
        """The bytes; BlobMissing."""

    async def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """The bytes and the ETag that put_if_match takes; BlobMissing."""

    def stream(self, key: str) -> AsyncIterator[bytes]:
        """The bytes in pieces of at most PIECE_BYTES; BlobMissing before the first one."""

    async def put_stream(self, key: str, pieces: Pieces, num_bytes: int) -> None:
        """Store or replace with `num_bytes` that `pieces()` yields, never all of them in memory.

        `pieces` may be called again for another try. What it raises passes through, and then
        nothing is stored.
        """

    async def head(self, key: str) -> BlobInfo | None:
        """What is stored under the key, or None."""

    async def size(self, key: str) -> int | None:
        """Number of bytes stored under the key, or None; cheap for objects of any size."""

    def list(self, prefix: str) -> AsyncIterator[BlobInfo]:
        """Every object whose key starts with prefix, in the order of keys."""

    async def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""

    async def refuses_damaged(self, key: str) -> bool:
        """Whether bytes that are not those of their checksum are refused; tried with one object."""

    def signed_url(self, key: str, expires_s: int) -> str:
        """A URL from which anybody can GET this one object for expires_s seconds.

        Only its path, with the query, for a store that the gateway serves under its own address.
        """


def check_key(key: str) -> str:
    """The key; ValueError unless it is a relative path of plain names."""
    if len(key) > MAX_KEY_CHARS or not all(
        _PART.fullmatch(part) and part not in (".", "..") for part in key.split("/")
    ):
        raise ValueError(f"not an object key: {key[:200]!r}")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix; ValueError unless some key can start with it."""
    check_key(f"{prefix}x")
    return prefix


async def outlasting_outage(call: Callable[[], Awaitable[T]]) -> T:
    """The call's answer, however long the store is away: what was accepted waits, it fails not.

    LuthierError if an object that must be there is gone.
    """
    while True:
        try:
            return await call()
        except Unavailable:
            await asyncio.sleep(OUTAGE_RETRY_S)
        except BlobMissing as error:
            raise LuthierError(f"stored bytes are gone: {error}") from error


async def read_below(
    blobs: Blobs, prefix: str, suffix: str = ""
) -> AsyncIterator[list[tuple[str, bytes]]]:
    """(key, bytes) of every object whose key starts and ends so, READS_AT_ONCE in a list.

    In the order of keys. What is deleted meanwhile is left out.
    """
    batch: list[str] = []
    async for info in blobs.list(prefix):
        if info.key.endswith(suffix):
            batch.append(info.key)
        if len(batch) == READS_AT_ONCE:
            yield await _read_all(blobs, batch)
            batch = []
    if batch:
        yield await _read_all(blobs, batch)


async def _read_all(blobs: Blobs, names: Sequence[str]) -> list[tuple[str, bytes]]:
    found = await asyncio.gather(*(_get_or_none(blobs, name) for name in names))
    return [(name, data) for name, data in zip(names, found, strict=True) if data is not None]


async def _get_or_none(blobs: Blobs, name: str) -> bytes | None:
    with suppress(BlobMissing):
        return await blobs.get(name)
    return None


@asynccontextmanager
async def open_blobs(config: Config) -> AsyncIterator[Blobs]:
    """The store of this deployment: file:///folder, s3+http(s)://host[:port]/bucket[?region=...]."""
    url = urlsplit(config.store_url)
    if url.scheme == "file":
        if url.netloc or not url.path.startswith("/"):
            raise ConfigError(f"store_url: {config.store_url!r} is not file:///absolute/folder")
        from luthier_core.disk_blobs import DiskBlobs

        root = Path(unquote(url.path))
        secret = config.link_secret_key.encode() or config.secret()
        yield DiskBlobs(root, public_url=config.public_url, secret=secret)
    elif url.scheme in ("s3+http", "s3+https"):
        bucket = url.path.strip("/")
        if not url.netloc or not bucket or "/" in bucket:
            raise ConfigError(f"store_url: {config.store_url!r} is not s3+http://host:port/bucket")
        if not (config.s3_access_key and config.s3_secret_key):
            raise ConfigError(
                "store_url: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
            )
        if bool(config.link_access_key) != bool(config.link_secret_key):
            raise ConfigError(
                "set both LUTHIER_LINK_ACCESS_KEY and LUTHIER_LINK_SECRET_KEY, or neither"
            )
        from luthier_core.s3_blobs import S3Blobs

        async with S3Blobs(
            url.netloc,
            bucket,
            access_key=config.s3_access_key,
            secret_key=config.s3_secret_key,
            secure=url.scheme == "s3+https",
            link_access_key=config.link_access_key,
            link_secret_key=config.link_secret_key,
            region=parse_qs(url.query).get("region", ["us-east-1"])[0],
        ) as blobs:
            yield blobs
    else:
        raise ConfigError(
            f"store_url: {config.store_url!r} must start with file, s3+http or s3+https"
        )
