"""From a checked request to an admitted op: payload first, one atomic admit, then the answer."""

import asyncio
import time
from typing import Any

import orjson
from aiohttp import web

from luthier_core import keys
from luthier_core.errors import (
    BadRequest,
    LuthierError,
    NotFound,
    TooManyRequests,
    Unreadable,
)
from luthier_core.failpoints import failpoint
from luthier_core.ops import Kind, Outcome, digest_of
from luthier_core.protocol import Admit, Announce, Effect, PutPayload, Request, drive
from luthier_core.protocol import submit as submit_steps
from luthier_gateway.backends import Backends
from luthier_gateway.web_io import json_response

_NOT_PART_OF_THE_REQUEST = frozenset({"sampling_session_seq_id"})
"""The SDK sends a new value of it with every retry of the same save (reliability F5)."""


def json_digest(value: dict[str, Any]) -> str:
    """What makes two JSON bodies the same request."""
    kept = {name: item for name, item in value.items() if name not in _NOT_PART_OF_THE_REQUEST}
    return digest_of(orjson.dumps(kept, option=orjson.OPT_SORT_KEYS))


def ids_of(value: dict[str, Any]) -> tuple[str, int]:
    """(model_id, seq_id) of a training request; Unreadable if they are not there."""
    run_id, seq = value.get("model_id"), value.get("seq_id")
    if not isinstance(run_id, str) or not isinstance(seq, int) or not 1 <= seq < 2**31:
        raise Unreadable("model_id must be a string and seq_id an integer from 1 to 2147483647")
    return run_id, seq


async def submit(
    backends: Backends,
    tenant: str,
    run_id: str,
    seq: int,
    *,
    kind: Kind,
    body: bytes,
    digest: str,
    base_model: str,
    problem: LuthierError | None = None,
    header: dict[str, str] | None = None,
) -> web.Response:
    """Admit one op of a run and answer with its request_id.

    A `problem` makes it a rejected op: it uses up the seq and its future fails with the message.
    """
    request = Request(
        run_id=run_id,
        seq=seq,
        kind=kind,
        digest=digest,
        body=body,
        payload_key=keys.op_payload(tenant, run_id, seq, digest),
        problem=problem.message if problem else None,
    )

    async def perform(effect: Effect) -> Any:
        match effect:
            case PutPayload(key, data):
                await failpoint("gw.put")
                await backends.blobs.put(key, data)
            case Admit(op):
                await failpoint("gw.admit")
                limits = backends.config.limits
                return await backends.oplog.admit(op, tenant=tenant, limits=limits, header=header)
            case Announce():
                await backends.oplog.announce_run(base_model, run_id, time.time())

    await failpoint("gw.body")
    admission = await drive(submit_steps(request), perform)
    await failpoint("gw.reply")
    _raise_unless_admitted(admission.status, run_id, seq)
    return json_response({"request_id": f"{run_id}:{seq}", "model_id": run_id})


async def submit_creation(
    backends: Backends,
    tenant: str,
    run_id: str,
    base_model: str,
    *,
    body: bytes,
    digest: str,
    facts: dict[str, Any],
) -> web.Response:
    """Admit op 0, which makes the run's header, and tell the workers of its base model."""
    header = {"base_model": base_model, "facts": orjson.dumps(facts).decode()}
    return await submit(
        backends,
        tenant,
        run_id,
        0,
        kind=Kind.CREATE_MODEL,
        body=body,
        digest=digest,
        header=header,
        base_model=base_model,
    )


async def reject_creation(
    backends: Backends, tenant: str, run_id: str, *, digest: str, problem: LuthierError
) -> web.Response:
    """Op 0 that fails at once: no worker will ever own this run."""
    status = await backends.oplog.reject_run(
        run_id,
        tenant=tenant,
        digest=digest,
        header={"base_model": "", "facts": "{}"},
        outcome=Outcome.failure(problem.message, problem.category),
    )
    _raise_unless_admitted(status, run_id, 0)
    return json_response({"request_id": f"{run_id}:0", "model_id": run_id})


async def off_loop_if_large(size: int, function: Any, *args: Any) -> Any:
    """Run a pure function here, or on a thread if it would hold up the event loop."""
    if size < 256 * 1024:
        return function(*args)
    return await asyncio.to_thread(function, *args)


def _raise_unless_admitted(status: str, run_id: str, seq: int) -> None:
    if status in ("OK", "DUP"):
        return
    if status == "NORUN":
        raise NotFound(f"model_id={run_id!r}")
    if status == "MISMATCH":
        raise BadRequest(f"seq_id: {seq} of {run_id} was used for a request with another body")
    if status == "DEAD":
        raise BadRequest(f"model_id: {run_id} has failed: it takes no more requests")
    if status == "FAR":
        raise TooManyRequests(f"seq_id {seq} is too far ahead of what has arrived for {run_id}")
    raise TooManyRequests(f"the queue of {run_id} is full until it has executed more")
