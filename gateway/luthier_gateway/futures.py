"""retrieve_future: held open until the outcome is there, or 408 try_again after poll_hold_s."""

import asyncio
import contextlib
import time

import orjson
from aiohttp import web

from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.errors import Gone, NotFound, TooManyRequests, Unsupported
from luthier_core.futures import FutureId
from luthier_core.oplog import REDIS_ERRORS
from luthier_core.ops import Body, Outcome
from luthier_core.types import RetrieveFuture, parse
from luthier_gateway.backends import BACKENDS, TENANT, Backends
from luthier_gateway.web_io import json_response, read_body

PROTOBUF = "application/x-protobuf"
TROUBLE_HOLD_S = 10.0
"""How long a poll is held while Redis is away: never a fast 5xx, which is polled again at once."""


async def retrieve_future(request: web.Request) -> web.Response:
    backends, tenant = request.app[BACKENDS], request[TENANT]
    wanted = parse(RetrieveFuture, await read_body(request, 64 * 1024))
    future = FutureId.parse(wanted.request_id)
    if future is None:
        raise NotFound(f"request_id={wanted.request_id!r}")
    if backends.futures.num_waiting >= backends.config.gateway.max_open_polls:
        raise TooManyRequests("too many requests wait for results on this gateway")
    try:
        # The common case first: an outcome that is there already needs no waiting.
        await _check_tenant(backends, tenant, future)
        outcome = await backends.futures.outcome(future)
        if outcome is None:
            await _check_admitted(backends, future)
            outcome = await backends.futures.wait(
                future, timeout_s=backends.config.gateway.poll_hold_s
            )
        if outcome is None:
            return _try_again(wanted.request_id, *await _queue_state(backends, future))
        response = await _deliver(request, backends.blobs, outcome)
    except REDIS_ERRORS:
        await asyncio.sleep(TROUBLE_HOLD_S)
        reason = "the server's queue is restarting; nothing accepted is lost"
        return _try_again(wanted.request_id, "paused_capacity", reason)
    if outcome.failed and future.kind == "train":
        await _tell(request, response, backends, future)
    return response


async def _check_tenant(backends: Backends, tenant: str, future: FutureId) -> None:
    """NotFound, the same for absent and foreign ids."""
    if future.kind == "train":
        await backends.run(tenant, future.parent, field="request_id")
    else:
        await backends.sampler(tenant, future.parent)


async def _check_admitted(backends: Backends, future: FutureId) -> None:
    """Gone if no outcome can ever come: the id was never admitted, or its result has expired."""
    if future.kind == "sample":
        if not await backends.oplog.redis.exists(future.outcome_key):
            raise Gone(f"request_id={future.parent}:{future.seq}")
        return
    seq = int(future.seq)
    header = await backends.oplog.header(future.parent)
    if header is None or (
        seq > header.admitted and not await backends.oplog.is_parked(future.parent, seq)
    ):
        raise Gone(f"request_id={future.parent}:{seq} was not accepted")
    if seq <= header.committed and await backends.futures.outcome(future) is None:
        raise Gone(f"request_id={future.parent}:{seq}")


async def _deliver(request: web.Request, blobs: Blobs, outcome: Outcome) -> web.Response:
    body = await _bytes_of(blobs, outcome.body)
    if outcome.failed:
        return json_response({"error": body.decode(), "category": outcome.category})
    if outcome.encoding == "json":
        return web.Response(body=body, content_type="application/json")
    if PROTOBUF not in request.headers.get("Accept", ""):
        raise Unsupported(f"Accept: results of this kind are {PROTOBUF} (SDK 0.25.0 or newer)")
    return web.Response(body=body, content_type=PROTOBUF)


async def _bytes_of(blobs: Blobs, body: Body) -> bytes:
    if body.inline is not None:
        return body.inline
    try:
        return await blobs.get(body.key)
    except BlobMissing:
        raise Gone("the result's bytes have expired") from None


async def _tell(
    request: web.Request, response: web.Response, backends: Backends, future: FutureId
) -> None:
    """Send an error, then record that the client knows of this failure (reliability 1.6).

    In this order: a client that was not told must not have its optimizer step obeyed.
    """
    await response.prepare(request)
    await response.write_eof()
    with contextlib.suppress(*REDIS_ERRORS):
        await backends.oplog.told(future.parent, int(future.seq))


async def _queue_state(backends: Backends, future: FutureId) -> tuple[str, str]:
    """(queue_state, reason) in words for the person who waits."""
    if future.kind == "sample":
        return "active", "the sample is queued or being generated"
    header = await backends.oplog.header(future.parent)
    if header is None:
        return "active", "the run is being created"
    seq = int(future.seq)
    if seq > header.admitted:
        return "active", f"waiting for seq {header.admitted + 1}, which has not arrived"
    if not header.owner:
        # The gateway that admitted it may have died before it told the workers.
        await backends.oplog.announce_run(header.base_model, future.parent, time.time())
        reason = f"waiting for a trainer of {header.base_model} to take the run"
        return "paused_capacity", reason
    return "active", f"{seq - header.committed - 1} operations of this run are ahead"


def _try_again(request_id: str, queue_state: str, reason: str) -> web.Response:
    body = {
        "type": "try_again",
        "request_id": request_id,
        "queue_state": queue_state,
        "queue_state_reason": reason,
    }
    return web.Response(body=orjson.dumps(body), status=408, content_type="application/json")
