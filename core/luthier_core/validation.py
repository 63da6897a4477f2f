"""Checks one training or sampling request against the model's facts: numpy views, no torch.

The gateway calls it before a request is admitted, so that workers can trust the log. Every error is
an InvalidField whose message names the field and the allowed values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier_core.errors import InvalidField, Unreadable, Unsupported
from luthier_core.loss_graph import LOSS_FN, LossGraph, loss_graph
from luthier_core.losses import RATIO_MASK, LossSpec, loss_config, loss_spec
from luthier_core.part_limits import check_forward_backward_parts
from luthier_core.prompt_targets import PromptTargets
from luthier_core.proto import wire_pb2 as wire
from luthier_core.types import Sample

MAX_TARGET_CELLS = 2**24
"""Tokens of a request times its widest datum's targets: a CSR tensor of a few bytes can be any size
once it is dense, and it widens the datums that it is packed with."""

MAX_SCORE_CELLS = 2**22
"""Values that one sampling request may want of its prompt's positions, and as many of the tokens
that it samples: 32 MiB each in the answer."""

_DTYPES: Mapping[int, str] = {wire.DTYPE_FLOAT32: "<f4", wire.DTYPE_INT64: "<i8"}
_WANTED_DTYPE = {"target_tokens": wire.DTYPE_INT64}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What requests for one base model are checked against."""

    vocab_size: int
    max_context_tokens: int
    max_datums: int
    max_tokens_per_request: int
    max_num_samples: int
    custom_losses: bool = False
    """Whether uploaded losses are run."""


def parse_forward_backward(body: bytes) -> wire.ForwardBackwardRequest:
    """The protobuf request; Unreadable if the bytes are none, or have too many parts."""
    check_forward_backward_parts(body)
    request = wire.ForwardBackwardRequest()
    try:
        request.ParseFromString(body)
    except Exception:
        raise Unreadable("the body is not a ForwardBackwardRequest in protobuf") from None
    return request


def check_forward_backward(request: wire.ForwardBackwardRequest, limits: ModelLimits) -> int:
    """The number of input tokens; InvalidField or Unsupported if the request cannot be executed."""
    if request.loss_fn == LOSS_FN and limits.custom_losses:
        loss = LossSpec(inputs=())
        graph: LossGraph | None = loss_graph(request)
    else:
        loss, graph = loss_spec(request.loss_fn), None
        loss_config(request)
    if not request.data:
        raise InvalidField("data: empty; at least one datum is needed")
    if len(request.data) > limits.max_datums:
        raise InvalidField(f"data: {len(request.data)} datums; at most {limits.max_datums}")
    total = most_targets = 0
    for index, datum in enumerate(request.data):
        num_tokens, num_targets = _check_datum(datum, f"data[{index}]", loss, limits)
        if graph is not None:
            _check_graph_inputs(datum, f"data[{index}].loss_fn_inputs", graph, num_tokens)
        total += num_tokens
        most_targets = max(most_targets, num_targets)
    if total > limits.max_tokens_per_request:
        raise InvalidField(f"data: {total} tokens; at most {limits.max_tokens_per_request}")
    if total * most_targets > MAX_TARGET_CELLS:
        raise InvalidField(
            f"data: {total} tokens with up to {most_targets} targets each; the product may be at "
            f"most {MAX_TARGET_CELLS}"
        )
    return total


def check_sample(request: Sample, limits: ModelLimits) -> None:
    """InvalidField if the request cannot be sampled by a model of these limits."""
    tokens = np.asarray(request.prompt.to_ints(), dtype=object)
    if not len(tokens):
        raise InvalidField("prompt: empty; at least one token is needed")
    if len(tokens) > limits.max_context_tokens:
        raise InvalidField(
            f"prompt: {len(tokens)} tokens; the model's context has {limits.max_context_tokens}"
        )
    _check_token_ids(tokens, "prompt", limits.vocab_size)
    wanted = request.sampling_params.max_tokens or 0
    # One more than the context holds: the last token is sampled and never fed back, which is how
    # logprobs of a prompt of full length are asked for.
    if len(tokens) + wanted > limits.max_context_tokens + 1:
        raise InvalidField(
            f"sampling_params.max_tokens: {wanted} after a prompt of {len(tokens)} tokens; the "
            f"context has {limits.max_context_tokens}, so at most "
            f"{limits.max_context_tokens + 1 - len(tokens)}"
        )
    if request.num_samples > limits.max_num_samples:
        raise InvalidField(f"num_samples: {request.num_samples}; at most {limits.max_num_samples}")
    stop = request.sampling_params.stop
    if isinstance(stop, list) and stop and isinstance(stop[0], int):
        _check_token_ids(np.asarray(stop, dtype=object), "sampling_params.stop", limits.vocab_size)
    if stop == "" or (isinstance(stop, list) and "" in stop):
        raise InvalidField("sampling_params.stop: a stop string must not be empty")
    _check_scores(request, len(tokens), limits)


