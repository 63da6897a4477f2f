"""forward_backward and forward: protobuf is passed on as it came, and JSON becomes protobuf."""

from typing import Any

from aiohttp import web

from luthier_core.errors import BadRequest, LuthierError, Unreadable, Unsupported
from luthier_core.ops import Kind, digest_of
from luthier_core.proto import wire_pb2 as wire
from luthier_core.transcode import forward_backward_message
from luthier_core.types import ForwardBackwardInput, check, read_object
from luthier_core.validation import ModelLimits, check_forward_backward, parse_forward_backward
from luthier_gateway.backends import BACKENDS, TENANT
from luthier_gateway.submit import (
    ids_of,
    json_digest,
    off_loop_if_large,
    read_training_body,
    submit,
)
from luthier_gateway.web_io import PROTOBUF

Arrived = tuple[bytes, wire.ForwardBackwardRequest]


async def forward_backward(request: web.Request) -> web.Response:
    """Protobuf of SDKs from 0.25.0 on, or JSON of those before."""
    if request.content_type == PROTOBUF:
        return await _submit_protobuf(request)
    return await _submit_json(request, "forward_backward_input", Kind.FORWARD_BACKWARD)


async def forward(request: web.Request) -> web.Response:
    """What SDKs up to 0.24.1 call for a forward; later ones send forward_only instead."""
    if request.content_type == PROTOBUF:
        raise Unsupported("Content-Type: send protobuf to forward_backward, with forward_only set")
    return await _submit_json(request, "forward_input", Kind.FORWARD)


async def _submit_protobuf(request: web.Request) -> web.Response:
    backends, tenant = request.app[BACKENDS], request[TENANT]
    max_bytes = backends.config.gateway.max_body_bytes
    arrived = await read_training_body(request, max_bytes, _parse, Kind.FORWARD_BACKWARD)
    if isinstance(arrived, web.Response):
        return arrived
    body, message = arrived
    if message.seq_id < 1:
        raise Unreadable("seq_id: must be from 1 to 2147483647")
    run = await backends.working_run(tenant, message.model_id, message.seq_id)
    problem: LuthierError | None = None
    try:
        limits = backends.limits_of(run.facts)
        await off_loop_if_large(len(body), check_forward_backward, message, limits)
    except BadRequest as error:
        problem = error
    return await submit(
        backends,
        tenant,
        message.model_id,
        message.seq_id,
        kind=Kind.FORWARD if message.forward_only else Kind.FORWARD_BACKWARD,
        body=body,
        digest=digest_of(body),
        base_model=run.base_model,
        problem=problem,
    )


async def _submit_json(request: web.Request, field: str, kind: Kind) -> web.Response:
    backends, tenant = request.app[BACKENDS], request[TENANT]
    max_bytes = backends.config.gateway.max_body_bytes
    value = await read_training_body(request, max_bytes, read_object, kind)
    if isinstance(value, web.Response):
        return value
    run_id, seq = ids_of(value)
    run = await backends.working_run(tenant, run_id, seq)
    size = _size_of(request, max_bytes)
    problem: LuthierError | None = None
    try:
        limits = backends.limits_of(run.facts)
        body = await off_loop_if_large(size, _transcode, value, field, kind, limits)
        digest = digest_of(body)
    except BadRequest as error:
        body, problem = b"", error
        digest = await off_loop_if_large(size, json_digest, value)
    return await submit(
        backends,
        tenant,
        run_id,
        seq,
        kind=kind,
        body=body,
        digest=digest,
        base_model=run.base_model,
        problem=problem,
    )


def _size_of(request: web.Request, max_bytes: int) -> int:
    """Of the body, or as much as it may be: a compressed one is larger than it says."""
    if "Content-Encoding" in request.headers or request.content_length is None:
        return max_bytes
    return request.content_length


def _parse(body: bytes) -> Arrived:
    return body, parse_forward_backward(body)


def _transcode(value: dict[str, Any], field: str, kind: Kind, limits: ModelLimits) -> bytes:
    """The request as protobuf that has passed its check; BadRequest if it has not."""
    message = forward_backward_message(
        check(ForwardBackwardInput, _input_of(value, field)),
        model_id=value["model_id"],
        seq_id=value["seq_id"],
        forward_only=kind is Kind.FORWARD,
    )
    check_forward_backward(message, limits)
    # Map entries in a fixed order: dedupe compares the bytes.
    return message.SerializeToString(deterministic=True)


def _input_of(value: dict[str, Any], field: str) -> Any:
    """The object with the data; in some clients' dialect it is the request itself."""
    return value if value.get(field) is None else value[field]
