"""One forward, and backward, over the datums of one op or of several ops of any runs.

Dimensions: T packed tokens, D hidden size, K targets per position.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier_core.errors import BadRequest
from luthier_core.loss_graph import LOSS_FN, LossGraph, loss_graph
from luthier_core.losses import RATIO_MASK, loss_config, loss_spec
from luthier_core.proto import wire_pb2
from luthier_model.attention import PackedAttention
from luthier_model.base import BaseModel
from luthier_model.logprobs import clipped, target_logprobs, token_logprobs
from luthier_model.lora import LoraAdapter, Segment
from luthier_trainer.custom_loss import GraphLoss, graph_inputs
from luthier_trainer.loss_metrics import loss_metrics
from luthier_trainer.losses import Loss, loss_named
from luthier_trainer.packing import (
    Array,
    Example,
    PackedBatch,
    array_records,
    decode_any_inputs,
    decode_datum,
    pack,
    unpack,
)


@dataclass(frozen=True, slots=True)
class Request:
    """A ForwardBackwardRequest, decoded."""

    loss_fn: str
    loss: Loss | GraphLoss
    examples: list[Example]

    @property
    def num_tokens(self) -> int:
        return sum(len(example.tokens) for example in self.examples)


@dataclass(frozen=True, slots=True)
class Part:
    """What one op has in a pass: some of its examples, or all."""

    adapter: LoraAdapter
    request: Request
    examples: Sequence[Example]


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one part."""

    logprobs: list[Array]
    """Of the targets, one array per example in the targets' shape."""
    loss: float


def decode_request(request: bytes) -> Request:
    """BadRequest for an unknown loss or a missing input."""
    message = wire_pb2.ForwardBackwardRequest.FromString(request)
    if message.loss_fn == LOSS_FN:
        graph = loss_graph(message)
        examples = [_decode_for(graph, datum) for datum in message.data]
        return Request(message.loss_fn, GraphLoss(graph), examples)
    loss, spec = loss_named(message.loss_fn), loss_spec(message.loss_fn)
    config = loss_config(message)
    examples = [decode_datum(datum, spec, config) for datum in message.data]
    return Request(message.loss_fn, loss, examples)


def _decode_for(graph: LossGraph, datum: wire_pb2.Datum) -> Example:
    tokens, targets, arrays = decode_any_inputs(datum)
    if targets.ndim != graph.inputs[0].rank:
        raise BadRequest(f"target_tokens: the loss has declared rank {graph.inputs[0].rank}")
    if missing := {known.name for known in graph.inputs[1:]} - arrays.keys():
        raise BadRequest(f"loss_fn_inputs: {min(missing)!r} is required")
    return Example(tokens, targets, {}, graph_inputs(graph, arrays, len(tokens)))


def _metrics(request: Request, logprobs: Sequence[Array]) -> dict[str, float]:
    if isinstance(request.loss, GraphLoss):
        return request.loss.metrics(logprobs, request.examples)
    return loss_metrics(request.loss_fn, request.examples, logprobs)


def encode_output(request: Request, scores: Sequence[Scores], clock_cycle: int) -> bytes:
    """The ForwardBackwardOutput of the request, whose parts have these scores."""
    logprobs = [array for part in scores for array in part.logprobs]
    output = wire_pb2.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=array_records(logprobs),
        metrics={
            **_metrics(request, logprobs),
            "loss:sum": sum(part.loss for part in scores),
            "num_tokens:sum": float(request.num_tokens),
            "clock_cycle:unique": float(clock_cycle),
        },
    )
    encoded: bytes = output.SerializeToString()
    return encoded


@dataclass(frozen=True, slots=True)
class _Placed:
    """A part's rows [start, stop) among the packed tokens."""

    part: Part
    batch: PackedBatch
    start: int

    @property
    def stop(self) -> int:
        return self.start + len(self.batch.tokens_T)

    def losses(self, logprobs_TK: Tensor, start: int, stop: int) -> Tensor:
        """The summed loss of the part's rows among those in [start, stop) that are given."""
        loss = self.part.request.loss
        if isinstance(loss, GraphLoss):
            return loss.total(self._by_datum(logprobs_TK), self.part.examples)
        first, last = max(start, self.start), min(stop, self.stop)
        rows = slice(first - self.start, last - self.start)
        num_targets = self.batch.targets_TK.shape[1]
        inputs_TK = {name: values[rows] for name, values in self.batch.loss_inputs_TK.items()}
        return loss(
            logprobs_TK[first - start : last - start, :num_targets],
            inputs_TK,
            self.batch.datum_T[rows],
        ).sum()

    def _by_datum(self, logprobs_TK: Tensor) -> list[Tensor]:
        """Of all rows of the pass, the part's; each datum's in the shape of its targets."""
        rows = torch.split(logprobs_TK[self.start : self.stop], self.batch.lengths)
        targets = (example.targets for example in self.part.examples)
        return [
            row_TK[:, 0] if its.ndim == 1 else row_TK[:, : its.shape[1]]
            for row_TK, its in zip(rows, targets, strict=True)
        ]