def _check_scores(request: Sample, num_tokens: int, limits: ModelLimits) -> None:
    """What the request wants to know of its prompt's positions, and how much that is in all."""
    last_n = request.prompt_logprobs_last_n
    if last_n is not None and not request.prompt_logprobs:
        raise InvalidField("prompt_logprobs_last_n: needs prompt_logprobs, which is false")
    if last_n is not None and last_n > num_tokens - 1:
        raise InvalidField(
            f"prompt_logprobs_last_n: {last_n}; must be from 1 to {num_tokens - 1}, one less than "
            "the prompt's tokens"
        )
    num_cells = num_tokens * (request.topk_prompt_logprobs + request.prompt_alt_tokens_k)
    if request.target_prompt_logprobs is not None:
        targets = PromptTargets.parse(request.target_prompt_logprobs, num_tokens)
        wanted = targets.tokens[targets.tokens != -1]
        _check_token_ids(wanted, "target_prompt_logprobs.data", limits.vocab_size)
        num_cells += len(targets.tokens)
    room = max(1, limits.max_context_tokens - num_tokens)
    num_new = min(request.sampling_params.max_tokens or room, room) * request.num_samples
    if num_new * request.topk_sample_logprobs > MAX_SCORE_CELLS:
        raise InvalidField(
            f"topk_sample_logprobs: {request.topk_sample_logprobs} for up to {num_new} new tokens; "
            f"the product may be at most {MAX_SCORE_CELLS}: set max_tokens"
        )
    if num_cells > MAX_SCORE_CELLS:
        raise InvalidField(
            f"topk_prompt_logprobs, prompt_alt_tokens_k, target_prompt_logprobs: {num_cells} "
            f"values for the prompt in all; at most {MAX_SCORE_CELLS}"
        )


def _check_datum(
    datum: wire.Datum, where: str, loss: LossSpec, limits: ModelLimits
) -> tuple[int, int]:
    """(tokens, targets per token)."""
    num_tokens = _check_model_input(datum, where, limits)
    needed = ("target_tokens", *loss.inputs)
    for name in needed:
        if name not in datum.loss_fn_inputs:
            raise InvalidField(f"{where}.loss_fn_inputs.{name}: missing; needed are {list(needed)}")
    target_field = f"{where}.loss_fn_inputs.target_tokens"
    target_shape = _shape(datum.loss_fn_inputs["target_tokens"], target_field)
    for name in (*needed, *(name for name in loss.token_inputs if name in datum.loss_fn_inputs)):
        field = f"{where}.loss_fn_inputs.{name}"
        tensor = datum.loss_fn_inputs[name]
        values, shape = _check_tensor(tensor, name, field)
        if shape[:1] != (num_tokens,) or len(shape) > 2 or 0 in shape:
            raise InvalidField(
                f"{field}: shape {list(shape)}; the model input has {num_tokens} tokens, so the "
                f"shape must be [{num_tokens}] or [{num_tokens}, K] with K at least 1"
            )
        if shape != target_shape:
            raise InvalidField(
                f"{field}: shape {list(shape)}; target_tokens has {list(target_shape)}"
            )
        if name == "target_tokens":
            _check_token_ids(values, field, limits.vocab_size)
        elif name in loss.token_inputs:
            _check_token_input(values, name, field)
    return num_tokens, prod(target_shape[1:])


def _check_graph_inputs(datum: wire.Datum, where: str, graph: LossGraph, num_tokens: int) -> None:
    """What an uploaded loss reads, in the shapes that it has declared."""
    names = ["target_tokens", *(known.name for known in graph.inputs[1:])]
    for name, known in zip(names, graph.inputs, strict=True):
        field = f"{where}.{name}"
        if name not in datum.loss_fn_inputs:
            raise InvalidField(f"{field}: missing; the loss reads {names}")
        values, shape = _check_tensor(datum.loss_fn_inputs[name], name, field)
        if known.rank == 0 and values.size == 1 and prod(shape) == 1:
            continue
        if len(shape) != known.rank or shape[:1] != (num_tokens,):
            raise InvalidField(
                f"{field}: shape {list(shape)}; the loss has declared rank {known.rank}, and the "
                f"model input has {num_tokens} tokens"
            )


