"""How many parts a request body may have, counted before anything is built from it.

A part takes two bytes on the wire and a hundred in memory, and a body of nothing but parts
compresses a thousandfold: its size alone is no limit (reliability S4).
"""

from collections.abc import Mapping
from typing import TypeAlias

from luthier_core.errors import Unreadable

SMALL_BYTES = 256 * 1024
"""A body of that size is not looked at: it cannot have more parts than are allowed."""
MAX_PARTS = 128 * 1024
"""Fields of a protobuf body, or objects and lists of a JSON body. 1,024 datums have 50,000."""
MAX_JSON_VALUES = 8 * 1024 * 1024
"""Of a JSON body. A million tokens with six inputs each have seven million."""

Fields: TypeAlias = Mapping[int, "Fields"]
"""Numbers of a message's fields that are messages themselves."""
_TENSOR: Fields = {2: {}}
_SHAPE = 4
"""Field of a tensor with packed numbers."""
_SPAN: Fields = {}
_DATUM: Fields = {1: {1: {}, 2: {4: {}}, 3: {}}, 2: {2: _TENSOR}, 3: _SPAN, 4: _SPAN}
_FORWARD_BACKWARD: Fields = {3: _DATUM, 5: {}, 7: {2: {}}}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def check_forward_backward_parts(body: bytes) -> None:
    """Unreadable if a ForwardBackwardRequest has too many fields; nothing if it is none at all."""
    if len(body) <= SMALL_BYTES:
        return
    try:
        _count(body, _FORWARD_BACKWARD)
    except IndexError:  # damaged: the parser says so
        return


def check_json_parts(body: bytes) -> None:
    """Unreadable if there is more in a JSON body than any request has."""
    if len(body) <= SMALL_BYTES:
        return
    if body.count(b"{") + body.count(b"[") > MAX_PARTS:
        raise Unreadable(f"the JSON has more than {MAX_PARTS} objects and lists")
    if body.count(b",") >= MAX_JSON_VALUES:
        raise Unreadable(f"the JSON has more than {MAX_JSON_VALUES} values")


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position behind it); IndexError if none begins at `at`."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError("varint of more than ten bytes")


def _count(body: bytes, fields: Fields) -> None:
    todo = [(0, len(body), fields)]
    num_parts = 0
    while todo:
        at, end, inner = todo.pop()
        while at < end:
            # Nearly all are of one byte, and a call for each would take most of the time.
            tag, at = (body[at], at + 1) if body[at] < 0x80 else read_varint(body, at)
            number, wire_type = tag >> 3, tag & 7
            num_parts += 1
            if wire_type == _BYTES:
                length, at = (body[at], at + 1) if body[at] < 0x80 else read_varint(body, at)
                if number in inner:
                    todo.append((at, min(at + length, end), inner[number]))
                elif inner is _TENSOR and number == _SHAPE:
                    num_parts += length
                at += length
            elif wire_type == _VARINT:
                _, at = read_varint(body, at)
            elif wire_type in (_FIXED64, _FIXED32):
                at += 8 if wire_type == _FIXED64 else 4
            if num_parts > MAX_PARTS:
                raise Unreadable(f"the body has more than {MAX_PARTS} fields")
