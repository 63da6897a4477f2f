"""Reading bodies within their limit, and answering with JSON."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import orjson
from aiohttp import web

from luthier_core.errors import (
    BodyTooLarge,
    InvalidField,
    LuthierError,
    Unreadable,
    Unsupported,
)
from luthier_core.redaction import redact
from luthier_gateway.decompress import ENCODINGS, PIECE_BYTES, Decompressor

PROTOBUF = "application/x-protobuf"
MAX_SMALL_BODY = 1024 * 1024
"""Of a bookkeeping call, in bytes."""
MAX_PAGE = 1000
HEAD_BYTES = 64 * 1024
"""Of a body that cannot be read this much is looked at for the ids whose seq it uses up."""
TAIL_BYTES = 4 * 1024
"""And this much of its end, where SDKs that send JSON write them."""
MAX_COMPRESSED_BYTES = 16 * 1024 * 1024
BODY_S = 300.0
"""A body may take this long to come."""
MAX_DRAIN = 4
"""An over-size body is read on to its end, up to this many times its limit."""


class OversizeBody(BodyTooLarge):
    """The request body is larger than this server accepts."""

    def __init__(self, detail: str, head: bytes, tail: bytes) -> None:
        super().__init__(detail)
        self.head = head
        self.tail = tail
        """The last bytes; empty if the end was too far away."""


class _TooMuchCompressed(Exception):
    """More bytes have come than a body may have before decompression."""


async def read_body(request: web.Request, max_bytes: int) -> bytes:
    """The decompressed body.

    OversizeBody beyond max_bytes, or beyond MAX_COMPRESSED_BYTES as it came; Unreadable if it is
    damaged on the way, or too long on it.
    """
    try:
        async with asyncio.timeout(BODY_S):
            return await _read_body(request, max_bytes)
    except TimeoutError:
        raise Unreadable(f"the body took longer than {BODY_S:g} s to come") from None


async def _read_body(request: web.Request, max_bytes: int) -> bytes:
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", *ENCODINGS):
        raise Unsupported(f"Content-Encoding: {encoding[:50]!r}; send one of {list(ENCODINGS)}")
    parts: list[bytes] = []
    size = 0
    pieces = _pieces(request, encoding)
    try:
        async for piece in pieces:
            parts.append(piece)
            size += len(piece)
            if size > max_bytes:
                break
        else:
            return b"".join(parts)
    except _TooMuchCompressed:
        problem = f"at most {MAX_COMPRESSED_BYTES} bytes compressed"
        head, tail = _head_of(parts), b""
    except web.RequestPayloadError:
        raise Unreadable("Transfer-Encoding and the body disagree") from None
    else:
        problem = f"at most {max_bytes} bytes after decompression"
        head, last = _head_of(parts), parts[-1]
        parts.clear()  # nobody needs it, and its end may be long in coming
        tail = await _drain(pieces, last, max_bytes * MAX_DRAIN)
    raise OversizeBody(problem, head, tail)


def _head_of(parts: list[bytes]) -> bytes:
    head = b""
    for part in parts:
        if len(head) >= HEAD_BYTES:
            break
        head += part[: HEAD_BYTES - len(head)]
    return head


async def _pieces(request: web.Request, encoding: str) -> AsyncIterator[bytes]:
    """The body in pieces, decompressed; none is larger than PIECE_BYTES by much."""
    if encoding == "identity":
        async for data in request.content.iter_any():
            yield data
        return
    decompressor = Decompressor(encoding)
    num_compressed = 0
    async for data in request.content.iter_any():
        num_compressed += len(data)
        if num_compressed > MAX_COMPRESSED_BYTES:
            raise _TooMuchCompressed
        for piece in decompressor.pieces(data):
            yield piece
            if len(piece) == PIECE_BYTES:
                await asyncio.sleep(0)  # a bomb takes turns with the other requests
    decompressor.check_end()


async def _drain(pieces: AsyncIterator[bytes], last: bytes, max_bytes: int) -> bytes:
    """The end of a body; empty if it is more than max_bytes away, or damaged."""
    tail, size = last[-TAIL_BYTES:], 0
    try:
        async for piece in pieces:
            size += len(piece)
            tail = (tail + piece[-TAIL_BYTES:])[-TAIL_BYTES:]
            if size > max_bytes:
                return b""
    except (Unreadable, _TooMuchCompressed, web.RequestPayloadError):
        return b""
    return tail


def page_of(request: web.Request, *, default_limit: int) -> tuple[int, int]:
    """(limit, offset) of the query; InvalidField with the allowed range."""
    return (
        _whole_number(request, "limit", default_limit, 1, MAX_PAGE),
        _whole_number(request, "offset", 0, 0, 2**31),
    )


def _whole_number(request: web.Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII) or not least <= int(text) <= most:
        raise InvalidField(f"{name}: {text[:50]!r}; allowed are {least} to {most}")
    return int(text)


def json_response(value: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def error_response(error: LuthierError) -> web.Response:
    """`{"detail": sentence}`: never an empty body, which the SDK takes for a broken connection."""
    response = json_response(
        {"detail": redact(error.message), "category": error.category}, status=error.status
    )
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response
