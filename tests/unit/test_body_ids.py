"""The ids of a request whose body cannot be read as a whole."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier_core.proto import wire_pb2
from luthier_gateway.body_ids import read_json_ids
from luthier_gateway.body_ids import read_protobuf_ids as read_ids

RUN_IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)
SEQS = st.integers(1, 2**31 - 1)


@settings(deadline=None, derandomize=True)
@given(RUN_IDS, SEQS, st.integers(0, 50))
def test_the_ids_are_read_from_the_head_alone(run_id: str, seq: int, num_datums: int):
    message = wire_pb2.ForwardBackwardRequest(
        model_id=run_id, seq_id=seq, data=[wire_pb2.Datum()] * num_datums, loss_fn="cross_entropy"
    )
    ids = wire_pb2.ForwardBackwardRequest(model_id=run_id, seq_id=seq).SerializeToString()
    assert read_ids(message.SerializeToString()) == (run_id, seq)
    assert read_ids(ids) == (run_id, seq)


@settings(deadline=None, derandomize=True)
@given(RUN_IDS, SEQS, st.data())
def test_a_head_that_ends_within_the_ids_has_none(run_id: str, seq: int, data: st.DataObject):
    ids = wire_pb2.ForwardBackwardRequest(model_id=run_id, seq_id=seq).SerializeToString()
    assert read_ids(ids[: data.draw(st.integers(0, len(ids) - 1))]) is None


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b'{"model_id": "r", "seq_id": 1}',
        wire_pb2.ForwardBackwardRequest(seq_id=1).SerializeToString(),
        wire_pb2.ForwardBackwardRequest(model_id="r").SerializeToString(),
        wire_pb2.ForwardBackwardRequest(model_id="r", seq_id=-1).SerializeToString(),
        b"\x0a\x01r\x10\x00",  # seq 0 means unset
        b"\x0a\x01r\x10" + b"\xff" * 20,  # a number that never ends
        b"\x0a" + b"\x80" * 20,
        b"\x0a\x02\xff\xfe\x10\x01",  # a name that is no UTF-8
    ],
)
def test_a_head_without_usable_ids_has_none(head: bytes):
    assert read_ids(head) is None


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.binary(max_size=40))
def test_arbitrary_bytes_raise_nothing(head: bytes):
    ids = read_ids(head)
    assert ids is None or 1 <= ids[1] < 2**31


# --- JSON -----------------------------------------------------------------------------------------

IDS = {"model_id": "s:train:0", "seq_id": 7}
NESTED: dict[str, Any] = {"x": {"model_id": "other", "seq_id": 9, "y": [{"seq_id": 8}]}}


def json_ids(value: object, head: int = 1000, tail: int = 200) -> tuple[str, int] | None:
    text = json.dumps(value).encode()
    return read_json_ids(text[:head], text[-tail:])


@pytest.mark.parametrize(
    "body",
    [
        {**IDS, **NESTED},
        {**NESTED, **IDS},
        {"model_id": IDS["model_id"], **NESTED, "seq_id": 7},
        {**NESTED, **IDS, "type": "forward_backward", "a": None, "b": True, "c": -1},
        {"type": "optim_step", **IDS, "adam_params": {"learning_rate": 1}},
    ],
)
def test_ids_at_either_end_of_a_json_object_are_its_own(body: dict[str, Any]):
    assert json_ids(body) == ("s:train:0", 7)


@pytest.mark.parametrize(
    "body",
    [
        NESTED,
        [IDS],
        {**NESTED, "model_id": "r"},
        {**NESTED, "model_id": "r", "seq_id": 0},
        {**NESTED, "model_id": "r", "seq_id": 2**31},
        {**NESTED, "model_id": "r", "seq_id": True},
        {**NESTED, "model_id": "r", "seq_id": "7"},
        {**NESTED, "model_id": 5, "seq_id": 7},
        {**NESTED, "text": ',"model_id":"r","seq_id":7}'},
        {"first": [1], **IDS, "last": {}},  # between values that are not looked into
    ],
)
def test_nested_and_unusable_ids_are_none(body: object):
    assert json_ids(body) is None


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.binary(max_size=40), st.binary(max_size=40))
def test_arbitrary_ends_raise_nothing(head: bytes, tail: bytes):
    for start, end in ((head, tail), (b'{"model_id":"m",' + head, tail + b',"seq_id":1}')):
        ids = read_json_ids(start, end)
        assert ids is None or 1 <= ids[1] < 2**31
