"""Reading bodies within their limit, and answering with JSON."""

import re
from typing import Any

import orjson
from aiohttp import web

from luthier_core.errors import BodyTooLarge, InvalidField, LuthierError, Unreadable

MAX_SMALL_BODY = 1024 * 1024
"""Of a bookkeeping call, in bytes."""
MAX_PAGE = 1000
HEAD_BYTES = 64 * 1024
"""Of an over-size body this much is looked at, to find the ids whose seq it uses up."""


class OversizeBody(BodyTooLarge):
    """The request body is larger than this server accepts."""

    def __init__(self, detail: str, head: bytes) -> None:
        super().__init__(detail)
        self.head = head


async def read_body(request: web.Request, max_bytes: int) -> bytes:
    """The decompressed body.

    OversizeBody with its first HEAD_BYTES beyond max_bytes; Unreadable if it is damaged on the way.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                head = b"".join(parts)[:HEAD_BYTES]
                raise OversizeBody(f"at most {max_bytes} bytes after decompression", head)
    except web.RequestPayloadError:
        raise Unreadable("Content-Encoding or Transfer-Encoding and the body disagree") from None
    return b"".join(parts)


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
        {"detail": error.message, "category": error.category}, status=error.status
    )
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response