def _check_token_input(values: NDArray[Any], name: str, field: str) -> None:
    if name == RATIO_MASK and not np.isin(values, (0, 1)).all():
        raise InvalidField(f"{field}: every value must be 0 or 1")
    if (values < 0).any():
        raise InvalidField(f"{field}: every value must be at least 0")


def _check_model_input(datum: wire.Datum, where: str, limits: ModelLimits) -> int:
    field = f"{where}.model_input"
    num_tokens = 0
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise Unsupported(f"{field}: chunk of type {kind!r}; supported is 'encoded_text'")
        if len(chunk.encoded_text.tokens) % 4:
            raise InvalidField(f"{field}: token bytes must be int32, a multiple of 4 bytes")
        tokens = np.frombuffer(chunk.encoded_text.tokens, dtype="<i4")
        _check_token_ids(tokens, field, limits.vocab_size)
        num_tokens += len(tokens)
    if num_tokens == 0:
        raise InvalidField(f"{field}: empty; at least one token is needed")
    if num_tokens > limits.max_context_tokens:
        raise InvalidField(
            f"{field}: {num_tokens} tokens; the model's context has {limits.max_context_tokens}"
        )
    return num_tokens


def _check_token_ids(tokens: NDArray[Any], field: str, vocab_size: int) -> None:
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if wrong.any():
        at = int(np.argmax(wrong.reshape(-1)))
        raise InvalidField(
            f"{field}: token id {tokens.reshape(-1)[at]} at position {at}; the vocabulary has ids "
            f"0 to {vocab_size - 1}"
        )


def _check_tensor(
    tensor: wire.Tensor, name: str, field: str
) -> tuple[NDArray[Any], tuple[int, ...]]:
    """The tensor's stored values and its dense shape, after checking dtype, sizes and values."""
    if tensor.dtype not in _DTYPES:
        raise InvalidField(f"{field}.dtype: {tensor.dtype}; must be FLOAT32 (1) or INT64 (2)")
    wanted = _WANTED_DTYPE.get(name)
    if wanted is not None and tensor.dtype != wanted:
        raise InvalidField(f"{field}.dtype: must be {wire.DType.Name(wanted)}")
    shape = _shape(tensor, field)
    values = _values(tensor, field)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        _check_csr(tensor.sparse_csr, len(values), shape, field)
    elif len(values) != prod(shape):
        raise InvalidField(f"{field}: {len(values)} values do not fill shape {list(shape)}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InvalidField(f"{field}: every value must be finite")
    return values, shape


def _values(tensor: wire.Tensor, field: str) -> NDArray[Any]:
    sparse = tensor.WhichOneof("encoding") == "sparse_csr"
    raw = tensor.sparse_csr.values if sparse else tensor.dense
    dtype = np.dtype(_DTYPES[tensor.dtype])
    if len(raw) % dtype.itemsize:
        raise InvalidField(f"{field}: {len(raw)} bytes are no whole number of {dtype.name}")
    return np.frombuffer(raw, dtype=dtype)


def _shape(tensor: wire.Tensor, field: str) -> tuple[int, ...]:
    """The dense shape; an empty one on the wire means 1-D."""
    shape = tuple(tensor.shape)
    if any(size < 0 for size in shape) or prod(shape) > 2**31:
        raise InvalidField(f"{field}.shape: {list(shape)} has a negative or enormous size")
    if shape or tensor.WhichOneof("encoding") == "sparse_csr":
        return shape
    itemsize = 4 if tensor.dtype == wire.DTYPE_FLOAT32 else 8
    return (len(tensor.dense) // itemsize,)


def _check_csr(csr: wire.SparseCsr, num_values: int, shape: tuple[int, ...], field: str) -> None:
    if len(shape) != 2:
        raise InvalidField(f"{field}.shape: {list(shape)}; a sparse tensor needs [rows, columns]")
    if len(csr.crow_indices) % 8 or len(csr.col_indices) % 8:
        raise InvalidField(f"{field}: CSR indices must be int64")
    rows = np.frombuffer(csr.crow_indices, dtype="<i8")
    columns = np.frombuffer(csr.col_indices, dtype="<i8")
    fits = (
        len(rows) == shape[0] + 1
        and len(columns) == num_values
        and rows[0] == 0
        and rows[-1] == num_values
        and bool((np.diff(rows) >= 0).all())
        and bool(((columns >= 0) & (columns < shape[1])).all())
    )
    if not fits:
        raise InvalidField(f"{field}: CSR indices do not describe a tensor of {list(shape)}")
