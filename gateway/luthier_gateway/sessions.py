"""Bootstrap and sessions: client config, sessions, heartbeats, capabilities, telemetry."""

from aiohttp import web

from luthier_core.errors import Gone
from luthier_core.types import CreateSession, FinishSession, SessionHeartbeat, parse
from luthier_gateway.backends import BACKENDS, TENANT
from luthier_gateway.client_version import client_config as config_for
from luthier_gateway.client_version import sdk_version
from luthier_gateway.web_io import MAX_SMALL_BODY, json_response, read_body


async def client_config(request: web.Request) -> web.Response:
    """What this release of the SDK is to do differently from its defaults."""
    custom_losses = request.app[BACKENDS].config.limits.custom_losses
    return json_response(config_for(sdk_version(request), custom_losses=custom_losses))


async def dynamic_config(request: web.Request) -> web.Response:
    """Samples can be cancelled."""
    return json_response({"sample_cancel_enabled": True})


async def create_session(request: web.Request) -> web.Response:
    """A session owns training runs and sampling sessions. A retry under one key makes no second."""
    backends = request.app[BACKENDS]
    wanted = parse(CreateSession, await read_body(request, MAX_SMALL_BODY))
    record = await backends.registry.create_session(
        request[TENANT],
        tags=wanted.tags,
        user_metadata=wanted.user_metadata,
        sdk_version=wanted.sdk_version,
        project_id=wanted.project_id,
        display_name=wanted.display_name,
        idempotency_key=request.headers.get("X-Idempotency-Key"),
    )
    return json_response({"type": "create_session", "session_id": record.session_id})


async def session_heartbeat(request: web.Request) -> web.Response:
    """410 once the session is finished: the SDK's heartbeat loop then stops."""
    backends = request.app[BACKENDS]
    wanted = parse(SessionHeartbeat, await read_body(request, MAX_SMALL_BODY))
    session = await backends.registry.heartbeat(request[TENANT], wanted.session_id)
    if session.status != "active":
        raise Gone(f"session {wanted.session_id} is finished")
    return json_response({"type": "session_heartbeat"})


async def finish_session(request: web.Request) -> web.Response:
    """The first reason wins; a repeat is accepted."""
    backends = request.app[BACKENDS]
    wanted = parse(FinishSession, await read_body(request, MAX_SMALL_BODY))
    await backends.registry.finish_session(
        request[TENANT],
        request.match_info["session_id"],
        reason=wanted.reason.type,
        detail=wanted.detail,
    )
    return json_response({})


async def get_server_capabilities(request: web.Request) -> web.Response:
    backends = request.app[BACKENDS]
    models = []
    for name in backends.config.model_names:
        facts = await backends.model_facts(name)
        models.append(
            {
                "model_name": name,
                "max_context_length": facts["max_context_tokens"],
                "trainable": True,
                "sampleable": True,
            }
        )
    return json_response({"supported_models": models})


async def telemetry(request: web.Request) -> web.Response:
    """Accepted and dropped: events may hold request headers with keys."""
    await read_body(request, MAX_SMALL_BODY)
    return json_response({"status": "accepted"})
