"""Training data and results as protobuf: encoding, chunks, and putting chunks together again."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from luthier import types
from luthier.errors import APIResponseValidationError
from luthier.types.results import LossFnOutput, TopkLogprobs
from luthier_core.proto import wire_pb2

_DTYPES: dict[types.TensorDtype, wire_pb2.DType] = {
    "float32": wire_pb2.DTYPE_FLOAT32,
    "int64": wire_pb2.DTYPE_INT64,
}
_NUMPY_DTYPES: dict[int, str] = {
    wire_pb2.DTYPE_FLOAT32: "<f4",
    wire_pb2.DTYPE_INT64: "<i8",
    wire_pb2.DTYPE_INT32: "<i4",
    wire_pb2.DTYPE_BFLOAT16: "<u2",
}
_MASK_64 = 2**64 - 1


# --- requests -------------------------------------------------------------------------------------


def loss_request(
    loss_fn: str, config: Mapping[str, float | str] | None, *, forward_only: bool
) -> wire_pb2.ForwardBackwardRequest:
    """A request without its data, its model_id and its seq_id."""
    request = wire_pb2.ForwardBackwardRequest(loss_fn=loss_fn, forward_only=forward_only)
    for name, value in (config or {}).items():
        if isinstance(value, str):
            request.loss_fn_config_v2[name].text = value
        else:
            request.loss_fn_config[name] = value
            request.loss_fn_config_v2[name].number = value
    return request


def split(
    data: Sequence[wire_pb2.Datum],
    request: wire_pb2.ForwardBackwardRequest,
    *,
    max_datums: int,
    max_bytes: int,
) -> list[wire_pb2.ForwardBackwardRequest]:
    """One call as one request or more, in the order of the data.

    Greedy: a chunk ends before the datum that would take it over max_datums or max_bytes. A single
    datum above max_bytes is a chunk of its own. No data at all is one empty request, which the
    server answers with what is wrong.
    """
    chunks: list[list[wire_pb2.Datum]] = [[]]
    num_bytes = 0
    for datum in data:
        size = datum.ByteSize()
        if chunks[-1] and (len(chunks[-1]) >= max_datums or num_bytes + size > max_bytes):
            chunks.append([])
            num_bytes = 0
        chunks[-1].append(datum)
        num_bytes += size
    requests = []
    for chunk in chunks:
        part = wire_pb2.ForwardBackwardRequest(data=chunk)
        part.MergeFrom(request)
        requests.append(part)
    return requests


def encode_datum(datum: types.Datum) -> wire_pb2.Datum:
    """A copy of everything in it: the caller may change its arrays afterwards."""
    message = wire_pb2.Datum(model_input=[_chunk(chunk) for chunk in datum.model_input.chunks])
    for name, tensor in datum.loss_fn_inputs.items():
        message.loss_fn_inputs[name].CopyFrom(_tensor(tensor))
    for span in datum.model_input_spans or ():
        message.model_input_spans.append(_span(span))
    for span in datum.loss_fn_input_spans or ():
        message.loss_fn_input_spans.append(_span(span))
    return message


def _chunk(chunk: types.ModelInputChunk) -> wire_pb2.Chunk:
    match chunk:
        case types.EncodedTextChunk():
            tokens = np.asarray(chunk.tokens, dtype="<i4").tobytes()
            return wire_pb2.Chunk(encoded_text=wire_pb2.EncodedTextChunk(tokens=tokens))
        case types.ImageChunk():
            image = wire_pb2.ImageChunk(
                data=chunk.data, format=chunk.format, expected_tokens=chunk.expected_tokens
            )
            return wire_pb2.Chunk(image=image)
        case types.DmelChunk():
            return wire_pb2.Chunk(dmel=wire_pb2.DmelChunk(dmel=chunk.dmel))
    raise ValueError(f"model_input: a chunk of type {chunk.type!r} cannot be trained on")


def _tensor(tensor: types.TensorData) -> wire_pb2.Tensor:
    little_endian = tensor.array.dtype.newbyteorder("<")
    values = tensor.array.astype(little_endian, copy=False).tobytes()
    message = wire_pb2.Tensor(dtype=_DTYPES[tensor.dtype], shape=tensor.shape)
    if tensor.sparse_crow_indices is None or tensor.sparse_col_indices is None:
        message.dense = values
    else:
        message.sparse_csr.values = values
        message.sparse_csr.crow_indices = np.asarray(tensor.sparse_crow_indices, "<i8").tobytes()
        message.sparse_csr.col_indices = np.asarray(tensor.sparse_col_indices, "<i8").tobytes()
    return message


def _span(
    span: types.PromptProvenanceSpan | types.SampledProvenanceSpan,
) -> wire_pb2.ProvenanceSpan:
    ids = {"sequence_id": span.sequence_id, "offset": span.offset, "length": span.length}
    if isinstance(span, types.PromptProvenanceSpan):
        return wire_pb2.ProvenanceSpan(prompt_tokens=wire_pb2.PromptProvenanceSpan(**ids))  # type: ignore[arg-type]
    return wire_pb2.ProvenanceSpan(sampled_tokens=wire_pb2.SampledProvenanceSpan(**ids))  # type: ignore[arg-type]


def json_chunk(chunk: types.ModelInputChunk) -> dict[str, Any]:
    """A chunk of a prompt, which travels as JSON."""
    if isinstance(chunk, types.EncodedTextChunk):
        return {"type": "encoded_text", "tokens": chunk.tokens}
    return chunk.model_dump(mode="json", exclude_none=True)


def json_tensor(tensor: types.TensorData) -> dict[str, Any]:
    """A tensor of a sampling request, which travels as JSON."""
    value: dict[str, Any] = {"data": tensor.data, "dtype": tensor.dtype, "shape": tensor.shape}
    if tensor.sparse_crow_indices is not None:
        value["sparse_crow_indices"] = tensor.sparse_crow_indices
        value["sparse_col_indices"] = tensor.sparse_col_indices
    return value


# --- results --------------------------------------------------------------------------------------


def decode_forward_backward(body: bytes) -> types.ForwardBackwardOutput:
    """The result of one chunk; APIResponseValidationError if it is none."""
    message = wire_pb2.ForwardBackwardOutput()
    _parse(message, body)
    return types.ForwardBackwardOutput(
        loss_fn_output_type=message.loss_fn_output_type.rpartition(":")[2] or "ArrayRecord",
        loss_fn_outputs=[
            output for record in message.loss_fn_outputs for output in _outputs(record)
        ],
        metrics=dict(message.metrics),
    )


def _parse(message: Message, body: bytes) -> None:
    try:
        message.ParseFromString(body)
    except DecodeError:
        kind = message.DESCRIPTOR.name
        raise APIResponseValidationError(f"no {kind} as protobuf: {body[:200]!r}") from None


def _outputs(record: wire_pb2.ArrayRecord) -> Iterator[LossFnOutput]:
    fields = {name: list(_split(batched)) for name, batched in record.fields.items()}
    for index in range(record.num_datums):
        yield {name: tensors[index] for name, tensors in fields.items()}


def _split(batched: wire_pb2.BatchedTensor) -> Iterator[types.TensorData]:
    """One tensor per datum: [elements / prod(trailing), *trailing]."""
    values = _array(batched.data, batched.dtype)
    item = np.dtype(_NUMPY_DTYPES[batched.dtype]).itemsize
    offsets = np.frombuffer(batched.offsets, "<i8") // item
    for first, last in pairwise(offsets.tolist()):
        part = values[first:last].reshape(-1, *batched.trailing_shape)
        yield types.TensorData.from_numpy(part)


def _array(data: bytes, dtype: int) -> NDArray[Any]:
    """Read-only values; bfloat16 widened to float32, int32 to int64."""
    values = np.frombuffer(data, _NUMPY_DTYPES[dtype])
    if dtype == wire_pb2.DTYPE_BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.int64) if dtype == wire_pb2.DTYPE_INT32 else values


def combine(outputs: Sequence[types.ForwardBackwardOutput]) -> types.ForwardBackwardOutput:
    """The chunks of one call as one result: outputs in order, metrics reduced by their suffix."""
    return types.ForwardBackwardOutput(
        loss_fn_output_type=outputs[0].loss_fn_output_type,
        loss_fn_outputs=[item for output in outputs for item in output.loss_fn_outputs],
        metrics=reduce_metrics(
            [output.metrics for output in outputs],
            [len(output.loss_fn_outputs) for output in outputs],
        ),
    )


def reduce_metrics(
    metrics: Sequence[Mapping[str, float]], num_datums: Sequence[int]
) -> dict[str, float]:
    """`name:reduction` over chunks; num_datums are the weights of a mean (wire protocol 5.5).

    A metric that is not in every chunk, or has an unknown reduction, is left out.
    """
    reduced: dict[str, float] = {}
    for key in metrics[0]:
        if not all(key in chunk for chunk in metrics):
            continue
        values = [chunk[key] for chunk in metrics]
        match key.rpartition(":")[2]:
            case "sum":
                reduced[key] = math.fsum(values)
            case "min":
                reduced[key] = min(values)
            case "max":
                reduced[key] = max(values)
            case "mean":
                reduced[key] = _weighted_mean(values, num_datums)
            case "slack":
                reduced[key] = max(values) - _weighted_mean(values, num_datums)
            case "hash2":
                reduced[key] = float(sum(int(value) & _MASK_64 for value in values) & _MASK_64)
            case "unique":
                reduced[key] = values[0]
                reduced |= {f"{key}_{n}": value for n, value in enumerate(values[1:], start=1)}
    return reduced


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    total = sum(weights)
    if total == 0:
        return math.fsum(values) / len(values)
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total


def decode_sample(body: bytes, sequence_ids: Sequence[str]) -> types.SampleResponse:
    """The result of a sampling request; APIResponseValidationError if sequences lack ids."""
    message = wire_pb2.SampleResponse()
    _parse(message, body)
    if len(sequence_ids) != len(message.sequences):
        raise APIResponseValidationError(
            f"sample_sequence_ids: {len(sequence_ids)} for {len(message.sequences)} sequences"
        )
    alternatives = message.prompt_alt_tokens
    return types.SampleResponse(
        sequences=[
            _sequence(sequence, sequence_id)
            for sequence, sequence_id in zip(message.sequences, sequence_ids, strict=True)
        ],
        prompt_logprobs_np=np.frombuffer(message.prompt_logprobs, "<f4")
        if message.prompt_logprobs
        else None,
        topk_prompt_logprobs_np=_topk(message.topk_prompt_logprobs)
        if message.HasField("topk_prompt_logprobs")
        else None,
        target_prompt_logprobs=_decode_tensor(message.target_prompt_logprobs)
        if message.HasField("target_prompt_logprobs")
        else None,
        prompt_alt_tokens=types.PromptAltTokens(
            _decode_tensor(alternatives.tokens), _decode_tensor(alternatives.logprobs)
        )
        if message.HasField("prompt_alt_tokens")
        else None,
        prompt_cache_hit_tokens=message.prompt_cache_hit_tokens,
    )


def _sequence(message: wire_pb2.SampledSequence, sequence_id: str) -> types.SampledSequence:
    return types.SampledSequence(
        stop_reason="length" if message.stop_reason == wire_pb2.STOP_REASON_LENGTH else "stop",
        sequence_id=sequence_id,
        tokens_np=np.frombuffer(message.tokens, "<i4"),
        logprobs_np=np.frombuffer(message.logprobs, "<f4") if message.logprobs else None,
        topk_logprobs_np=_topk(message.topk_sampled_logprobs)
        if message.HasField("topk_sampled_logprobs")
        else None,
    )


def _topk(message: wire_pb2.TopkLogprobs) -> TopkLogprobs:
    shape = (message.length, message.k)
    return TopkLogprobs(
        np.frombuffer(message.token_ids, "<i4").reshape(shape),
        np.frombuffer(message.logprobs, "<f4").reshape(shape),
    )


def _decode_tensor(message: wire_pb2.Tensor) -> types.TensorData:
    sparse = message.WhichOneof("encoding") == "sparse_csr"
    values = _array(message.sparse_csr.values if sparse else message.dense, message.dtype)
    shape = list(message.shape) or None
    if not sparse:
        return types.TensorData.from_numpy(values.reshape(shape or -1))
    return types.TensorData(
        values,
        "float32" if values.dtype.kind == "f" else "int64",
        shape,
        np.frombuffer(message.sparse_csr.crow_indices, "<i8").tolist(),
        np.frombuffer(message.sparse_csr.col_indices, "<i8").tolist(),
    )