def score(
    model: BaseModel,
    parts: Sequence[Part],
    *,
    backward: bool,
    chunk_tokens: int,
    recompute: bool,
) -> list[Scores]:
    """Each part's scores; with `backward`, its gradient is added to its adapter's.

    Logits of at most `chunk_tokens` rows exist at once.
    """
    placed = list(_place(parts, model))
    segments = [Segment(p.start, p.stop, p.part.adapter) for p in placed]
    attention = PackedAttention([n for p in placed for n in p.batch.lengths])
    with torch.set_grad_enabled(backward):
        hidden_TD = model.hidden(
            torch.cat([p.batch.tokens_T for p in placed]),
            torch.cat([p.batch.positions_T for p in placed]),
            attention,
            segments,
            recompute=recompute,
        )
        score_rows = _score_whole if any(map(_needs_whole_datums, parts)) else _score_in_chunks
        logprobs_TK, losses_N = score_rows(
            model, hidden_TD, placed, segments, chunk_tokens=chunk_tokens, backward=backward
        )
    logprobs = logprobs_TK.cpu().numpy()
    return [
        Scores(unpack(logprobs[p.start : p.stop], p.part.examples), loss)
        for p, loss in zip(placed, losses_N.tolist(), strict=True)
    ]


def _place(parts: Sequence[Part], model: BaseModel) -> Iterator[_Placed]:
    start = 0
    for part in parts:
        batch = pack(part.examples, model.device, model.compute_dtype)
        yield _Placed(part, batch, start)
        start += len(batch.tokens_T)


def _needs_whole_datums(part: Part) -> bool:
    """Whether a target's loss depends on the logprobs of its datum's other targets."""
    request = part.request
    if isinstance(request.loss, GraphLoss):
        return True
    return RATIO_MASK in loss_spec(request.loss_fn).token_inputs


def _targets(placed: Sequence[_Placed]) -> Tensor:
    """[T, largest K], filled up with token 0."""
    num_targets = max(p.batch.targets_TK.shape[1] for p in placed)
    targets = [p.batch.targets_TK for p in placed]
    return torch.cat([F.pad(t_TK, (0, num_targets - t_TK.shape[1])) for t_TK in targets])


def _score_in_chunks(
    model: BaseModel,
    hidden_TD: Tensor,
    placed: Sequence[_Placed],
    segments: Sequence[Segment],
    *,
    chunk_tokens: int,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Logprobs [T, K] and the loss of each part, without their graph.

    Each chunk goes back to its hidden states at once, so that no logits are computed twice.
    """
    start = 0
    logprobs, gradients = [], []
    losses_N = hidden_TD.new_zeros(len(placed), dtype=model.compute_dtype)
    through = backward and hidden_TD.requires_grad
    targets = torch.split(_targets(placed), chunk_tokens)
    for hidden, targets_TK in zip(torch.split(hidden_TD, chunk_tokens), targets, strict=True):
        stop = start + len(hidden)
        leaf = hidden.detach().requires_grad_(through)
        logprobs_TK = target_logprobs(model, leaf, targets_TK, clipped(segments, start, stop))
        here = [i for i, p in enumerate(placed) if p.start < stop and p.stop > start]
        losses = torch.stack([placed[i].losses(logprobs_TK, start, stop) for i in here])
        if backward:
            losses.sum().backward()  # type: ignore[no-untyped-call]
        for i, loss in zip(here, losses.detach(), strict=True):
            losses_N[i] += loss
        logprobs.append(logprobs_TK.detach())
        gradients.append(leaf.grad)
        start = stop
    if through:
        hidden_TD.backward(torch.cat(gradients))  # type: ignore[no-untyped-call, arg-type]
    return torch.cat(logprobs), losses_N


def _score_whole(
    model: BaseModel,
    hidden_TD: Tensor,
    placed: Sequence[_Placed],
    segments: Sequence[Segment],
    *,
    chunk_tokens: int,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """As _score_in_chunks, for losses that need all logprobs before the first gradient."""
    logprobs_TK = token_logprobs(
        model, hidden_TD, _targets(placed), segments, chunk_tokens=chunk_tokens
    )
    losses_N = torch.stack([p.losses(logprobs_TK, 0, len(hidden_TD)) for p in placed])
    if backward:
        losses_N.sum().backward()  # type: ignore[no-untyped-call]
    return logprobs_TK.detach(), losses_N.detach()
