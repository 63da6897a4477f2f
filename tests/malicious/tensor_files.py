"""safetensors files that a loader could be misled by (reliability S7)."""

import json
import random
import struct
from typing import Any

from tests.malicious.harness import Family, Guard

from luthier_core import safetensors_check
from luthier_core.safetensors_check import PassingCheck, TensorInfo

FILE = "adapter_model.safetensors"
PIECE_BYTES = 30_001
"""No multiple of a value, and less than the longest of the headers."""
Entries = list[tuple[str, Any]]


def check(data: bytes) -> object:
    """As an upload is checked: while it passes in pieces."""
    passing = PassingCheck(FILE, len(data), lambda tensors: None)
    for start in range(0, len(data), PIECE_BYTES):
        passing.feed(data[start : start + PIECE_BYTES])
    passing.end()
    return passing


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(entries: Entries, data: bytes) -> bytes:
    """Written by hand: json.dumps of a dict could not have one key twice."""
    parts = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in entries)
    header = f"{{{parts}}}".encode()
    return struct.pack("<Q", len(header)) + header + data


def good() -> bytes:
    return file_of([("a", entry([2, 2], 0, 16)), ("b", entry([4], 16, 32))], bytes(32))


def overlap(rng: random.Random) -> bytes:
    at = 4 * rng.randrange(4)
    return file_of([("a", entry([4], 0, 16)), ("b", entry([4], at, at + 16))], bytes(at + 16))


def alias(rng: random.Random) -> bytes:
    """An empty tensor at the place of another."""
    at = 4 * rng.randrange(5)
    return file_of([("a", entry([4], 0, 16)), ("b", entry([0], at, at))], bytes(16))


def twice(rng: random.Random) -> bytes:
    first, second = rng.sample([entry([4], 0, 16), entry([2, 2], 0, 16)], 2)
    name = rng.choice("abc")
    return file_of([(name, first), (name, second)], bytes(16))


def enormous(rng: random.Random) -> bytes:
    shape = rng.choice([[2**62, 4], [2**63 - 1], [2**32, 2**32], [2**31, 2**31, 4], [2**64]])
    return file_of([("a", entry(shape, 0, 16))], bytes(16))


def negative(rng: random.Random) -> bytes:
    shape = rng.choice([[-4], [-2, -2], [4, -1], [True, 4], [4.0], ["4"], [None]])
    return file_of([("a", entry(shape, 0, 16))], bytes(16))


def gap(rng: random.Random) -> bytes:
    """Bytes that no tensor has."""
    hole = rng.randrange(1, 50)
    before, after = rng.choice([(hole, 0), (0, hole), (hole, hole)])
    return file_of([("a", entry([4], before, before + 16))], bytes(before + 16 + after))


def truncated(rng: random.Random) -> bytes:
    return good()[: rng.randrange(len(good()))]


def long_header(rng: random.Random) -> bytes:
    """A length that is not that of the header, or a header above the limit."""
    if rng.random() < 0.1:
        padding = [("__metadata__", {"x": "y" * 2**20})]
        return file_of([*padding, ("a", entry([4], 0, 16))], bytes(16))
    length = rng.choice([0, 1, 2**20 + 1, 2**31, 2**62, 2**64 - 1])
    return struct.pack("<Q", length) + good()[8:]


def no_header(rng: random.Random) -> bytes:
    header = rng.choice(
        [b"[]", b"{", b"1", b"null", b'"x"', b"[" * 90_000, b"\xff\xfe", b'{"a": NaN}', b'{"a":1}']
    )
    return struct.pack("<Q", len(header)) + header


def dtypes(rng: random.Random) -> bytes:
    dtype: Any = rng.choice(["I64", "U8", "F8", "", "object", None, ["F32"], "BOOL", "I32"])
    num_items = {"I64": 2, "U8": 16, "BOOL": 16}.get(dtype if isinstance(dtype, str) else "", 4)
    return file_of([("a", entry([num_items], 0, 16, dtype))], bytes(16))


def not_finite(rng: random.Random) -> bytes:
    dtype, form = rng.choice([("F32", "<f"), ("F16", "<e"), ("BF16", "<H")])
    item = struct.calcsize(form)
    wrong: Any = rng.choice([float("nan"), float("inf"), -float("inf")])
    if dtype == "BF16":
        wrong = rng.choice([0x7F80, 0xFF80, 0x7FC0])
    data = bytearray(4 * item)
    struct.pack_into(form, data, item * rng.randrange(4), wrong)
    return file_of([("a", entry([4], 0, 4 * item, dtype))], bytes(data))


def extra(rng: random.Random) -> bytes:
    """Fields that nobody knows, metadata that is no text, offsets of another form."""
    wrong: dict[str, Any] = rng.choice(
        [
            {"a": {**entry([4], 0, 16), "code": "x"}},
            {"a": {"dtype": "F32", "shape": [4]}},
            {"__metadata__": {"x": 1}, "a": entry([4], 0, 16)},
            {"__metadata__": [], "a": entry([4], 0, 16)},
            {"a": {**entry([4], 0, 16), "data_offsets": [0, 16, 32]}},
            {"a": {**entry([4], 0, 16), "data_offsets": [0, -16]}},
            {"a": {**entry([4], 0, 16), "data_offsets": "0,16"}},
        ]
    )
    return file_of(list(wrong.items()), bytes(16))


def _unchecked_tensor(name: str, value: Any, begin: int, file: str) -> TensorInfo:
    start, end = value["data_offsets"]
    return TensorInfo(value["dtype"], tuple(value["shape"]), begin + start, begin + end)


FILES = Family(
    name="S7 safetensors",
    check=check,
    good=good,
    classes={
        "overlaps": overlap,
        "empty aliases": alias,
        "one key twice": twice,
        "enormous shapes": enormous,
        "negative shapes": negative,
        "gaps": gap,
        "truncated": truncated,
        "lengths of headers": long_header,
        "no headers": no_header,
        "dtypes": dtypes,
        "NaN and Inf": not_finite,
        "extra fields": extra,
    },
    guards={
        "one key once": Guard(safetensors_check, "_unique", dict, lets_in="one key twice"),
        "layout": Guard(safetensors_check, "_check_layout", lambda *_: None, lets_in="gaps"),
        "sizes": Guard(
            safetensors_check, "_check_size", lambda *_: None, lets_in="enormous shapes"
        ),
        "entries": Guard(safetensors_check, "_tensor", _unchecked_tensor, lets_in="extra fields"),
        "header limit": Guard(
            safetensors_check, "MAX_HEADER_BYTES", 2**30, lets_in="lengths of headers"
        ),
        "finite values": Guard(
            safetensors_check, "_is_finite", lambda *_: True, lets_in="NaN and Inf"
        ),
        "float types": Guard(
            safetensors_check,
            "FLOATS",
            frozenset(("I64", "U8", "I32", "BOOL", "F32")),
            lets_in="dtypes",
        ),
    },
    num_inputs=600,
)
