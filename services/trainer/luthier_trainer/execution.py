"""Carries out one op: payload in, engine call, outcome bytes out."""

import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from luthier_core import keys
from luthier_core.blobs import Blobs, outlasting_outage
from luthier_core.checkpoints import TinkerPath, read_files, save_checkpoint, save_sampler
from luthier_core.failpoints import failpoint
from luthier_core.oplog import Oplog
from luthier_core.ops import INLINE_LIMIT, Body, Kind, Op, Outcome
from luthier_core.owner import Measure
from luthier_core.proto import wire_pb2
from luthier_core.records import CheckpointKind, CheckpointRecord, RunRecord, SamplerRecord
from luthier_core.types import (
    OptimStep,
    SaveWeights,
    SaveWeightsExternal,
    SaveWeightsForSampler,
)
from luthier_trainer.engine_client import EngineClient
from luthier_trainer.engine_host import PassOp
from luthier_trainer.gathering import Gathering
from luthier_trainer.observing import note_forward

log = logging.getLogger(__name__)

GAP_PAUSE_S = 60.0
"""Between two measurements of a run's `logprob_gap`: it waits for 13 forwards each time, and who
saves for the sampler at every step must not pay them at every step."""

RECOVERY_SEQS = 2**40
"""From here on no op has a seq: manifests of recovery checkpoints cannot be taken for an op's."""

MAX_DEVIATION = {"float32": 1e-3, "bfloat16": 0.05}
"""Of a loss or gradient norm of an op that is replayed alone, having shared its passes before."""

Finish = Callable[[], Awaitable[Outcome]]
"""The rest of an op that no longer needs the engine: upload, then the outcome."""


@dataclass(slots=True)
class RunContext:
    """What the ops of one run need to know beside their own body."""

    run_id: str
    tenant: str
    epoch: int = 0
    """Of the tenure; known once the run has been taken over."""
    record: RunRecord | None = None
    """Known once op 0 has been executed."""
    halvings: dict[int, int] = field(default_factory=dict)
    """seq -> how often its micro-batch is halved, where the engine had no memory for the whole."""
    alone: bool = False
    """Its ops share no engine call: it is rebuilt, short of memory, or may have killed the last."""
    measure: Measure = Measure()  # noqa: RUF009  (frozen)
    """Of the op that was executed last, where it may be compared: in `fused` and in a replay."""
    gap_due: float = -math.inf
    """When `logprob_gap` is measured again, on time.monotonic's clock."""


