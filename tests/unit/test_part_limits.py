"""Bodies of nothing but parts are refused before they are parsed, and honest large ones are not."""

import json

import numpy as np
import pytest

from luthier_core.errors import Unreadable
from luthier_core.part_limits import SMALL_BYTES
from luthier_core.proto import wire_pb2 as wire
from luthier_core.types import read_object
from luthier_core.validation import parse_forward_backward


def field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    length, size = len(content), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


MANY = 200_000
TENSOR = field(2, field(1, b"x") + field(2, field(4, bytes(MANY * 2))))
PROTOBUF = {
    "datums": field(3, b"") * MANY,
    "chunks": field(3, field(1, b"") * MANY),
    "inputs": field(3, field(2, b"\x0a\x01x") * MANY),
    "a shape": field(3, TENSOR),
    "settings": field(5, b"") * MANY,
    "unknown numbers": b"\xf8\x01\x00" * MANY,
}


@pytest.mark.parametrize("body", PROTOBUF.values(), ids=PROTOBUF)
def test_a_body_of_parts_is_not_parsed(body: bytes) -> None:
    assert len(body) > SMALL_BYTES
    with pytest.raises(Unreadable, match="more than 131072 fields"):
        parse_forward_backward(body)


def test_a_large_request_is_parsed() -> None:
    values = np.zeros(2000, "<f4").tobytes()
    inputs = {
        name: wire.Tensor(dense=values, dtype=wire.DTYPE_FLOAT32, shape=[1000, 2])
        for name in ("target_tokens", "logprobs", "advantages", "mask", "weights")
    }
    text = wire.Chunk(encoded_text=wire.EncodedTextChunk(tokens=values))
    datum = wire.Datum(model_input=[text] * 4, loss_fn_inputs=inputs)
    request = wire.ForwardBackwardRequest(model_id="r", seq_id=1, data=[datum] * 1024)
    assert parse_forward_backward(request.SerializeToString()) == request


@pytest.mark.parametrize("part", ["{}", "[]"])
def test_json_of_parts_is_not_parsed(part: str) -> None:
    body = f'{{"x": [{",".join([part] * MANY)}]}}'.encode()
    with pytest.raises(Unreadable, match="more than 131072 objects and lists"):
        read_object(body)


def test_json_of_more_values_than_any_request_has_is_not_parsed() -> None:
    with pytest.raises(Unreadable, match="more than 8388608 values"):
        read_object(b'{"x": [' + b"1," * (8 * 1024 * 1024) + b"1]}")


def test_large_json_is_parsed() -> None:
    value = {"x": [list(range(1000))] * 1000}
    assert read_object(json.dumps(value).encode()) == value
