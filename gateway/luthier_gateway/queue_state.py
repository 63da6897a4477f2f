"""Why a result is not there yet, in words for the person who waits: what for, and since when."""

import time
from dataclasses import dataclass
from typing import Any, cast

from luthier_core import keys
from luthier_core.futures import FutureId
from luthier_core.oplog import RunHeader
from luthier_gateway.backends import Backends


@dataclass(frozen=True, slots=True)
class QueueState:
    """As retrieve_future reports it (wire protocol 4.9)."""

    state: str
    """active | paused_capacity | paused_rate_limit"""
    reason: str


REDIS_AWAY = QueueState(
    "paused_capacity", "the server's queue is restarting; nothing that was accepted is lost"
)

NO_ROOM = QueueState("paused_capacity", "too many requests wait for results on this gateway")


async def queue_state(backends: Backends, tenant: str, future: FutureId) -> QueueState:
    """What this future waits for."""
    if future.kind == "sample":
        return await _of_sample(backends, tenant, future)
    header = await backends.oplog.header(future.parent)
    if header is None:
        return QueueState("active", "the run is being created")
    return await _of_op(backends, header, future)


async def _of_op(backends: Backends, header: RunHeader, future: FutureId) -> QueueState:
    seq, run_id = int(future.seq), future.parent
    if seq > header.admitted:
        if not header.owner:
            await _tell_workers(backends, header, run_id)
        since = _since(header.gap_since)
        missing = f"waiting for seq {header.admitted + 1}, which has not arrived"
        return QueueState("active", f"{missing}{since}")
    since = _since(await backends.oplog.admitted_at(run_id, seq))
    workers = await backends.oplog.live_workers()
    trainers = {
        name: lease
        for name, lease in workers.items()
        if (lease["role"], lease["base_model"]) == ("trainer", header.base_model)
    }
    name, _, incarnation = header.owner.partition("/")
    if name not in trainers or trainers[name]["incarnation"] != incarnation:
        await _tell_workers(backends, header, run_id)
        reason = await _why_unowned(backends, header, [w["state"] for w in trainers.values()])
        return QueueState("paused_capacity", f"{reason}; waiting{since}")
    num_ahead = seq - header.committed - 1
    ahead = f"{num_ahead} operations of this run are ahead" if num_ahead else "being executed"
    return QueueState("active", f"{ahead}; waiting{since}")


async def _tell_workers(backends: Backends, header: RunHeader, run_id: str) -> None:
    """The gateway that took an op may have died before it did."""
    await backends.oplog.announce_run(header.base_model, run_id, time.time())


async def _why_unowned(backends: Backends, header: RunHeader, trainer_states: list[str]) -> str:
    """Why no living trainer owns the run."""
    if not trainer_states:
        return f"no trainer of {header.base_model} is running"
    if "ready" not in trainer_states:
        return f"the trainer of {header.base_model} is starting"
    if header.owner:
        return "a trainer is taking the run over"
    live = await backends.oplog.live_runs(header.base_model)
    return f"waiting for a free adapter slot: {max(len(live) - 1, 0)} other runs are live"


async def _of_sample(backends: Backends, tenant: str, future: FutureId) -> QueueState:
    sampler = await backends.sampler(tenant, future.parent)
    workers = (await backends.oplog.live_workers()).values()
    fields = await cast(Any, backends.oplog.redis.hmget(future.outcome_key, ["at", "entry"]))
    since = _since(int(fields[0]) if fields[0] else None)
    states = [
        lease["state"]
        for lease in workers
        if (lease["role"], lease["base_model"]) == ("sampler", sampler.base_model)
    ]
    if "ready" not in states:
        what = "is starting" if states else "is running"
        none = "the" if states else "no"
        reason = f"{none} sampler of {sampler.base_model} {what}; waiting{since}"
        return QueueState("paused_capacity", reason)
    num_ahead = await _position(backends, sampler.base_model, fields[1])
    ahead = f"{num_ahead} requests were queued before" if num_ahead else "being generated"
    return QueueState("active", f"{ahead}; waiting{since}")


async def _position(backends: Backends, base_model: str, entry: bytes | None) -> int:
    """How many jobs of the model that no sampler has claimed yet came before this one."""
    if entry is None:
        return 0
    groups = await backends.oplog.redis.xinfo_groups(keys.sampling_jobs(base_model))
    claimed_to = groups[0]["last-delivered-id"].decode() if groups else "0-0"
    if _id(entry.decode()) <= _id(claimed_to):
        return 0
    waiting: Any = await backends.oplog.redis.xrange(
        keys.sampling_jobs(base_model), min=f"({claimed_to}", max=f"({entry.decode()}", count=1000
    )
    return len(waiting)


def _id(entry: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence)


def _since(at_ms: int | None) -> str:
    """' for 12 s', or nothing if the time is not known."""
    return f" for {max(time.time() - at_ms / 1000, 0):.0f} s" if at_ms else ""
