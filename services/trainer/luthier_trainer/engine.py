"""Runs training ops on the model: the only code of the trainer that computes.

One thread at a time. What crosses its boundary is bytes, names and numbers, never a tensor, so that
it can live in a process of its own.

An op that runs alone has bits that depend on the op and the run's own state only, not on the
neighbours, as long as the number of threads is the same. Ops that share a pass are computed as well
but for rounding: the order of a sum depends on what lies beside it.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from luthier_core.errors import BadRequest, NotFound
from luthier_model.base import BaseModel
from luthier_model.logprob_gap import logprob_gap
from luthier_model.lora import LoraShape, LoraSpec, init_adapter, target_modules
from luthier_model.peft_io import tensor_bytes, tensors_from
from luthier_trainer.adapters import RunState
from luthier_trainer.engine_host import STATE_FILE, PassOp
from luthier_trainer.optim import AdamParams
from luthier_trainer.packing import micro_batches
from luthier_trainer.passes import Part, Request, Scores, decode_request, encode_output, score
from luthier_trainer.residency import Residents

log = logging.getLogger(__name__)

MAX_MEAN_GAP = {torch.bfloat16: 0.03}
"""Of sampled logprobs to the forward's, in nats; about five times what is usual (docs/sampler.md).
Other dtypes keep the promise of 1e-5."""


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A PassOp, `index` among those that came with it."""

    index: int
    run_id: str
    request: Request
    backward: bool
    clock_cycle: int


