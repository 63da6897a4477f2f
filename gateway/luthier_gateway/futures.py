"""Futures over HTTP: held open until there is something to say, never polled here."""

import asyncio
import contextlib
from typing import Any

import orjson
from aiohttp import web

from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.errors import (
    Gone,
    InvalidField,
    NotFound,
    TooManyRequests,
)
from luthier_core.failpoints import failpoint
from luthier_core.futures import FutureId
from luthier_core.loss_graph import graph_of_id
from luthier_core.oplog import REDIS_ERRORS
from luthier_core.ops import Body, Outcome
from luthier_core.transcode import forward_backward_json, result_json, sample_json
from luthier_core.types import CancelFuture, RetrieveFuture, RetrieveFutures, parse
from luthier_gateway.backends import BACKENDS, TENANT, Backends
from luthier_gateway.client_version import PATIENT_POLLS_SINCE, is_before
from luthier_gateway.observing import DELIVERED
from luthier_gateway.queue_state import NO_ROOM, REDIS_AWAY, QueueState, queue_state
from luthier_gateway.submit import off_loop_if_large
from luthier_gateway.web_io import PROTOBUF, json_response, read_body

TROUBLE_HOLD_S = 10.0
"""How long a poll is held while Redis is away: never a fast 5xx, which is polled again at once."""
LOSS_FUTURE = "loss:"
"""How the request_id of create_custom_loss begins; its answer follows."""
MAX_SMALL_BODY = 1024 * 1024
CANCELLED = Outcome(state="cancelled", body=Body.of(b"cancelled"), encoding="text", category="user")


async def hold_in_trouble() -> None:
    await asyncio.sleep(TROUBLE_HOLD_S)


async def retrieve_future(request: web.Request) -> web.Response:
    """The result; or its error; or 408 try_again with a queue state after poll_hold_s."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    wanted = parse(RetrieveFuture, await read_body(request, MAX_SMALL_BODY))
    config = backends.config.gateway
    if wanted.request_id.startswith(LOSS_FUTURE):
        loss_id = wanted.request_id.removeprefix(LOSS_FUTURE)
        graph_of_id(loss_id)
        return json_response({"type": "create_custom_loss", "loss_id": loss_id})
    future = _parse_id(wanted.request_id)
    try:
        check_room(backends)
    except TooManyRequests:
        if not is_before(request, PATIENT_POLLS_SINCE):
            raise
        await hold_in_trouble()
        return _try_again(wanted.request_id, NO_ROOM)
    await failpoint("gw.poll", future.kind)
    try:
        outcome = await _outcome(backends, tenant, future, config.poll_hold_s)
        if outcome is None:
            return _try_again(wanted.request_id, await queue_state(backends, tenant, future))
        size = outcome.body.num_bytes
        if wanted.allow_metadata_only and not outcome.failed and size > config.peek_bytes:
            return json_response({"status": "complete_metadata", "response_payload_size": size})
        response = await _result(request, backends.blobs, future, outcome)
    except REDIS_ERRORS:
        await hold_in_trouble()
        return _try_again(wanted.request_id, REDIS_AWAY)
    await _deliver(request, response, backends, future, outcome)
    return response


async def future_status(request: web.Request) -> web.Response:
    """GET futures/{request_id}: {status, result, error} as JSON, at once; for plain REST users."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    future = _parse_id(request.match_info["request_id"])
    outcome = await _outcome(backends, tenant, future, 0.0)
    status: dict[str, Any] = {"status": "pending", "result": None, "error": None}
    if outcome is None:
        state = await queue_state(backends, tenant, future)
        return json_response({**status, "queue_state": state.state, "reason": state.reason})
    body = await bytes_of(backends.blobs, outcome.body)
    if outcome.failed:
        status |= {"status": "failed", "error": body.decode(), "category": outcome.category}
    else:
        status |= {"status": "completed", "result": await _as_json(future, outcome, body)}
    response = json_response(status)
    await _deliver(request, response, backends, future, outcome)
    return response


async def retrieve_futures(request: web.Request) -> web.Response:
    """Completions of one handle of a sampling session, after its cursor; held like a poll."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    wanted = parse(RetrieveFutures, await read_body(request, MAX_SMALL_BODY))
    session, clone = wanted.target.sampling_session_id, wanted.target.cloned_sampler_id
    await backends.sampler(tenant, session)
    check_room(backends)
    hold_s = backends.config.gateway.poll_hold_s
    timeout_s = hold_s if wanted.timeout is None else min(wanted.timeout, hold_s)
    await failpoint("gw.poll", "samples")
    cursor = wanted.prev_cursor
    try:
        if wanted.prev_cursor > await backends.oplog.last_completion(session, clone):
            # Redis went back to an earlier state, and counts anew: none of what it has is known.
            cursor = 0
        # The client has what it acknowledges: only a poll proves that the reply before arrived.
        await backends.oplog.acknowledge(session, clone, to=cursor, seqs=_seqs_of(session, wanted))
        completions = await backends.futures.wait_completions(
            session, clone, after=cursor, timeout_s=timeout_s
        )
    except REDIS_ERRORS:
        await hold_in_trouble()
        completions = []
    await failpoint("gw.deliver", "samples")
    return json_response(
        {
            "completions": [
                {
                    "state": item.state,
                    "request_id": item.request_id,
                    **(
                        {"response_payload_uncompressed_size": item.num_bytes}
                        if item.state == "finished"
                        else {}
                    ),
                }
                for item in completions
            ],
            "cursor": completions[-1].position if completions else cursor,
        }
    )


async def cancel_future(request: web.Request) -> web.Response:
    """Cancel a sample. Idempotent; an unknown or finished one is left as it is."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    wanted = parse(CancelFuture, await read_body(request, MAX_SMALL_BODY))
    future = FutureId.parse(wanted.request_id)
    if future is None:
        return json_response({})
    if future.kind == "train":
        raise InvalidField("request_id: only samples can be cancelled, training is not")
    with contextlib.suppress(NotFound):
        sampler = await backends.sampler(tenant, future.parent)
        await backends.oplog.cancel(future.parent, future.seq, sampler.base_model, CANCELLED)
    return json_response({})


