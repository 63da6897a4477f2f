"""The ids at the head of a request too large to be read whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier_core.proto import wire_pb2
from luthier_gateway.proto_head import read_ids

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
