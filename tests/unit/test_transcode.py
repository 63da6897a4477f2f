"""JSON and protobuf say the same: of a training request, and of results."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier_core.proto import wire_pb2 as wire
from luthier_core.transcode import forward_backward_json, forward_backward_message, result_json
from luthier_core.types import ForwardBackwardInput, check

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
INT64 = st.integers(-(2**63), 2**63 - 1)
TENSORS = st.one_of(
    st.lists(FLOAT32, max_size=5).map(lambda data: ("float32", "<f4", data)),
    st.lists(INT64, max_size=5).map(lambda data: ("int64", "<i8", data)),
)


def message_of(data: list[dict[str, Any]], **fields: Any) -> wire.ForwardBackwardRequest:
    given = {"data": data, "loss_fn": "cross_entropy", **fields}
    return forward_backward_message(
        check(ForwardBackwardInput, given), model_id="m", seq_id=3, forward_only=False
    )


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1)), max_size=3), TENSORS)
def test_tokens_and_tensors_keep_their_values(chunks: list[list[int]], tensor: Any):
    dtype, numpy_dtype, data = tensor
    sent = {
        "model_input": {"chunks": [{"tokens": tokens} for tokens in chunks]},
        "loss_fn_inputs": {"x": {"data": data, "dtype": dtype, "shape": [len(data)]}},
    }
    (datum,) = message_of(json.loads(json.dumps([sent]))).data
    tokens = [np.frombuffer(c.encoded_text.tokens, "<i4").tolist() for c in datum.model_input]
    assert tokens == chunks
    received = datum.loss_fn_inputs["x"]
    assert np.frombuffer(received.dense, numpy_dtype).tolist() == data
    assert list(received.shape) == [len(data)]


def test_whole_numbers_may_be_written_as_floats_and_floats_as_whole_numbers():
    inputs = {
        "i": {"data": [1.0, -2.0, 3], "dtype": "int64"},
        "f": {"data": [1, -2, 3], "dtype": "float32"},
    }
    (datum,) = message_of([{"model_input": {"chunks": []}, "loss_fn_inputs": inputs}]).data
    assert np.frombuffer(datum.loss_fn_inputs["i"].dense, "<i8").tolist() == [1, -2, 3]
    assert np.frombuffer(datum.loss_fn_inputs["f"].dense, "<f4").tolist() == [1, -2, 3]
    assert list(datum.loss_fn_inputs["i"].shape) == []  # none was given


def test_the_configuration_of_a_loss_is_in_both_maps_where_it_is_a_number():
    message = message_of([], loss_fn_config={"beta": 0.5, "loss_id": "x", "one": 1})
    assert dict(message.loss_fn_config) == {"beta": 0.5, "one": 1.0}
    texts = {name: value.text for name, value in message.loss_fn_config_v2.items() if value.text}
    assert texts == {"loss_id": "x"}
    assert message.loss_fn_config_v2["beta"].number == 0.5


def test_tensors_of_several_records_are_one_list_with_their_shapes():
    def record(rows: list[list[float]]) -> wire.ArrayRecord:
        values = np.array(rows, "<f4")
        tensor = wire.BatchedTensor(
            data=values.tobytes(),
            offsets=np.array([0, values.nbytes], "<i8").tobytes(),
            dtype=wire.DTYPE_FLOAT32,
            trailing_shape=[values.shape[1]],
        )
        return wire.ArrayRecord(num_datums=1, fields={"x": tensor})

    output = wire.ForwardBackwardOutput(loss_fn_outputs=[record([[1, 2], [3, 4]]), record([[5]])])
    told = forward_backward_json(output.SerializeToString())["loss_fn_outputs"]
    assert [datum["x"]["data"] for datum in told] == [[1, 2, 3, 4], [5]]
    assert [datum["x"]["shape"] for datum in told] == [[2, 2], [1, 1]]


def test_datums_without_outputs_are_counted():
    record = wire.ArrayRecord(num_datums=2)
    output = wire.ForwardBackwardOutput(loss_fn_outputs=[record, record])
    assert forward_backward_json(output.SerializeToString())["loss_fn_outputs"] == [{}] * 4


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.5])
def test_every_float_can_be_read_back(value: float):
    read = json.loads(result_json({"metrics": {"loss:sum": value}}))["metrics"]["loss:sum"]
    assert read == value or (math.isnan(read) and math.isnan(value))
