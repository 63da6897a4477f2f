"""A request's datums as packed batches without padding, and per-token results back to each datum.

Dimensions: T packed tokens, K targets per position (1 when a datum's targets are 1-D).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier_core.errors import BadRequest
from luthier_core.losses import RATIO_MASK, LossSpec
from luthier_core.proto import wire_pb2

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One datum, decoded."""

    tokens: Array
    """int64 [T]"""
    targets: Array
    """int64 [T] or [T, K]"""
    loss_inputs: dict[str, Array]
    """Each with the shape of `targets`; float32, a setting float64."""
    graph_inputs: Sequence[Array] = ()
    """What an uploaded loss reads beside logprobs, of any shape."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Several examples end to end, as tensors on the model's device."""

    tokens_T: Tensor
    positions_T: Tensor
    lengths: list[int]
    targets_TK: Tensor
    """K is the largest of the batch; cells that a datum does not have are token 0 ..."""
    loss_inputs_TK: dict[str, Tensor]
    """... with loss input 0, so that they add nothing to a loss."""
    datum_T: Tensor
    """int64, each row's example as an index into `lengths`."""


def decode_datum(datum: wire_pb2.Datum, loss: LossSpec, config: Mapping[str, float]) -> Example:
    """The example in `datum` with all that `loss` reads; BadRequest names what is missing.

    A setting becomes an input too, the same at every target unless the datum brings its own.
    """
    chunks = [_decode_chunk(chunk) for chunk in datum.model_input]
    targets = _loss_input(datum, "target_tokens").astype(np.int64, copy=False)
    inputs: dict[str, Array] = {
        name: np.broadcast_to(np.float64(value), targets.shape) for name, value in config.items()
    }
    given = (*loss.inputs, *(name for name in loss.token_inputs if name in datum.loss_fn_inputs))
    for name in given:
        inputs[name] = _loss_input(datum, name).astype(np.float32, copy=False)
    if RATIO_MASK in loss.token_inputs and RATIO_MASK not in inputs:
        policy_target = is_policy_target(inputs["logprobs"], inputs["advantages"])
        inputs[RATIO_MASK] = policy_target.astype(np.float32)
    return Example(
        tokens=np.concatenate(chunks).astype(np.int64), targets=targets, loss_inputs=inputs
    )


def decode_any_inputs(datum: wire_pb2.Datum) -> tuple[Array, Array, dict[str, Array]]:
    """Tokens, targets and all loss inputs of a datum, as they come."""
    tokens = np.concatenate([_decode_chunk(chunk) for chunk in datum.model_input])
    targets = _loss_input(datum, "target_tokens").astype(np.int64, copy=False)
    inputs = {name: decode_tensor(tensor) for name, tensor in datum.loss_fn_inputs.items()}
    return tokens.astype(np.int64), targets, inputs


def is_policy_target(sampled_logprobs: Array, advantages: Array) -> Array:
    """False where a client padded with a logprob and an advantage of 0, as at prompt positions."""
    mask: Array = (sampled_logprobs != 0) | (advantages != 0)
    return mask


