"""Bodies that are small on the wire and enormous, deep or many once read (reliability S4)."""

import asyncio
import gzip
import json
import random
import zlib
from dataclasses import dataclass
from functools import cache
from unittest.mock import Mock

import orjson
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request
from backports import zstd
from tests.malicious.harness import Family, Guard

from luthier_core import part_limits, types, validation
from luthier_core.types import TinkerPath
from luthier_gateway import decompress, web_io

MAX_BYTES = 4 * 1024 * 1024
PACKERS = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstd.compress}


@dataclass(frozen=True, slots=True)
class Body:
    data: bytes
    encoding: str = "identity"
    reader: str = "bytes"
    """bytes | json | protobuf: what is made of it once it is read."""


def check(body: Body) -> object:
    """As a request's handler reads it."""
    data = asyncio.run(_read(body))
    if body.reader == "json":
        return types.parse(TinkerPath, data)
    if body.reader == "protobuf":
        return validation.parse_forward_backward(data)
    return data


async def _read(body: Body) -> bytes:
    loop = asyncio.get_running_loop()
    content = StreamReader(BaseProtocol(loop=loop), limit=2**27, loop=loop)
    content.feed_data(body.data)
    content.feed_eof()
    headers = {"Content-Encoding": body.encoding}
    request = make_mocked_request("POST", "/", headers=headers, payload=content, protocol=Mock())
    return await web_io.read_body(request, MAX_BYTES)


@cache
def _packed_zeros(encoding: str, megabytes: int) -> bytes:
    return PACKERS[encoding](bytes(megabytes * 2**20))


def zeros(encoding: str, rng: random.Random) -> Body:
    return Body(_packed_zeros(encoding, rng.choice([5, 8])), encoding)


def nested(rng: random.Random) -> Body:
    """A bomb in a bomb: the inner one alone is too large."""
    return Body(_packed_twice(rng.choice([300, 320])), "gzip")


@cache
def _packed_twice(number: int) -> bytes:
    return gzip.compress(_packed_zeros("gzip", 16) * number)


def members(rng: random.Random) -> Body:
    encoding = rng.choice(["gzip", "zstd"])
    return Body(_empty(encoding) * rng.randint(1100, 3000), encoding)


@cache
def _empty(encoding: str) -> bytes:
    return PACKERS[encoding](b"")


@cache
def _wide_window(log: int) -> bytes:
    options = {
        zstd.CompressionParameter.window_log: log,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }
    compressor = zstd.ZstdCompressor(options=options)
    return compressor.compress(b"x" * 1000) + compressor.flush()


def window(rng: random.Random) -> Body:
    return Body(_wide_window(rng.randint(24, 27)), "zstd")


def compressed(rng: random.Random) -> Body:
    """Larger than a body may be as it comes."""
    # What comes in stored blocks of noise is as large when it is read.
    encoding = rng.choice([*PACKERS, "identity"])
    return Body(_packed_noise(encoding), encoding)


@cache
def _packed_noise(encoding: str) -> bytes:
    noise = random.Random(7).randbytes(17 * 2**20)
    return PACKERS[encoding](noise) if encoding in PACKERS else noise


def torn(rng: random.Random) -> Body:
    encoding = rng.choice(list(PACKERS))
    packed = PACKERS[encoding](rng.randbytes(1000))
    return Body(packed[: rng.randrange(1, len(packed) - 1)], encoding)


def other_encoding(rng: random.Random) -> Body:
    encoding = rng.choice(["br", "compress", "gzip, gzip", "x" * 1000, "zstd;q=1"])
    return Body(b"{}", encoding)


def deep_json(rng: random.Random) -> Body:
    opening = rng.choice([b"[", b'{"tinker_path":'])
    return Body(opening * rng.choice([2000, 50_000]), reader="json")


def wide_json(rng: random.Random) -> Body:
    body = {"tinker_path": "x", "more": [[]] * rng.randint(140_000, 160_000)}
    return Body(orjson.dumps(body), reader="json")


def wrong_json(rng: random.Random) -> Body:
    value = rng.choice([10**400, "9" * 5000, {"x": 1}, [1], None, True])
    return Body(
        json.dumps({"tinker_path": value if value != "9" * 5000 else [value]}).encode(),
        reader="json",
    )


def map_keys(rng: random.Random) -> Body:
    return Body(_keys(rng.choice([132_000, 150_000])), reader="protobuf")


@cache
def _keys(number: int) -> bytes:
    """One datum with so many inputs."""
    keys = b"".join(b"\x12\x0c\n\x06%06d\x12\x02\x18\x01" % key for key in range(number))
    return b"\x1a" + _varint(len(keys)) + keys


def deep_protobuf(rng: random.Random) -> Body:
    groups = b"\xfb\x01" * rng.choice([200, 5000, 50_000])  # field 31, start of a group
    return Body(groups, reader="protobuf")


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


async def _read_all(request: web.Request, max_bytes: int) -> bytes:
    return await request.content.read()


BOMBS = Family(
    name="S4 bombs",
    check=check,
    good=lambda: Body(gzip.compress(b'{"tinker_path": "x"}'), "gzip", "json"),
    classes={
        "gzip": lambda rng: zeros("gzip", rng),
        "zstd": lambda rng: zeros("zstd", rng),
        "deflate": lambda rng: zeros("deflate", rng),
        "nested": nested,
        "members": members,
        "windows": window,
        "compressed size": compressed,
        "torn": torn,
        "other encodings": other_encoding,
        "deep JSON": deep_json,
        "wide JSON": wide_json,
        "wrong JSON": wrong_json,
        "map keys": map_keys,
        "deep protobuf": deep_protobuf,
    },
    guards={
        "decoded size": Guard(web_io, "read_body", _read_all, lets_in="gzip"),
        "members": Guard(decompress, "MAX_MEMBERS", 10**9, lets_in="members"),
        "window": Guard(decompress, "_WINDOW_LOG_MAX", 27, lets_in="windows"),
        "parts of JSON": Guard(part_limits, "MAX_PARTS", 10**9, lets_in="wide JSON"),
        "parts of protobuf": Guard(
            validation, "check_forward_backward_parts", lambda _: None, lets_in="map keys"
        ),
        "end of compression": Guard(
            decompress.Decompressor, "check_end", lambda _: None, lets_in="torn"
        ),
    },
    num_inputs=210,
)
