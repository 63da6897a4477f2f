"""Protobuf results as JSON, for callers that read no protobuf (wire protocol 4.3).

The one internal form of a result is protobuf; JSON is made at delivery and nowhere else.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier_core.proto import wire_pb2 as wire

FILLER_LOGPROB = -99999.0
_DTYPES = {wire.DTYPE_FLOAT32: ("<f4", "float32"), wire.DTYPE_INT64: ("<i8", "int64")}
_STOP_REASONS = {wire.STOP_REASON_STOP: "stop", wire.STOP_REASON_LENGTH: "length"}


def forward_backward_json(encoded: bytes) -> dict[str, Any]:
    """ForwardBackwardOutput -> {loss_fn_output_type, loss_fn_outputs: [{name: TensorData}], ..}"""
    output = wire.ForwardBackwardOutput.FromString(encoded)
    return {
        "loss_fn_output_type": output.loss_fn_output_type,
        "loss_fn_outputs": [
            datum for record in output.loss_fn_outputs for datum in _datums(record)
        ],
        "metrics": {name: _number(value) for name, value in output.metrics.items()},
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
            _number(value) for value in np.frombuffer(response.prompt_logprobs, "<f4").tolist()
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
                "data": [_number(value) for value in values.tolist()],
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
        logprobs = np.frombuffer(sequence.logprobs, "<f4").tolist()
        answer["logprobs"] = [_number(value) for value in logprobs]
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


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity: null stands for a number that is none."""
    return value if math.isfinite(value) else None