def micro_batches(examples: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """The examples in order, in groups of at most `max_tokens` tokens; a longer one is alone.

    A pure function of the request, so that a replay adds up in the same order.
    """
    group: list[Example] = []
    num_tokens = 0
    for example in examples:
        if group and num_tokens + len(example.tokens) > max_tokens:
            yield group
            group, num_tokens = [], 0
        group.append(example)
        num_tokens += len(example.tokens)
    if group:
        yield group


def pack(
    examples: Sequence[Example], device: torch.device, dtype: torch.dtype = torch.float32
) -> PackedBatch:
    """The examples end to end; `dtype` is that of the loss inputs."""
    lengths = [len(example.tokens) for example in examples]
    names = examples[0].loss_inputs
    return PackedBatch(
        tokens_T=_to_tensor(np.concatenate([e.tokens for e in examples]), device),
        positions_T=_to_tensor(np.concatenate([np.arange(n) for n in lengths]), device),
        lengths=lengths,
        targets_TK=_to_tensor(_stack([e.targets for e in examples]), device),
        loss_inputs_TK={
            name: _to_tensor(_stack([e.loss_inputs[name] for e in examples]), device).to(dtype)
            for name in names
        },
        datum_T=_to_tensor(np.repeat(np.arange(len(lengths)), lengths), device),
    )


def unpack(values_TK: Array, examples: Sequence[Example]) -> list[Array]:
    """Each example's rows of a packed result, in the shape of its targets."""
    ends = np.cumsum([len(example.tokens) for example in examples])
    parts = np.split(values_TK, ends[:-1])
    return [
        part[:, : _num_targets(example.targets)].reshape(example.targets.shape)
        for part, example in zip(parts, examples, strict=True)
    ]


def array_records(values: Sequence[Array]) -> list[wire_pb2.ArrayRecord]:
    """float32 arrays [T] or [T, K], one per datum, as field "logprobs".

    One record, or several in the datums' order where neighbours differ in K.
    """
    groups = groupby(values, key=lambda value: value.shape[1:])
    return [_array_record(list(group), shape) for shape, group in groups]


def _array_record(values: list[Array], trailing_shape: tuple[int, ...]) -> wire_pb2.ArrayRecord:
    offsets = np.cumsum([0, *(value.nbytes for value in values)], dtype="<i8")
    logprobs = wire_pb2.BatchedTensor(
        data=b"".join(value.astype("<f4", copy=False).tobytes() for value in values),
        offsets=offsets.tobytes(),
        dtype=wire_pb2.DTYPE_FLOAT32,
        trailing_shape=trailing_shape,
    )
    return wire_pb2.ArrayRecord(
        type_tag="ArrayRecord", fields={"logprobs": logprobs}, num_datums=len(values)
    )


def _decode_chunk(chunk: wire_pb2.Chunk) -> Array:
    if not chunk.HasField("encoded_text"):
        raise BadRequest(f"model_input: {chunk.WhichOneof('chunk')} chunks; allowed: encoded_text")
    return np.frombuffer(chunk.encoded_text.tokens, dtype="<i4")


def _loss_input(datum: wire_pb2.Datum, name: str) -> Array:
    if name not in datum.loss_fn_inputs:
        raise BadRequest(f"loss_fn_inputs: {name!r} is required")
    return decode_tensor(datum.loss_fn_inputs[name])


def decode_tensor(tensor: wire_pb2.Tensor) -> Array:
    """The dense array of a wire tensor; an empty shape means 1-D, CSR gaps are 0."""
    dtype = "<i8" if tensor.dtype == wire_pb2.DTYPE_INT64 else "<f4"
    if not tensor.HasField("sparse_csr"):
        values = np.frombuffer(tensor.dense, dtype=dtype)
        return values.reshape(tuple(tensor.shape)) if tensor.shape else values
    csr = tensor.sparse_csr
    row_ends = np.frombuffer(csr.crow_indices, dtype="<i8")
    columns = np.frombuffer(csr.col_indices, dtype="<i8")
    dense = np.zeros(tuple(tensor.shape), dtype=dtype)
    rows = np.repeat(np.arange(len(dense)), np.diff(row_ends))
    dense[rows, columns] = np.frombuffer(csr.values, dtype=dtype)
    return dense


def _num_targets(array: Array) -> int:
    return 1 if array.ndim == 1 else int(array.shape[1])


def _stack(arrays: Sequence[Array]) -> Array:
    """Arrays [T] or [T, K] under one another as [sum of T, largest K], filled with 0."""
    num_targets = max(_num_targets(array) for array in arrays)
    columns = [array.reshape(len(array), _num_targets(array)) for array in arrays]
    return np.concatenate([np.pad(c, ((0, 0), (0, num_targets - c.shape[1]))) for c in columns])


def _to_tensor(array: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
