"""The gateway's route table, middlewares and connections."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler
from redis.exceptions import OutOfMemoryError

from luthier_core.blobs import open_blobs
from luthier_core.caller import CALLER
from luthier_core.config import Config
from luthier_core.errors import LuthierError, NotFound, TooManyRequests, Unavailable
from luthier_core.futures import Futures
from luthier_core.oplog import REDIS_ERRORS, Oplog, connect
from luthier_core.redis_server import check_server
from luthier_core.registry_client import RegistryClient
from luthier_gateway import (
    access,
    admin,
    checkpoints,
    files,
    forward_backward,
    futures,
    health,
    moves,
    observing,
    openapi,
    queues,
    rest,
    sampling,
    sessions,
    training,
    uploads,
    usage,
)
from luthier_gateway.auth import Authenticator, Turns
from luthier_gateway.backends import BACKENDS, TENANT, Backends
from luthier_gateway.client_version import refuse_too_old
from luthier_gateway.generation import GENERATION, NOT_CONFIRMED, GenerationWatch
from luthier_gateway.openai import errors as openai_errors
from luthier_gateway.openai import handlers as openai
from luthier_gateway.quotas import QUOTAS, Quotas
from luthier_gateway.web_io import error_response

log = logging.getLogger(__name__)

API = "/api/v1"
_CHECKPOINT = (
    "/training_runs/{run_id}/checkpoints/{kind:weights|sampler_weights|external_weights}/{name}"
)
OPEN_PATHS = frozenset({f"{API}/healthz", "/livez", "/readyz"})
"""Paths that need no key."""
POLLS = frozenset({f"{API}/retrieve_future", f"{API}/retrieve_futures"})


def routes() -> list[web.RouteDef]:
    return [
        web.get("/livez", health.livez),
        web.get("/readyz", health.readyz),
        web.get(f"{API}/healthz", health.healthz),
        web.get("/health", health.health),
        web.post(f"{API}/client/config", sessions.client_config),
        web.post(f"{API}/client/dynamic_config", sessions.dynamic_config),
        web.post(f"{API}/create_session", sessions.create_session),
        web.post(f"{API}/session_heartbeat", sessions.session_heartbeat),
        web.post(f"{API}/sessions/{{session_id}}/finish", sessions.finish_session),
        web.post(f"{API}/telemetry", sessions.telemetry),
        web.get(f"{API}/get_server_capabilities", sessions.get_server_capabilities),
        web.post(f"{API}/create_model", training.create_model),
        web.post(f"{API}/get_info", training.get_info),
        web.post(f"{API}/forward_backward", forward_backward.forward_backward),
        web.post(f"{API}/forward", forward_backward.forward),
        web.post(f"{API}/optim_step", training.optim_step),
        web.post(f"{API}/save_weights", training.save_weights),
        web.post(f"{API}/save_weights_for_sampler", training.save_weights_for_sampler),
        web.post(f"{API}/save_weights_external", training.save_weights_external),
        web.post(f"{API}/load_weights", training.load_weights),
        web.post(f"{API}/create_custom_loss", training.create_custom_loss),
        web.post(f"{API}/create_sampling_session", sampling.create_sampling_session),
        web.post(f"{API}/join_sampling_session", sampling.join_sampling_session),
        web.post(f"{API}/asample", sampling.asample),
        web.post(f"{API}/retrieve_future", futures.retrieve_future),
        web.post(f"{API}/retrieve_futures", futures.retrieve_futures),
        web.post(f"{API}/cancel_future", futures.cancel_future),
        web.get(f"{API}/futures/{{request_id}}", futures.future_status),
        *_bookkeeping_routes(),
        *openai.routes(),
        *admin.routes(f"{API}/admin"),
        *usage.routes(API),
        *queues.routes(API),
        *moves.routes(API),
        web.get(f"{API}/openapi.json", openapi.get_openapi),
    ]


def _bookkeeping_routes() -> list[web.RouteDef]:
    checkpoint = f"{API}{_CHECKPOINT}"
    return [
        web.post(f"{API}/weights_info", checkpoints.weights_info),
        web.post(f"{API}/copy_weights", checkpoints.copy_weights),
        web.get(f"{API}/samplers/{{sampler_id}}", rest.get_sampler),
        web.get(f"{API}/training_runs", rest.list_training_runs),
        web.get(f"{API}/training_runs/{{run_id}}", rest.get_training_run),
        web.get(f"{API}/training_runs/{{run_id}}/checkpoints", checkpoints.list_run_checkpoints),
        web.get(f"{API}/models/{{run_id}}/checkpoints", checkpoints.list_run_checkpoints),
        web.get(f"{API}/training_runs/{{run_id}}/keep_last", checkpoints.get_keep_last),
        web.put(f"{API}/training_runs/{{run_id}}/keep_last", checkpoints.set_keep_last),
        web.delete(checkpoint, checkpoints.delete_checkpoint),
        web.post(f"{checkpoint}/publish", checkpoints.publish_checkpoint),
        web.delete(f"{checkpoint}/publish", checkpoints.unpublish_checkpoint),
        web.put(f"{checkpoint}/ttl", checkpoints.set_checkpoint_ttl),
        web.get(f"{checkpoint}/archive", checkpoints.get_checkpoint_archive),
        web.get(f"{checkpoint}/external_weights_urls", checkpoints.get_external_weights_urls),
        web.get(f"{API}/checkpoints", checkpoints.list_checkpoints),
        web.post(f"{API}/uploads", uploads.create_upload),
        web.put(f"{API}/uploads/{{upload_id}}", uploads.put_upload),
        web.get(f"{files.PREFIX}{{key:.+}}", files.download, allow_head=False),
        web.get(f"{API}/sessions", rest.list_sessions),
        web.post(f"{API}/sessions/search", rest.search_sessions),
        web.get(f"{API}/sessions/{{session_id}}", rest.get_session),
        web.put(f"{API}/sessions/{{session_id}}/project", rest.set_session_project),
        web.get(f"{API}/sessions/{{session_id}}/trace_export", rest.export_trace),
        web.get(f"{API}/auth/apikey/me", rest.get_own_key),
        web.delete(f"{API}/auth/apikey/me", rest.revoke_own_key),
        web.post(f"{API}/auth/apikey", rest.refuse_key_exchange),
        web.post(f"{API}/auth/token", rest.refuse_key_exchange),
        web.get(f"{API}/audit", rest.get_audit),
    ]


def needs_key(path: str) -> bool:
    """Whether a request for this path must carry an API key."""
    return path not in OPEN_PATHS and not path.startswith(files.PREFIX)


def build_app(config: Config) -> web.Application:
    """The application; its connections open when it starts and close when it stops."""
    app = web.Application(
        middlewares=[observing.observe, hold_failed_polls, answer_errors, authenticate],
        client_max_size=config.gateway.max_body_bytes,
        handler_args={
            "auto_decompress": False,  # web_io does it, within tighter limits
            "keepalive_timeout": config.gateway.idle_connection_s,
        },
    )
    app.add_routes(routes())
    access.check_rules(route for route in routes() if needs_key(route.path))
    app[observing.DELIVERED] = observing.Delivered()
    description = openapi.describe(routes(), prefix=API, open_paths=OPEN_PATHS)
    # Not by orjson: a seed has 64 bits, and its bound one more than orjson writes.
    app[openapi.DESCRIPTION] = json.dumps(description).encode()

    async def backends(app: web.Application) -> AsyncIterator[None]:
        async with open_backends(config) as opened, openai.open_openai(opened) as shared:
            app[BACKENDS], app[openai.OPENAI] = opened, shared
            watch = app[GENERATION] = GenerationWatch(opened.oplog, opened.blobs)
            recheck_s = config.gateway.recheck_s
            tasks = [
                asyncio.create_task(watch.keep_looking(recheck_s)),
                asyncio.create_task(opened.accepted_samples.keep_looking(recheck_s)),
            ]
            async with connect(config.side_redis_url()) as counters:
                app[QUOTAS] = Quotas(config, opened.oplog, counters)
                yield
            for task in tasks:
                await _cancel(task)

    app.cleanup_ctx.append(backends)
    app.on_shutdown.append(_end_long_polls)
    return app


@contextlib.asynccontextmanager
async def open_backends(config: Config) -> AsyncIterator[Backends]:
    """Connections of one gateway process, closed in reverse order."""
    async with contextlib.AsyncExitStack() as stack:
        client = connect(config.redis_url)
        stack.push_async_callback(client.aclose)
        await check_server(client, allow_volatile=config.allow_volatile_redis)
        oplog = Oplog(client)
        blobs = await stack.enter_async_context(open_blobs(config))
        registry = await stack.enter_async_context(RegistryClient(config))
        futures = Futures(client, recheck_s=config.gateway.recheck_s)
        listening = asyncio.create_task(futures.listen())
        stack.push_async_callback(_cancel, listening)
        auth = Authenticator(registry, config.secret(), cache_s=config.gateway.key_cache_s)
        yield Backends(
            config=config,
            oplog=oplog,
            futures=futures,
            blobs=blobs,
            registry=registry,
            auth=auth,
            turns=Turns(
                at_once=config.gateway.tenant_requests_at_once,
                max_waiting=config.gateway.tenant_requests_waiting,
            ),
        )


@web.middleware
async def hold_failed_polls(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The SDK repeats a poll that got a 5xx at once and for ever, so it gets one only slowly."""
    response = await handler(request)
    if response.status >= 500 and request.path in POLLS:
        await futures.hold_in_trouble()
    return response


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error becomes `{"detail": ...}` with its status; ours are logged, theirs are not.

    The OpenAI API has a form of its own.
    """
    respond = openai_errors.error_response if openai.is_openai(request.path) else error_response
    try:
        return await handler(request)
    except LuthierError as error:
        if error.status in (404, 410) and not await request.app[GENERATION].still_holds():
            return respond(Unavailable(NOT_CONFIRMED))
        return respond(error)
    except OutOfMemoryError:
        return respond(TooManyRequests("the operation log is full until more is executed"))
    except REDIS_ERRORS:
        log.warning("redis is away", exc_info=True)
        return respond(Unavailable("the operation log"))
    except web.HTTPNotFound:
        return respond(NotFound(f"{request.method} {request.path}"))
    except web.HTTPException as error:
        refused = LuthierError(error.reason)
        refused.status, refused.category = error.status, "user"
        return respond(refused)
    except Exception:
        log.exception("unexpected error in %s %s", request.method, request.path)
        return respond(LuthierError("an unexpected error; the server's log has it"))


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """All but health checks and signed links need a key; its tenant is put into the request.

    And an SDK that this server can serve, which its user is told before anything else. A tenant's
    requests take turns, but for those that wait.
    """
    CALLER.set(None)  # this task is the connection's: each of its requests sets its own
    if not needs_key(request.path):
        return await handler(request)
    if not await request.app[GENERATION].is_confirmed():
        raise Unavailable(NOT_CONFIRMED)
    backends = request.app[BACKENDS]
    if openai.is_openai(request.path):
        key = openai.api_key(request)
    else:
        refuse_too_old(request)
        key = request.headers.get("X-API-Key")
    caller = await backends.auth.caller(key)
    access.check(request, caller)
    tenant = request[TENANT] = caller.tenant
    CALLER.set(caller)
    if request.path in POLLS:
        return await handler(request)
    await request.app[QUOTAS].check(request, caller)
    if request.path in openai.GENERATING:
        return await handler(request)
    async with backends.turns.of(tenant):
        return await handler(request)


async def _end_long_polls(app: web.Application) -> None:
    """Their clients are told to try again, and a stop does not wait for them."""
    app[BACKENDS].futures.end_waits()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
