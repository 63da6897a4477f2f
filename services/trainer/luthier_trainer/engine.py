"""Runs training ops on the model: the only code of the trainer that computes.

One thread at a time. What crosses its boundary is bytes, names and numbers, never a tensor, so that
it can live in a process of its own. Each op runs alone: its bits depend on the op and the run's own
state only, not on the neighbours, as long as the number of threads is the same.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from luthier_core.errors import BadRequest, NotFound
from luthier_core.losses import loss_config, loss_spec
from luthier_core.proto import wire_pb2
from luthier_model.attention import PackedAttention
from luthier_model.base import BaseModel
from luthier_model.logprob_gap import logprob_gap
from luthier_model.logprobs import token_logprobs
from luthier_model.lora import LoraSpec, Segment, init_adapter, target_modules
from luthier_model.peft_io import tensor_bytes, tensors_from
from luthier_trainer.adapters import RunState
from luthier_trainer.loss_metrics import loss_metrics
from luthier_trainer.losses import Loss, loss_named
from luthier_trainer.optim import AdamParams
from luthier_trainer.packing import (
    Array,
    Example,
    array_records,
    decode_datum,
    micro_batches,
    pack,
    unpack,
)

MAX_MEAN_GAP = {torch.bfloat16: 0.03}
"""Of sampled logprobs to the forward's, in nats; about five times what is usual (docs/sampler.md).
Other dtypes keep the promise of 1e-5."""


class StateCopy:
    """One run's state in host memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def to_bytes(self) -> bytes:
        """A safetensors file; this takes a while, and needs no engine."""
        return tensor_bytes(self._tensors)