Encode = Callable[[], dict[str, bytes]]
"""A copy in host memory: file name -> contents. Encoding takes a while, and needs no engine."""


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
        device_runs: int = 64,
        applies_nonfinite: bool = False,
    ) -> None:
        """`micro_batch_tokens`: tokens whose activations exist at once, at least one datum.

        `device_runs`: runs whose state is on the device at once; the others wait in host memory.
        With `applies_nonfinite`, a step with a gradient that is not finite is made.

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
        self._device_runs = device_runs
        self._applies_nonfinite = applies_nonfinite
        self._runs = Residents(device_runs, self._empty_state)

    def create(self, run_id: str, spec: LoraSpec) -> None:
        """A run in its initial state, instead of the one that has this id."""
        initial = init_adapter(spec, self._modules(spec), self._model.device)
        self._runs.add(run_id, spec, lambda run: run.set_weights(initial))

    def forward_backward(
        self, run_id: str, request: bytes, *, backward: bool, clock_cycle: int, halvings: int = 0
    ) -> bytes:
        """ForwardBackwardRequest -> ForwardBackwardOutput, both as protobuf bytes.

        With `backward`, the gradient of the loss is added to the run's; a loss that is not finite
        is returned as it is. BadRequest for an unknown loss or a missing input. `halvings` of the
        micro-batch take less memory, and add up the gradient in another order.
        """
        self._run(run_id)
        op = _Decoded(0, run_id, decode_request(request), backward, clock_cycle)
        return self._alone(op, halvings)

    def forward_backward_many(
        self, ops: Sequence[PassOp]
    ) -> Iterator[tuple[int, bytes | Exception]]:
        """(index, output or error) of each op, as soon as it is known; each op fails for itself.

        As many ops share a pass as `micro_batch_tokens` allows, which is what pays where they are
        small; a larger op has passes of its own.
        """
        decoded = []
        for index, op in enumerate(ops):
            try:
                if op.run_id not in self._runs:
                    raise NotFound(f"training run {op.run_id!r}")
                request = decode_request(op.request)
            except Exception as error:
                yield index, error
            else:
                decoded.append(_Decoded(index, op.run_id, request, op.backward, op.clock_cycle))
        for group in self._groups(decoded):
            yield from self._carry_out(group)

    def optim_step(self, run_id: str, params: AdamParams) -> dict[str, float]:
        """One AdamW update from the summed gradient, which is cleared; the step's metrics.

        Without a forward_backward since the last step the gradient is 0. BadRequest if its norm is
        not finite, unless that is to be applied: then weights, moments and step stay.
        """
        run = self._run(run_id)
        try:
            return run.optimizer.step(params)
        finally:
            run.clear_gradient()

    def optim_step_many(
        self, steps: Sequence[tuple[str, AdamParams]]
    ) -> Iterator[tuple[int, dict[str, float] | Exception]]:
        """(index, metrics or error) of each run's step; each fails for itself.

        One pass over each run's flat buffers, as many as that are: the bits are those of one alone.
        """
        for index, (run_id, params) in enumerate(steps):
            try:
                yield index, self.optim_step(run_id, params)
            except Exception as error:
                yield index, error

    def clear_gradient(self, run_id: str) -> None:
        self._run(run_id).clear_gradient()

    def save(self, run_id: str, *, optimizer: bool) -> dict[str, bytes]:
        """File name -> contents: PEFT's two files and, when asked, optimizer.safetensors."""
        return self.copy_files(run_id, optimizer=optimizer)()

    def copy_files(self, run_id: str, *, optimizer: bool) -> Encode:
        """`save` as of now in two steps: only this one, which copies, needs the engine."""
        copied = self._run(run_id).copy_files(optimizer=optimizer)
        return partial(copied.to_files, self._model.facts.name)

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

    def copy_state(self, run_id: str) -> Encode:
        """The whole state as it is now, as one file: later ops do not change the copy."""
        copied = self._runs.copy(run_id)
        return lambda: {STATE_FILE: tensor_bytes(copied)}

    def take_state(self, run_id: str, spec: LoraSpec, data: bytes) -> None:
        """Create the run in the state that such a file has; ValueError if that does not fit."""
        try:
            copied = tensors_from({STATE_FILE: data}, STATE_FILE)
        except BadRequest as error:
            raise ValueError(str(error)) from None
        self._runs.add(run_id, spec, lambda run: run.take(copied))

    def checksum(self, run_id: str) -> str:
        """Of the whole state, cheap enough for every op: see RunState.checksum."""
        return self._run(run_id).checksum()

    def drop(self, run_id: str) -> None:
        """Forget the run; nothing happens if it is not here."""
        self._runs.drop(run_id)

    def free_memory(self) -> None:
        """What can be done when the device has none left: only the next op's runs come back."""
        if self._model.device.type != "cpu":
            self._runs.page_out()
            torch.cuda.empty_cache()

    def has(self, run_id: str) -> bool:
        return run_id in self._runs

    @property
    def runs_on_device(self) -> Collection[str]:
        """The runs whose state is on the device; those that `has` knows beside them are not."""
        return self._runs.on_device

    def run_digest(self, run_id: str) -> str:
        """sha256 over weights, moments, gradient and step."""
        return self._run(run_id).digest()

    def _run(self, run_id: str) -> RunState:
        return self._runs.use([run_id])[0]

    def _modules(self, spec: LoraSpec) -> dict[str, LoraShape]:
        shapes = self._model.lora_shapes
        return {name: shapes[name] for name in target_modules(shapes, spec)}

    def _empty_state(self, spec: LoraSpec) -> RunState:
        return RunState(
            spec,
            self._modules(spec),
            self._model.device,
            self._model.compute_dtype,
            applies_nonfinite=self._applies_nonfinite,
        )

    def _groups(self, ops: Sequence[_Decoded]) -> Iterator[list[_Decoded]]:
        """Ops that share a pass. Forwards have their own: no backward goes through their rows."""
        for backward in (True, False):
            group: list[_Decoded] = []
            num_tokens = 0
            for op in (op for op in ops if op.backward == backward):
                too_long = num_tokens + op.request.num_tokens > self._micro_batch_tokens
                if group and (too_long or len(group) == self._device_runs):
                    yield group
                    group, num_tokens = [], 0
                group.append(op)
                num_tokens += op.request.num_tokens
            if group:
                yield group

    def _carry_out(self, group: Sequence[_Decoded]) -> Iterator[tuple[int, bytes | Exception]]:
        if len(group) > 1:
            try:
                outputs = self._together(group)
            except Exception:
                # One of them cannot be computed, or there is too little memory for all at once.
                log.warning("%d ops failed in one pass: one by one", len(group), exc_info=True)
            else:
                yield from zip((op.index for op in group), outputs, strict=True)
                return
        for op in group:
            try:
                yield op.index, self._alone(op, halvings=0)
            except Exception as error:
                yield op.index, error

    def _alone(self, op: _Decoded, halvings: int) -> bytes:
        """The op in micro-batches, a pure function of its request and of `halvings`."""
        max_tokens = self._micro_batch_tokens >> halvings
        run = self._run(op.run_id)
        scores: list[Scores] = []
        with run.atomic_gradient() if op.backward else nullcontext():
            for examples in micro_batches(op.request.examples, max_tokens):
                scores += self._score([Part(run.adapter, op.request, examples)], op.backward)
            return encode_output(op.request, scores, op.clock_cycle)

    def _together(self, group: Sequence[_Decoded]) -> list[bytes]:
        """All ops in one pass; if it fails, all gradients are as before."""
        run_ids = list(dict.fromkeys(op.run_id for op in group))
        runs = dict(zip(run_ids, self._runs.use(run_ids), strict=True))
        parts = [Part(runs[op.run_id].adapter, op.request, op.request.examples) for op in group]
        backward = group[0].backward
        with ExitStack() as stack:
            for run in runs.values() if backward else ():
                stack.enter_context(run.atomic_gradient())
            scores = self._score(parts, backward)
            return [
                encode_output(op.request, [part], op.clock_cycle)
                for op, part in zip(group, scores, strict=True)
            ]

    def _score(self, parts: Sequence[Part], backward: bool) -> list[Scores]:
        return score(
            self._model,
            parts,
            backward=backward,
            chunk_tokens=self._chunk_tokens,
            recompute=self._recompute,
        )
