"""Decompressing request bodies piece by piece, so that what comes out never exceeds what is asked.

aiohttp would do it too, but with a zstd window of up to 128 MiB for each request (reliability S4).
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from backports import zstd

from luthier_core.errors import Unreadable

PIECE_BYTES = 1024 * 1024
MAX_MEMBERS = 1024
"""Frames or gzip members of one body, one after the other."""
_WINDOW_LOG_MAX = 23
"""8 MiB: what the SDK's compression level needs at most."""


class _Member(Protocol):
    """Decompresses one gzip member, zlib stream or zstd frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What the bytes decompress to."""


class _Zstd:
    def __init__(self) -> None:
        limits: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}
        self._decompressor = zstd.ZstdDecompressor(options=limits)

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data

    def pieces(self, data: bytes) -> Iterator[bytes]:
        yield self._decompressor.decompress(data, PIECE_BYTES)
        while not (self._decompressor.eof or self._decompressor.needs_input):
            yield self._decompressor.decompress(b"", PIECE_BYTES)


class _Zlib:
    def __init__(self, window_bits: int) -> None:
        self._decompressor = zlib.decompressobj(window_bits)

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data

    def pieces(self, data: bytes) -> Iterator[bytes]:
        yield self._decompressor.decompress(data, PIECE_BYTES)
        while self._decompressor.unconsumed_tail and not self._decompressor.eof:
            yield self._decompressor.decompress(self._decompressor.unconsumed_tail, PIECE_BYTES)


_MEMBERS: Mapping[str, Callable[[], _Member]] = {
    "zstd": _Zstd,
    "gzip": lambda: _Zlib(31),
    "deflate": lambda: _Zlib(15),
}
ENCODINGS = tuple(_MEMBERS)


class Decompressor:
    """One body; Unreadable if its bytes are not of that encoding, or have too many members."""

    def __init__(self, encoding: str) -> None:
        self._new_member = _MEMBERS[encoding]
        self._member = self._new_member()
        self._num_members = 1

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What these bytes of the body decompress to, at most PIECE_BYTES at a time."""
        try:
            while data:
                if self._member.eof:
                    self._begin_member()
                yield from self._member.pieces(data)
                data = self._member.unused_data if self._member.eof else b""
        except (zlib.error, zstd.ZstdError) as error:
            raise Unreadable(f"Content-Encoding and the body disagree: {error}") from None

    def check_end(self) -> None:
        """Unreadable if more bytes were to come."""
        if not self._member.eof:
            raise Unreadable("Content-Encoding and the body disagree: it ends too early")

    def _begin_member(self) -> None:
        self._num_members += 1
        if self._num_members > MAX_MEMBERS:
            raise Unreadable(f"Content-Encoding: at most {MAX_MEMBERS} compressed members")
        self._member = self._new_member()
