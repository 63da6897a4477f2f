"""From a checked request to an admitted op: payload first, one atomic admit, then the answer."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import orjson
from aiohttp import web

from luthier_core import keys, tracing
from luthier_core.caller import CALLER, REFUSAL
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
from luthier_gateway.backends import BACKENDS, TENANT, Backends
from luthier_gateway.body_ids import read_json_ids, read_protobuf_ids
from luthier_gateway.web_io import (
    HEAD_BYTES,
    PROTOBUF,
    TAIL_BYTES,
    OversizeBody,
    json_response,
    read_body,
)

P = ParamSpec("P")
T = TypeVar("T")

_NOT_PART_OF_THE_REQUEST = frozenset({"sampling_session_seq_id"})
"""The SDK sends a new value of it with every retry of the same save (reliability F5)."""


def json_digest(value: dict[str, Any]) -> str:
    """What makes two JSON bodies the same request."""
    kept = {name: item for name, item in value.items() if name not in _NOT_PART_OF_THE_REQUEST}
    return digest_of(orjson.dumps(kept, option=orjson.OPT_SORT_KEYS))


def ids_of(value: dict[str, Any]) -> tuple[str, int]:
    """(model_id, seq_id) of a training request; Unreadable if they are not there."""
    run_id, seq = value.get("model_id"), value.get("seq_id")
    # A bool is an int to isinstance, and none to Redis.
    if not isinstance(run_id, str) or type(seq) is not int or not 1 <= seq < 2**31:
        raise Unreadable("model_id must be a string and seq_id an integer from 1 to 2147483647")
    return run_id, seq


async def read_training_body(
    request: web.Request, max_bytes: int, read: Callable[[bytes], T], kind: Kind
) -> T | web.Response:
    """What `read` makes of the body; or the answer to a body that it cannot read.

    An unreadable or over-size body leaves a failed op at its seq if its ids can be made out, or the
    run would wait for that seq: the client does not send it again (reliability 2.3).
    """
    backends, tenant = request.app[BACKENDS], request[TENANT]
    read_ids = (
        (lambda head, tail: read_protobuf_ids(head))
        if request.content_type == PROTOBUF
        else read_json_ids
    )
    try:
        body = await read_body(request, max_bytes)
    except OversizeBody as error:
        ids = read_ids(error.head, error.tail)
        await _use_up_seq(backends, tenant, ids, kind, digest_of(error.head + error.tail), error)
        raise
    try:
        return await off_loop_if_large(len(body), read, body)
    except Unreadable as error:
        ids = read_ids(body[:HEAD_BYTES], body[-TAIL_BYTES:])
        refused = await _use_up_seq(backends, tenant, ids, kind, digest_of(body), error)
        if refused is None:
            raise
        return refused


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
        problem=_message(problem, seq),
    )

    async def perform(effect: Effect) -> Any:
        match effect:
            case PutPayload(key, data):
                await failpoint("gw.put", kind)
                await backends.blobs.put(key, data)
            case Admit(op):
                await failpoint("gw.admit", kind)
                limits = backends.config.limits
                op = replace(op, trace=tracing.carried())
                return await backends.oplog.admit(op, tenant=tenant, limits=limits, header=header)
            case Announce():
                await backends.oplog.announce_run(base_model, run_id, time.time())

    await failpoint("gw.body", kind)
    admission = await drive(submit_steps(request), perform)
    await failpoint("gw.reply", kind)
    _raise_unless_admitted(admission.status, run_id, seq)
    return _accepted(run_id, seq)


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
    caller = CALLER.get()
    header = {
        "base_model": base_model,
        "facts": orjson.dumps(facts).decode(),
        "key_id": caller.key_id if caller else "",
    }
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
    return _accepted(run_id, 0)


async def off_loop_if_large(
    size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run a pure function here, or on a thread if it would hold up the event loop."""
    if size < 256 * 1024:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


async def _use_up_seq(
    backends: Backends,
    tenant: str,
    ids: tuple[str, int] | None,
    kind: Kind,
    digest: str,
    problem: LuthierError,
) -> web.Response | None:
    """Admit a failed op at this seq; None if there are no ids."""
    if ids is None:
        return None
    run_id, seq = ids
    run = await backends.working_run(tenant, run_id, seq)
    return await submit(
        backends,
        tenant,
        run_id,
        seq,
        kind=kind,
        body=b"",
        digest=digest,
        base_model=run.base_model,
        problem=problem,
    )


def _message(problem: LuthierError | None, seq: int) -> str | None:
    """Why the op fails at once. A run that is being made is refused before, or not at all."""
    problem = problem or (REFUSAL.get() if seq else None)
    return problem.message if problem else None


def _accepted(run_id: str, seq: int) -> web.Response:
    return json_response(
        {"request_id": f"{run_id}:{seq}", "model_id": run_id, "message": "accepted"}
    )


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
