"""Requests whose end two servers may see at different places (reliability S19).

Each carries a second request where only one of the readings finds it.
"""

from collections.abc import Iterator

INNER = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
"""Answered with 200 by whoever takes it for a request."""
_LENGTH = len(INNER)
_CHUNK = f"{_LENGTH:x}\r\n{INNER}\r\n0\r\n\r\n"


def _post(headers: str, body: str = INNER) -> str:
    return f"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\n{headers}\r\n{body}"


_TWO_LENGTHS = [(0, _LENGTH), (_LENGTH, 0), (1, _LENGTH), (_LENGTH, 1), (5, 6)]
_NO_LENGTHS = ["+5", "-1", "5,5", "0x5", "5 5", "5;", "", "\u0665", "5e0", "5.0", "1" * 30, "_5"]
_NO_CODINGS = [
    "xchunked",
    "chunked, x",
    "chunked, identity",
    "chunked;a",
    '"chunked"',
    "\x0bchunked",
]
_NO_CODINGS += ["chunked chunked", "chunke", "identity, chunked, gzip", "gzip"]
_NO_SIZES = ["-1", "0x1c", "+1c", "1c 1c", "g", "", ";", "f" * 17, "\x001c", "1_c", "1c,"]
_NO_NAMES = ["Content-Length ", "Content Length", "Content-Length\t", "Content\x00-Length", ""]
_NO_NAMES += [
    "Content-Length\x0b",
    "(Content-Length)",
    "Content-Length\u00a0",
    "\x7fContent-Length",
]
_NO_VALUES = ["a\x00b", "a\x01b", "a\rb", "a\x7fb\x00", "\x00"]
_NO_LINES = [
    *(
        "POST /x",
        "POST /x HTTP/9.9",
        "POST /x http/1.1",
        "POST /x HTTP/1.1 x",
    ),
    *("PO ST /x HTTP/1.1", "POST\x00 /x HTTP/1.1", "P\x7fST /x HTTP/1.1", "(POST) /x HTTP/1.1"),
    *("POST /x\x00y HTTP/1.1", "POST /x HTTP/1", "POST /x HTTP/1.1\x00", "\x00POST /x HTTP/1.1"),
    *("POST /x HTTP/0.9", "POST /x HTTP/1.10", "POST\t/x\tHTTP/1.1", "{} /x HTTP/1.1"),
]


def cases() -> Iterator[tuple[str, str]]:
    """(class, request)"""
    for extra in ("", "X-A: b\r\n", "Connection: keep-alive\r\n", "Expect: 100-continue\r\n"):
        yield from _framing(extra)
    for line in _NO_LINES:
        yield "request lines", f"{line}\r\nHost: x\r\nContent-Length: 0\r\n\r\n{INNER}"


def _framing(extra: str) -> Iterator[tuple[str, str]]:
    for length in (0, 4, _LENGTH):
        both = f"Content-Length: {length}\r\nTransfer-Encoding: chunked\r\n"
        yield "length and coding", _post(extra + both, _CHUNK)
        swapped = f"Transfer-Encoding: chunked\r\nContent-Length: {length}\r\n"
        yield "length and coding", _post(extra + swapped, _CHUNK)
    for first, second in _TWO_LENGTHS:
        two = f"Content-Length: {first}\r\nContent-Length: {second}\r\n"
        yield "two lengths", _post(extra + two)
    for length in _NO_LENGTHS:
        yield "no lengths", _post(f"{extra}Content-Length: {length}\r\n")
    for coding in _NO_CODINGS:
        yield "no codings", _post(f"{extra}Transfer-Encoding: {coding}\r\n", _CHUNK)
    for size in _NO_SIZES:
        body = f"{size}\r\n{INNER}\r\n0\r\n\r\n{INNER}"
        yield "no chunk sizes", _post(f"{extra}Transfer-Encoding: chunked\r\n", body)
    for name in _NO_NAMES:
        yield "no names", _post(f"{extra}{name}: {_LENGTH}\r\n")
    for value in _NO_VALUES:
        yield "no values", _post(f"{extra}X-B: {value}\r\nContent-Length: 0\r\n")
