"""Between JSON and protobuf, for clients that speak JSON (wire protocol 2.4 and 4.3).

The one internal form of training requests and of results is protobuf: JSON becomes it at the edge,
and it becomes JSON at delivery and nowhere else.
"""

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from luthier_core.errors import InvalidField
from luthier_core.proto import wire_pb2 as wire
from luthier_core.types import Datum, ForwardBackwardInput, TensorData

FILLER_LOGPROB = -99999.0
_DTYPES = {wire.DTYPE_FLOAT32: ("<f4", "float32"), wire.DTYPE_INT64: ("<i8", "int64")}
_SENT_AS = {
    "float32": wire.DTYPE_FLOAT32,
    "float64": wire.DTYPE_FLOAT32,
    "bool": wire.DTYPE_FLOAT32,
    "int64": wire.DTYPE_INT64,
    "int32": wire.DTYPE_INT64,
}
"""The SDK has two dtypes; what other clients name is one of them. A mask is a weight of 0 or 1."""
_STOP_REASONS = {wire.STOP_REASON_STOP: "stop", wire.STOP_REASON_LENGTH: "length"}


# --- requests -------------------------------------------------------------------------------------


def forward_backward_message(
    wanted: ForwardBackwardInput, *, model_id: str, seq_id: int, forward_only: bool
) -> wire.ForwardBackwardRequest:
    """The request as SDKs from 0.25.0 on send it; InvalidField names the tensor that cannot be."""
    message = wire.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, loss_fn=wanted.loss_fn, forward_only=forward_only
    )
    for index, datum in enumerate(wanted.data):
        message.data.append(_datum_message(datum, f"data[{index}]"))
    for name, value in wanted.loss_fn_config.items():
        if isinstance(value, str):
            message.loss_fn_config_v2[name].text = value
        else:
            message.loss_fn_config[name] = message.loss_fn_config_v2[name].number = value
    return message


def _datum_message(datum: Datum, where: str) -> wire.Datum:
    message = wire.Datum()
    for chunk in datum.model_input.chunks:
        tokens = _int_bytes(chunk.tokens, "<i4", f"{where}.model_input")
        message.model_input.add().encoded_text.tokens = tokens
    for name, tensor in datum.loss_fn_inputs.items():
        filled = _tensor_message(tensor, f"{where}.loss_fn_inputs.{name}")
        message.loss_fn_inputs[name].CopyFrom(filled)
    return message


def _tensor_message(tensor: TensorData, where: str) -> wire.Tensor:
    dtype = _SENT_AS[tensor.dtype]
    message = wire.Tensor(dtype=dtype, shape=tensor.shape)
    if dtype == wire.DTYPE_INT64:
        values = _int_bytes(tensor.data, "<i8", f"{where}.data")
    else:
        values = _float_bytes(tensor.data, "<f4", f"{where}.data")
    if tensor.sparse_crow_indices is None or tensor.sparse_col_indices is None:
        message.dense = values
        return message
    message.sparse_csr.values = values
    message.sparse_csr.crow_indices = _int_bytes(
        tensor.sparse_crow_indices, "<i8", f"{where}.sparse_crow_indices"
    )
    message.sparse_csr.col_indices = _int_bytes(
        tensor.sparse_col_indices, "<i8", f"{where}.sparse_col_indices"
    )
    return message


def _int_bytes(values: list[Any], dtype: str, where: str) -> bytes:
    """Whole numbers; Python clients send some of them as 3.0."""
    numbers = _check_numbers(values, where)
    try:
        if float in numbers:
            values = [int(value) if value == math.floor(value) else value for value in values]
            if any(type(value) is float for value in values):
                raise InvalidField(f"{where}: every value must be a whole number")
        return np.asarray(values, dtype=dtype).tobytes()
    except OverflowError:
        raise InvalidField(f"{where}: a value does not fit {np.dtype(dtype).name}") from None


def _float_bytes(values: list[Any], dtype: str, where: str) -> bytes:
    """Beyond float32 is infinity here, which the request's check refuses."""
    _check_numbers(values, where)
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype="<f8").astype(dtype).tobytes()