class Executor:
    """The ops of all runs of one worker."""

    def __init__(
        self, engine: EngineClient, blobs: Blobs, oplog: Oplog, *, fused: bool = False
    ) -> None:
        """With `fused`, passes and steps that are executed at the same time are one engine call."""
        self.engine = engine
        self.fused = fused
        self._blobs = blobs
        self._oplog = oplog
        self._passes = Gathering(engine.forward_backward_many)
        self._steps = Gathering(engine.optim_step_many)
        self._handlers: dict[Kind, Callable[[RunContext, Op, int], Awaitable[Finish]]] = {
            Kind.CREATE_MODEL: self._create_model,
            Kind.FORWARD: self._forward_backward,
            Kind.FORWARD_BACKWARD: self._forward_backward,
            Kind.OPTIM_STEP: self._optim_step,
            Kind.SAVE_WEIGHTS: self._save_weights,
            Kind.SAVE_WEIGHTS_FOR_SAMPLER: self._save_weights_for_sampler,
            Kind.SAVE_WEIGHTS_EXTERNAL: self._save_weights_external,
            Kind.LOAD_WEIGHTS: self._load_weights,
        }

    async def execute(self, run: RunContext, op: Op, cycle: int) -> Finish:
        """Apply the op to the run's state; awaiting the returned finish gives its outcome.

        LuthierError if the op fails and the state is as it was before.
        """
        run.measure = Measure()
        return await self._handlers[op.kind](run, op, cycle)

    async def save_recovery(self, run: RunContext, committed: int) -> TinkerPath | None:
        """The state of a run that ends, after op `committed`, as a checkpoint that its owner lists.

        None before op 0 was executed. May be repeated.
        """
        if run.record is None:
            return None
        copy = await self.engine.copy_files(run.run_id, optimizer=True)
        files = await self.engine.fetch(copy)
        path = TinkerPath(run.run_id, "weights", f"recovery-{committed}")
        await self._save(run, RECOVERY_SEQS + committed, "weights", path.name, files)
        return path

    @property
    def _max_deviation(self) -> float:
        dtype = self.engine.fingerprint.get("dtype", "")
        return MAX_DEVIATION.get(dtype, MAX_DEVIATION["float32"])

    async def _create_model(self, run: RunContext, op: Op, cycle: int) -> Finish:
        body = json.loads(await self._payload(op))
        run.record = RunRecord.model_validate(body["run"])
        source = body["source"]
        await self.engine.create(run.run_id, run.record.lora)
        result = {"model_id": run.run_id, "type": "create_model"}
        if source is not None:
            await self._load(run, source)
            result = {"model_id": run.run_id, "path": source["path"], "type": "load_weights"}
        return _json_outcome(result)

    async def _forward_backward(self, run: RunContext, op: Op, cycle: int) -> Finish:
        request = await self._payload(op)
        backward, halvings = op.kind is Kind.FORWARD_BACKWARD, run.halvings.get(op.seq, 0)
        if self.fused and not run.alone and not halvings:
            output = await self._passes.ask(PassOp(run.run_id, request, backward, cycle))
        else:
            output = await self.engine.forward_backward(
                run.run_id, request, backward=backward, clock_cycle=cycle, halvings=halvings
            )
        metrics = wire_pb2.ForwardBackwardOutput.FromString(output).metrics
        per_token = metrics["loss:sum"] / max(metrics["num_tokens:sum"], 1.0)
        # A policy's loss is near 0 by chance: its terms are of the size of their advantages, 1.
        run.measure = Measure(per_token, floor=1.0, limit=self._max_deviation)

        async def finish() -> Outcome:
            body = await self._result_body(run, op, output)
            note_forward(op.kind, metrics)
            return Outcome.completed(body, "protobuf", metrics=_metrics(op.kind, metrics))

        return finish

    async def _optim_step(self, run: RunContext, op: Op, cycle: int) -> Finish:
        params = OptimStep.model_validate_json(await self._payload(op)).adam_params
        if self.fused and not run.alone:
            metrics = await self._steps.ask((run.run_id, params))
        else:
            metrics = await self.engine.optim_step(run.run_id, params)
        run.measure = Measure(metrics.get("grad_norm", 0.0), limit=self._max_deviation)
        # JSON has no NaN: of a step that was made with a gradient that is not finite.
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        metrics["clock_cycle"] = float(cycle)
        return _json_outcome(
            {
                "metrics": metrics,
                "learning_rates": [params.learning_rate],
                "step_count": int(metrics["step"]),
            },
            metrics=_metrics(op.kind, metrics),
        )

    async def _load_weights(self, run: RunContext, op: Op, cycle: int) -> Finish:
        source = json.loads(await self._payload(op))
        await self._load(run, source)
        return _json_outcome({"path": source["path"], "model_id": run.run_id})

    async def _save_weights(self, run: RunContext, op: Op, cycle: int) -> Finish:
        wanted = SaveWeights.model_validate_json(await self._payload(op))
        copy = await self.engine.copy_files(run.run_id, optimizer=True)

        async def finish() -> Outcome:
            files = await self.engine.fetch(copy)
            await self._save(
                run,
                op.seq,
                "weights",
                wanted.path,
                files,
                overwrite=wanted.overwrite,
                ttl_seconds=wanted.ttl_seconds,
                user_metadata=wanted.user_metadata,
            )
            path = TinkerPath(run.run_id, "weights", wanted.path)
            return _saved(path, "save_weights")

        return finish

    async def _save_weights_for_sampler(self, run: RunContext, op: Op, cycle: int) -> Finish:
        wanted = SaveWeightsForSampler.model_validate_json(await self._payload(op))
        copy = await self.engine.copy_files(run.run_id, optimizer=False)
        metrics = _metrics(op.kind, await self._gap(run, op))

        async def finish() -> Outcome:
            files = await self.engine.fetch(copy)
            if wanted.path is None:
                result = await self._save_ephemeral(run, op, wanted, files)
                return _completed(result, metrics=metrics)
            await self._save(
                run,
                op.seq,
                "sampler_weights",
                wanted.path,
                files,
                ttl_seconds=wanted.ttl_seconds,
                user_metadata=wanted.user_metadata,
            )
            path = TinkerPath(run.run_id, "sampler_weights", wanted.path)
            return _saved(path, "save_weights_for_sampler", metrics=metrics)

        return finish

    async def _gap(self, run: RunContext, op: Op) -> dict[str, float]:
        """`logprob_gap:*` of the run's weights, or {} within GAP_PAUSE_S of the last one."""
        if time.monotonic() < run.gap_due:
            return {}
        gap = await self.engine.logprob_gap(run.run_id)
        run.gap_due = time.monotonic() + GAP_PAUSE_S
        if gap["logprob_gap:alarm"]:
            log.error(
                "run %s, seq %d: sampled logprobs are %.2g on average from the forward's",
                *(run.run_id, op.seq, gap["logprob_gap:mean"]),
            )
        return gap

    async def _save_weights_external(self, run: RunContext, op: Op, cycle: int) -> Finish:
        wanted = SaveWeightsExternal.model_validate_json(await self._payload(op))
        copy = await self.engine.copy_files(run.run_id, optimizer=False)

        async def finish() -> Outcome:
            files = await self.engine.fetch(copy)
            saved = await self._save(
                run, op.seq, "external_weights", wanted.path, files, ttl_seconds=wanted.ttl_seconds
            )
            return _completed(
                {
                    "path": saved.tinker_path,
                    "size_bytes": saved.size_bytes,
                    "type": "save_weights_external",
                }
            )

        return finish

    async def _save_ephemeral(
        self, run: RunContext, op: Op, wanted: SaveWeightsForSampler, files: dict[str, bytes]
    ) -> dict[str, str]:
        """Weights of one sampling session: no path, no listing, one immutable record.

        In-flight ones move the other in-flight sessions of the run forward too.
        """
        assert run.record is not None
        session_id = run.record.session_id
        sampler_id = f"{session_id}:sample:{wanted.sampling_session_seq_id}"
        checkpoint = await self._save(run, op.seq, "ephemeral", f"seq-{op.seq}", files)
        record = SamplerRecord(
            sampling_session_id=sampler_id,
            tenant=run.tenant,
            session_id=session_id,
            base_model=run.record.base_model,
            model_path=None,
            weights=checkpoint.manifest_key,
            inflight_run=run.run_id if wanted.kind == "inflight" else "",
            created_at=datetime.now(UTC),
        )
        await outlasting_outage(lambda: save_sampler(self._blobs, self._oplog.redis, record))
        if record.inflight_run:
            # Whether this moved them or came too late, the commit that follows says.
            await self._oplog.publish(run.run_id, run.epoch, op.seq, record.weights)
            channel = keys.sampling_published(record.base_model)
            await self._oplog.redis.spublish(channel, run.run_id)
        return {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}

    async def _save(
        self,
        run: RunContext,
        seq: int,
        kind: CheckpointKind,
        name: str,
        files: dict[str, bytes],
        **options: Any,
    ) -> CheckpointRecord:
        assert run.record is not None
        record = run.record
        return await outlasting_outage(
            lambda: save_checkpoint(
                self._blobs,
                self._oplog.redis,
                run=record,
                kind=kind,
                name=name,
                seq=seq,
                epoch=run.epoch,
                files=files,
                now=datetime.now(UTC),
                **options,
            )
        )

    async def _load(self, run: RunContext, source: dict[str, Any]) -> None:
        files = await outlasting_outage(lambda: read_files(self._blobs, source["manifest"]))
        await self.engine.load(run.run_id, files, optimizer=bool(source["optimizer"]))

    async def _payload(self, op: Op) -> bytes:
        if op.body.inline is not None:
            return op.body.inline
        return op.body.checked(await outlasting_outage(lambda: self._blobs.get(op.body.key)))

    async def _result_body(self, run: RunContext, op: Op, output: bytes) -> Body:
        if len(output) <= INLINE_LIMIT:
            return Body.of(output)
        key = keys.op_result(run.tenant, run.run_id, op.seq, run.epoch)
        await failpoint("tr.put_res", op.kind)
        await outlasting_outage(lambda: self._blobs.put(key, output))
        return Body.stored(key, output)


def _saved(path: TinkerPath, kind: str, *, metrics: str = "") -> Outcome:
    result = {"path": str(path), "tinker_path": str(path), "type": kind}
    return _completed(result, metrics=metrics)


def _completed(result: dict[str, Any], *, metrics: str = "") -> Outcome:
    return Outcome.completed(Body.of(json.dumps(result).encode()), metrics=metrics)


def _metrics(kind: Kind, metrics: Mapping[str, float]) -> str:
    """What the metric history of the run keeps of an op; JSON has no NaN."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps({"kind": kind, "metrics": finite})


def _json_outcome(result: dict[str, Any], *, metrics: str = "") -> Finish:
    async def finish() -> Outcome:
        return _completed(result, metrics=metrics)

    return finish