class Engine:
    """Training runs on one frozen base model.

    Every method that takes a run_id raises NotFound for a run that is not here. An op that raises
    leaves the run's state as it was, but for a gradient that is not finite (see optim_step).
    """

    def __init__(
        self,
        model: BaseModel,
        *,
        logprob_chunk_tokens: int,
        num_threads: int,
        micro_batch_tokens: int = 4096,
        recompute: bool | None = None,
    ) -> None:
        """`micro_batch_tokens`: tokens whose activations exist at once, at least one datum.

        Another number adds up a gradient in another order, so a run's bits depend on it; they do
        not depend on `recompute`, which trades a second forward for the layers' activations. None
        is where it pays: on a GPU, where 4096 tokens of an 8 B model would hold tens of GB.
        """
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(True)
        # Filling new memory with NaN finds bugs in torch, not in us, and costs a pass over it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self._model = model
        self._chunk_tokens = logprob_chunk_tokens
        self._micro_batch_tokens = micro_batch_tokens
        self._recompute = model.device.type == "cuda" if recompute is None else recompute
        self._runs: dict[str, RunState] = {}

    def create(self, run_id: str, spec: LoraSpec) -> None:
        """A run in its initial state, instead of the one that has this id."""
        shapes = self._model.lora_shapes
        modules = {name: shapes[name] for name in target_modules(shapes, spec)}
        self._runs[run_id] = RunState(
            init_adapter(spec, modules, self._model.device), self._model.compute_dtype
        )

    def forward_backward(
        self, run_id: str, request: bytes, *, backward: bool, clock_cycle: int, halvings: int = 0
    ) -> bytes:
        """ForwardBackwardRequest -> ForwardBackwardOutput, both as protobuf bytes.

        With `backward`, the gradient of the loss is added to the run's; a loss that is not finite
        is returned as it is. BadRequest for an unknown loss or a missing input. `halvings` of the
        micro-batch take less memory, and add up the gradient in another order.
        """
        run = self._run(run_id)
        message = wire_pb2.ForwardBackwardRequest.FromString(request)
        loss, spec = loss_named(message.loss_fn), loss_spec(message.loss_fn)
        config = loss_config(message)
        examples = [decode_datum(datum, spec, config) for datum in message.data]
        logprobs: list[Array] = []
        total = 0.0
        with run.atomic_gradient() if backward else nullcontext(), torch.set_grad_enabled(backward):
            for batch in micro_batches(examples, self._micro_batch_tokens >> halvings):
                batch_logprobs_TK, batch_loss = self._score(run, batch, loss)
                if backward:
                    batch_loss.backward()  # type: ignore[no-untyped-call]
                logprobs += unpack(batch_logprobs_TK.detach().cpu().numpy(), batch)
                total += batch_loss.item()
        output = wire_pb2.ForwardBackwardOutput(
            loss_fn_output_type="ArrayRecord",
            loss_fn_outputs=array_records(logprobs),
            metrics={
                **loss_metrics(message.loss_fn, examples, logprobs),
                "loss:sum": total,
                "num_tokens:sum": float(sum(len(example.tokens) for example in examples)),
                "clock_cycle:unique": float(clock_cycle),
            },
        )
        encoded: bytes = output.SerializeToString()
        return encoded

    def optim_step(self, run_id: str, params: AdamParams) -> dict[str, float]:
        """One AdamW update from the summed gradient, which is cleared; the step's metrics.

        Without a forward_backward since the last step the gradient is 0. BadRequest if its norm is
        not finite: then weights, moments and step stay, and the gradient is cleared.
        """
        run = self._run(run_id)
        try:
            return run.optimizer.step(params)
        finally:
            run.clear_gradient()

    def clear_gradient(self, run_id: str) -> None:
        self._run(run_id).clear_gradient()

    def save(self, run_id: str, *, optimizer: bool) -> dict[str, bytes]:
        """File name -> contents: PEFT's two files and, when asked, optimizer.safetensors."""
        return self._run(run_id).files(self._model.facts.name, optimizer=optimizer)

    def logprob_gap(self, run_id: str) -> dict[str, float]:
        """How far logprobs that a sampler draws from the run's weights are from forward's.

        logprob_gap:max, :mean, and :alarm, which is 1 if the mean is too large or not a number.
        """
        gap = logprob_gap(self._model, self._run(run_id).adapter)
        alarm = not gap.mean <= MAX_MEAN_GAP.get(self._model.dtype, 1e-5)
        return {
            "logprob_gap:max": gap.max,
            "logprob_gap:mean": gap.mean,
            "logprob_gap:alarm": float(alarm),
        }

    def load(self, run_id: str, files: Mapping[str, bytes], *, optimizer: bool) -> None:
        """Replace the run's weights by those in `files`, and moments and step or else start anew.

        Clears the gradient. BadRequest, naming both, for a checkpoint of other rank or targets.
        """
        self._run(run_id).restore(files, self._model.lora_shapes, optimizer=optimizer)

    def copy_state(self, run_id: str) -> StateCopy:
        """The whole state as it is now: later ops do not change the copy."""
        return StateCopy(self._run(run_id).copy())

    def take_state(self, run_id: str, spec: LoraSpec, data: bytes) -> None:
        """Create the run in the state that a StateCopy has; ValueError if that does not fit."""
        try:
            copied = tensors_from({"state": data}, "state")
        except BadRequest as error:
            raise ValueError(str(error)) from None
        self.create(run_id, spec)
        self._run(run_id).take(copied)

    def checksum(self, run_id: str) -> str:
        """Of the whole state, cheap enough for every op: see RunState.checksum."""
        return self._run(run_id).checksum()

    def drop(self, run_id: str) -> None:
        """Forget the run; nothing happens if it is not here."""
        self._runs.pop(run_id, None)

    def has(self, run_id: str) -> bool:
        return run_id in self._runs

    def run_digest(self, run_id: str) -> str:
        """sha256 over weights, moments, gradient and step."""
        return self._run(run_id).digest()

    def _run(self, run_id: str) -> RunState:
        if run_id not in self._runs:
            raise NotFound(f"training run {run_id!r}")
        return self._runs[run_id]

    def _score(
        self, run: RunState, examples: Sequence[Example], loss: Loss
    ) -> tuple[Tensor, Tensor]:
        """Logprobs [T, K] of the targets, and the loss, of one packed micro-batch."""
        batch = pack(examples, self._model.device, self._model.compute_dtype)
        segments = [Segment(0, len(batch.tokens_T), run.adapter)]
        attention = PackedAttention(batch.lengths)
        hidden_TD = self._model.hidden(
            batch.tokens_T, batch.positions_T, attention, segments, recompute=self._recompute
        )
        logprobs_TK = token_logprobs(
            self._model, hidden_TD, batch.targets_TK, segments, chunk_tokens=self._chunk_tokens
        )
        return logprobs_TK, loss(logprobs_TK, batch.loss_inputs_TK, batch.datum_T).sum()