def _check_numbers(values: list[Any], where: str) -> set[type]:
    # Types first: an array of strings is as wide as the longest of them.
    types = set(map(type, values))
    if not types <= {int, float, bool}:
        wrong = next(value for value in values if type(value) not in (int, float, bool))
        raise InvalidField(f"{where}: must be a flat list of numbers, got {type(wrong).__name__}")
    return types


# --- results --------------------------------------------------------------------------------------


def result_json(result: dict[str, Any]) -> bytes:
    """The bytes of a result. A number that is none goes as NaN or Infinity, as Python reads it.

    Old SDKs want a number where a loss has overflowed; null would fail their validation.
    """
    encoded = orjson.dumps(result)
    # orjson writes null for it, and is many times as fast as what can write it.
    return json.dumps(result, separators=(",", ":")).encode() if b"null" in encoded else encoded


def forward_backward_json(encoded: bytes) -> dict[str, Any]:
    """ForwardBackwardOutput -> {loss_fn_output_type, loss_fn_outputs: [{name: TensorData}], ..}"""
    output = wire.ForwardBackwardOutput.FromString(encoded)
    return {
        "loss_fn_output_type": output.loss_fn_output_type,
        "loss_fn_outputs": [
            datum for record in output.loss_fn_outputs for datum in _datums(record)
        ],
        "metrics": dict(output.metrics),
    }


def sample_json(encoded: bytes) -> dict[str, Any]:
    """SampleResponse -> {sequences: [{stop_reason, tokens, logprobs}], prompt_logprobs?, ...}."""
    response = wire.SampleResponse.FromString(encoded)
    answer: dict[str, Any] = {
        "type": "sample",
        "sequences": [_sequence(sequence) for sequence in response.sequences],
        "prompt_cache_hit_tokens": response.prompt_cache_hit_tokens,
    }
    if response.prompt_logprobs:
        answer["prompt_logprobs"] = [
            value if math.isfinite(value) else None
            for value in np.frombuffer(response.prompt_logprobs, "<f4").tolist()
        ]
    if response.HasField("topk_prompt_logprobs"):
        answer["topk_prompt_logprobs"] = _topk(response.topk_prompt_logprobs)
    return answer


def _datums(record: wire.ArrayRecord) -> list[dict[str, Any]]:
    datums: list[dict[str, Any]] = [{} for _ in range(record.num_datums)]
    for name, batched in record.fields.items():
        dtype, dtype_name = _DTYPES[batched.dtype]
        offsets = np.frombuffer(batched.offsets, "<i8").tolist()
        for index, (start, stop) in enumerate(pairwise(offsets)):
            values = np.frombuffer(batched.data[start:stop], dtype)
            shape = [-1, *batched.trailing_shape]
            datums[index][name] = {
                "data": values.tolist(),
                "dtype": dtype_name,
                "shape": list(values.reshape(shape).shape),
            }
    return datums


def _sequence(sequence: wire.SampledSequence) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "stop_reason": _STOP_REASONS[sequence.stop_reason],
        "tokens": np.frombuffer(sequence.tokens, "<i4").tolist(),
    }
    if sequence.logprobs:
        answer["logprobs"] = np.frombuffer(sequence.logprobs, "<f4").tolist()
    if sequence.HasField("topk_sampled_logprobs"):
        answer["topk_logprobs"] = _topk(sequence.topk_sampled_logprobs)
    return answer


def _topk(table: wire.TopkLogprobs) -> list[list[tuple[int, float]] | None]:
    """One row per position; None for a row that begins with the filler."""
    shape = (table.length, table.k)
    tokens: NDArray[Any] = np.frombuffer(table.token_ids, "<i4").reshape(shape)
    logprobs: NDArray[Any] = np.frombuffer(table.logprobs, "<f4").reshape(shape)
    rows: list[list[tuple[int, float]] | None] = []
    for row_tokens, row_logprobs in zip(tokens.tolist(), logprobs.tolist(), strict=True):
        pairs = zip(row_tokens, row_logprobs, strict=True)
        row = [(token, value) for token, value in pairs if value > FILLER_LOGPROB]
        rows.append(row or None)
    return rows
