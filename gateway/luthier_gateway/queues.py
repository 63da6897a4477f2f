"""Why a run waits: queues of a deployment and of a session; ending what a run has queued."""

import time
from collections.abc import Iterable
from typing import Any

from aiohttp import web

from luthier_core import keys
from luthier_core.futures import FutureId
from luthier_core.oplog import RunHeader
from luthier_gateway.admin import caller
from luthier_gateway.backends import BACKENDS, TENANT, Backends
from luthier_gateway.queue_state import queue_state
from luthier_gateway.web_io import json_response

MAX_RUNS = 1000
"""Of one answer; the counts are of all."""


def routes(prefix: str) -> list[web.RouteDef]:
    return [
        web.get(f"{prefix}/admin/queues", list_queues),
        web.get(f"{prefix}/sessions/{{session_id}}/queue", session_queue),
        web.post(f"{prefix}/training_runs/{{run_id}}/cancel_queued", cancel_queued),
    ]


async def list_queues(request: web.Request) -> web.Response:
    """Per base model: its workers, its samples, and every run that waits with what it waits for.

    An operator sees all organisations, an administrator their own.
    """
    backends = request.app[BACKENDS]
    workers = await backends.oplog.live_workers()
    models = []
    for name in backends.config.model_names:
        headers = await _headers(backends, await backends.oplog.live_runs(name))
        visible = {
            run_id: header
            for run_id, header in headers.items()
            if caller().is_operator or header.tenant == caller().tenant
        }
        jobs: Any = await backends.oplog.redis.xlen(keys.sampling_jobs(name))
        models.append(
            {
                "base_model": name,
                "workers": [
                    {"name": worker, "role": lease["role"], "state": lease["state"]}
                    for worker, lease in workers.items()
                    if lease["base_model"] == name
                ],
                "num_samples": jobs,
                "num_runs": len(visible),
                "runs": await _waiting(backends, visible),
            }
        )
    return json_response({"models": models})


async def session_queue(request: web.Request) -> web.Response:
    """Every run of a session that waits: what for, since when, how much, and its worker."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    session = await backends.registry.describe_session(tenant, request.match_info["session_id"])
    headers = await _headers(backends, session["training_run_ids"])
    return json_response({"runs": await _waiting(backends, headers)})


async def cancel_queued(request: web.Request) -> web.Response:
    """Let everything that the run has queued fail, so that it is free for what comes next.

    The op that is being executed ends as it would.
    """
    backends, run_id = request.app[BACKENDS], request.match_info["run_id"]
    await backends.live_run(request[TENANT], run_id)
    num_cancelled = await backends.oplog.cancel_queued(run_id)
    return json_response({"run_id": run_id, "num_cancelled": num_cancelled})


async def _waiting(backends: Backends, headers: dict[str, RunHeader]) -> list[dict[str, Any]]:
    """Rows of the runs that have something queued, longest queue first."""
    rows: list[dict[str, Any]] = []
    parked = await _num_parked(backends, headers)
    for run_id, header in headers.items():
        num_queued = header.admitted - header.committed
        if not num_queued and not parked[run_id]:
            continue
        seq = header.committed + 1
        future = FutureId.parse(f"{run_id}:{seq}")
        assert future is not None
        state = await queue_state(backends, header.tenant, future)
        since = await backends.oplog.admitted_at(run_id, seq) or header.gap_since
        rows.append(
            {
                "run_id": run_id,
                "session_id": run_id.partition(":")[0],
                "org_id": header.tenant,
                "next_seq": seq,
                "num_queued": num_queued,
                "num_parked": parked[run_id],
                "state": state.state,
                "waits_for": state.reason,
                "since_s": round(max(time.time() - since / 1000, 0.0), 1) if since else None,
                "worker": header.owner.partition("/")[0] or None,
            }
        )
    rows.sort(key=lambda row: int(row["num_queued"]), reverse=True)
    return rows[:MAX_RUNS]


async def _headers(backends: Backends, run_ids: Iterable[str]) -> dict[str, RunHeader]:
    return await backends.oplog.headers(list(run_ids))


async def _num_parked(backends: Backends, run_ids: Iterable[str]) -> dict[str, int]:
    pipe, wanted = backends.oplog.redis.pipeline(transaction=False), list(run_ids)
    for run_id in wanted:
        pipe.hlen(keys.run_parked(run_id))
    return dict(zip(wanted, await pipe.execute(), strict=True))