def _parse_id(request_id: str) -> FutureId:
    future = FutureId.parse(request_id)
    if future is None:
        raise NotFound(f"request_id={request_id!r}")
    return future


def check_room(backends: Backends) -> None:
    """TooManyRequests if as many requests wait for results as this process allows."""
    if backends.futures.num_waiting >= backends.config.gateway.max_open_polls:
        raise TooManyRequests("too many requests wait for results on this gateway")


def _seqs_of(session: str, wanted: RetrieveFutures) -> list[str]:
    """Seqs of the acknowledged ids that are of this session; others are not the caller's to end."""
    ids = (FutureId.parse(request_id) for request_id in wanted.retrieved_request_ids)
    return [future.seq for future in ids if future is not None and future.parent == session]


async def _outcome(
    backends: Backends, tenant: str, future: FutureId, timeout_s: float
) -> Outcome | None:
    """The outcome; None after timeout_s; NotFound for another tenant's; Gone if none can come."""
    await _check_tenant(backends, tenant, future)
    # The common case first: an outcome that is there already needs no waiting.
    find = _training_outcome if future.kind == "train" else _sampling_outcome
    outcome = await find(backends, future)
    if outcome is None and timeout_s > 0:
        outcome = await backends.futures.wait(future, timeout_s=timeout_s)
    return outcome


async def _check_tenant(backends: Backends, tenant: str, future: FutureId) -> None:
    """NotFound, the same for absent and foreign ids."""
    if future.kind == "train":
        await backends.run(tenant, future.parent, field="request_id")
    else:
        await backends.sampler(tenant, future.parent)


async def _training_outcome(backends: Backends, future: FutureId) -> Outcome | None:
    """The outcome if it is there; Gone if the id was never accepted, or its result has expired."""
    seq = int(future.seq)
    standing = await backends.oplog.standing(future.parent, seq)
    if not standing.is_accepted:
        await backends.oplog.lost(future.parent, seq)
        raise Gone(f"request_id={future.parent}:{seq} was not accepted")
    if standing.is_committed and standing.outcome is None:
        raise Gone(f"request_id={future.parent}:{seq}")
    return standing.outcome


async def _sampling_outcome(backends: Backends, future: FutureId) -> Outcome | None:
    """The outcome if it is there; Gone if none can ever come."""
    outcome = await backends.futures.outcome(future)
    if outcome is None and not await backends.oplog.redis.exists(future.outcome_key):
        raise Gone(f"request_id={future.parent}:{future.seq}")
    return outcome


async def _result(
    request: web.Request, blobs: Blobs, future: FutureId, outcome: Outcome
) -> web.Response:
    """Protobuf for who accepts it, and JSON for everybody else."""
    body = await bytes_of(blobs, outcome.body)
    if outcome.failed:
        return json_response({"error": body.decode(), "category": outcome.category})
    if outcome.encoding == "protobuf":
        if PROTOBUF in request.headers.get("Accept", ""):
            return web.Response(body=body, content_type=PROTOBUF)
        body = await off_loop_if_large(len(body), _transcode, future, body)
    return web.Response(body=body, content_type="application/json")


async def _as_json(future: FutureId, outcome: Outcome, body: bytes) -> Any:
    """For plain REST users: null where a number is none."""
    if outcome.encoding == "protobuf":
        return await off_loop_if_large(len(body), _TO_JSON[future.kind], body)
    return orjson.loads(body)


def _transcode(future: FutureId, body: bytes) -> bytes:
    return result_json(_TO_JSON[future.kind](body))


_TO_JSON = {"sample": sample_json, "train": forward_backward_json}


async def bytes_of(blobs: Blobs, body: Body) -> bytes:
    """The bytes of an outcome; Gone if they have expired."""
    if body.inline is not None:
        return body.inline
    try:
        return await blobs.get(body.key)
    except BlobMissing:
        raise Gone("the result's bytes have expired") from None


async def _deliver(
    request: web.Request,
    response: web.Response,
    backends: Backends,
    future: FutureId,
    outcome: Outcome,
) -> None:
    """Send a result, then record that it was sent.

    In this order: a client that was not told of a failure must not have its optimizer step obeyed
    (reliability 1.6), and a result is kept long until it has been given out whole.
    """
    await failpoint("gw.deliver", future.kind)
    request.app[DELIVERED].note(request.path, future, response)
    await response.prepare(request)
    await response.write_eof()
    with contextlib.suppress(*REDIS_ERRORS):
        if future.kind == "train" and outcome.failed:
            await backends.oplog.told(future.parent, int(future.seq))
        await backends.oplog.delivered(future.outcome_key)


def _try_again(request_id: str, state: QueueState) -> web.Response:
    body = {
        "type": "try_again",
        "request_id": request_id,
        "queue_state": state.state,
        "queue_state_reason": state.reason,
    }
    return web.Response(body=orjson.dumps(body), status=408, content_type="application/json")
