"""The registry's internal REST for the gateway: route table, errors, handlers.

Every call but /livez and /readyz carries the service token; all but /keys name the caller's tenant
in X-Luthier-Tenant. An error is {"error": class, "detail", "category"} under its status.
"""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from luthier_core.auth import service_token
from luthier_core.blobs import open_blobs
from luthier_core.config import Config
from luthier_core.errors import (
    BodyTooLarge,
    LuthierError,
    NotFound,
    Unauthorized,
    Unavailable,
)
from luthier_core.failpoints import failpoint
from luthier_core.oplog import REDIS_ERRORS, Oplog, connect
from luthier_core.registry_client import MAX_BODY_BYTES
from luthier_core.usage import Prices
from luthier_registry import admin_calls, checkpoint_calls, move_calls, usage_calls
from luthier_registry.audit import Audit
from luthier_registry.audited import record_event
from luthier_registry.builds import Builds
from luthier_registry.checkpoints import Checkpoints
from luthier_registry.copies import Copies
from luthier_registry.counting import Counting
from luthier_registry.housekeeping import build_jobs
from luthier_registry.identity import Identities
from luthier_registry.lists import Lists
from luthier_registry.observing import Observer
from luthier_registry.rebuild import Rebuild
from luthier_registry.requests import (
    CreateRun,
    CreateSampler,
    CreateSession,
    FinishSession,
    SearchSessions,
    SetProject,
    parse,
)
from luthier_registry.retention import Retention
from luthier_registry.sessions import Sessions
from luthier_registry.store import Store
from luthier_registry.traces import Traces
from luthier_registry.uploads import Uploads
from luthier_registry.usage import Usage
from luthier_registry.web_io import (
    AUDIT,
    CHECKPOINTS,
    COPIES,
    IDENTITIES,
    JOBS,
    OBSERVER,
    OPLOG,
    REBUILD,
    RETENTION,
    SESSIONS,
    STORE,
    TENANT_OF_EVENT,
    TRACES,
    UPLOADS,
    USAGE,
    actor_of,
    json_of,
    page_of,
    project_of,
    tenant_of,
)

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/livez", "/readyz"})
LISTS = frozenset({"/sessions", "/runs", "/checkpoints", "/runs/{run}/checkpoints"})


def build_app(
    config: Config, *, clock: Callable[[], datetime] | None = None, keeps_house: bool = True
) -> web.Application:
    """The application; its connections open when it starts and close when it stops.

    Without `keeps_house` its jobs run only when they are asked for.
    """
    app = web.Application(
        middlewares=[
            answer_errors,
            _authenticate(service_token(config.secret())),
            pass_failpoints,
            record_event,
            list_whole,
        ],
        client_max_size=MAX_BODY_BYTES,
    )
    app.add_routes(
        [
            web.get("/livez", livez),
            web.get("/readyz", readyz),
            web.get("/keys/{key}", get_key),
            web.delete("/keys/{key}", revoke_key),
            web.post("/sessions", create_session),
            web.post("/sessions/search", search),
            web.get("/sessions", list_sessions),
            web.get("/sessions/{session}", get_session),
            web.post("/sessions/{session}/heartbeat", heartbeat),
            web.post("/sessions/{session}/finish", finish_session),
            web.put("/sessions/{session}/project", set_project),
            web.post("/sessions/{session}/trace", make_trace),
            web.post("/runs", create_run),
            web.get("/runs", list_runs),
            web.get("/runs/{run}", get_run),
            *checkpoint_calls.routes(),
            *admin_calls.routes(),
            *usage_calls.routes(),
            *move_calls.routes(),
            web.post("/samplers", create_sampler),
            web.get("/samplers/{sampler}", get_sampler),
        ]
    )

    async def store(app: web.Application) -> AsyncIterator[None]:
        async with (
            connect(config.redis_url) as client,
            open_blobs(config) as blobs,
            Builds() as builds,
        ):
            now = clock or (lambda: datetime.now(UTC))
            lists = Lists(blobs, client, clock=now)
            checkpoints = Checkpoints(
                blobs,
                client,
                builds,
                lists,
                clock=now,
                archives_by_job=config.housekeeping.runner == "celery",
            )
            app[CHECKPOINTS] = checkpoints
            sessions = Sessions(blobs, client, config.secret(), clock=now)
            app[SESSIONS] = sessions
            app[IDENTITIES] = Identities(blobs, client, config.secret(), clock=now)
            app[AUDIT] = Audit(blobs, client, config.secret(), clock=now)
            app[STORE] = Store(blobs, client, sessions, checkpoints, config, clock=now)
            app[COPIES] = Copies(app[STORE], checkpoints, blobs, builds, lists)
            app[UPLOADS] = Uploads(app[STORE], sessions, blobs, client, lists, clock=now)
            app[RETENTION] = Retention(
                blobs, client, lists, default=config.housekeeping.keep_last, clock=now
            )
            app[USAGE] = Usage(blobs, client, Prices(config), clock=now)
            app[TRACES] = Traces(blobs, client, sessions, app[USAGE], builds, clock=now)
            jobs = app[JOBS] = build_jobs(config, blobs, client, clock=now)
            oplog = app[OPLOG] = Oplog(client)
            counting = Counting(blobs, oplog, config.model_names, clock=now)
            app[REBUILD] = Rebuild(config, blobs, client, counting, clock=now)
            app[OBSERVER] = Observer(oplog, jobs, config.model_names, clock=now)
            async with contextlib.AsyncExitStack() as running:
                if keeps_house and config.housekeeping.runner == "registry":
                    keeping = asyncio.create_task(jobs.keep_running())
                    running.push_async_callback(_cancel, keeping)
                yield

    app.cleanup_ctx.append(store)
    return app


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


# --- middlewares ----------------------------------------------------------------------------------


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error becomes JSON; only unexpected ones are logged with their trace."""
    try:
        return await handler(request)
    except LuthierError as error:
        return _error(error)
    except REDIS_ERRORS as error:
        log.warning("redis: %r", error)
        return _error(Unavailable("the registry's index"))
    except web.HTTPRequestEntityTooLarge:
        return _error(BodyTooLarge(f"at most {MAX_BODY_BYTES} bytes"))
    except web.HTTPException as error:
        log.warning("%s %s: %s", request.method, request.path, error.reason)
        return _error(NotFound(f"{request.method} {request.path}"))
    except Exception:
        log.exception("unexpected error in %s %s", request.method, request.path)
        return _error(LuthierError("an unexpected error in the registry"))


@web.middleware
async def pass_failpoints(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A test may end this process before a call that writes, or when it has written."""
    if request.method == "GET":
        return await handler(request)
    kind = getattr(request.match_info.handler, "__name__", "")
    await failpoint("rg.before", kind)
    response = await handler(request)
    await failpoint("rg.after", kind)
    return response


@web.middleware
async def list_whole(request: web.Request, handler: Handler) -> web.StreamResponse:
    """No list is answered that may lack what a restarted Redis has lost."""
    resource = request.match_info.route.resource
    if request.method == "GET" and resource is not None and resource.canonical in LISTS:
        return await request.app[REBUILD].read_whole(lambda: handler(request))
    return await handler(request)


def _authenticate(token: str) -> Middleware:
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Only the gateway and the workers know the service token."""
        given = request.headers.get("Authorization", "").encode(errors="replace")
        if request.path not in OPEN_PATHS and not hmac.compare_digest(given, expected):
            raise Unauthorized("the registry needs the service token")
        return await handler(request)

    return authenticate


def _error(error: LuthierError) -> web.Response:
    body = {
        "error": type(error).__name__,
        "detail": error.detail,
        "category": error.category,
    }
    return web.json_response(body, status=error.status)


# --- handlers -------------------------------------------------------------------------------------


async def livez(request: web.Request) -> web.Response:
    """This process answers."""
    return web.json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """Redis and the object store answer as well."""
    await unready(request.app)
    return web.json_response({"status": "ok"})


async def unready(app: web.Application) -> str:
    """Empty if this process can serve; raises what is away."""
    await app[STORE].check()
    return ""


async def get_key(request: web.Request) -> web.Response:
    return json_of(await request.app[IDENTITIES].identity(request.match_info["key"]))


async def revoke_key(request: web.Request) -> web.Response:
    record = await request.app[IDENTITIES].revoke(request.match_info["key"])
    request[TENANT_OF_EVENT] = record.tenant
    return json_of(record)


async def create_session(request: web.Request) -> web.Response:
    wanted = parse(CreateSession, await request.read())
    return json_of(
        await request.app[SESSIONS].create(
            tenant_of(request),
            wanted,
            key_id=actor_of(request),
            key_project=project_of(request),
        )
    )


async def list_sessions(request: web.Request) -> web.Response:
    offset, limit = page_of(request)
    return web.json_response(
        await request.app[SESSIONS].page(tenant_of(request), offset=offset, limit=limit)
    )


async def get_session(request: web.Request) -> web.Response:
    return web.json_response(
        await request.app[SESSIONS].describe(tenant_of(request), request.match_info["session"])
    )


async def heartbeat(request: web.Request) -> web.Response:
    return json_of(
        await request.app[SESSIONS].heartbeat(tenant_of(request), request.match_info["session"])
    )


async def finish_session(request: web.Request) -> web.Response:
    wanted = parse(FinishSession, await request.read())
    return json_of(
        await request.app[SESSIONS].finish(
            tenant_of(request), request.match_info["session"], wanted.reason, wanted.detail
        )
    )


async def make_trace(request: web.Request) -> web.Response:
    """What to sign: the object key of the session's timeline; null while it is being made."""
    key: str | None = None
    with contextlib.suppress(Unavailable):
        key = await request.app[TRACES].make(tenant_of(request), request.match_info["session"])
    return web.json_response({"key": key})


async def set_project(request: web.Request) -> web.Response:
    wanted = parse(SetProject, await request.read())
    return json_of(
        await request.app[SESSIONS].set_project(
            tenant_of(request),
            request.match_info["session"],
            wanted.project_id,
            key_project=project_of(request),
        )
    )


async def search(request: web.Request) -> web.Response:
    wanted = parse(SearchSessions, await request.read())
    return web.json_response(await request.app[SESSIONS].search(tenant_of(request), wanted))


async def create_run(request: web.Request) -> web.Response:
    wanted = parse(CreateRun, await request.read())
    return json_of(await request.app[STORE].create_run(tenant_of(request), wanted))


async def list_runs(request: web.Request) -> web.Response:
    offset, limit = page_of(request)
    return web.json_response(
        await request.app[STORE].list_runs(
            tenant_of(request),
            offset=offset,
            limit=limit,
            project_id=request.query.get("project_id"),
        )
    )


async def get_run(request: web.Request) -> web.Response:
    return web.json_response(
        await request.app[STORE].describe_run(
            tenant_of(request),
            request.match_info["run"],
            accessible=request.query.get("accessible") == "1",
        )
    )


async def create_sampler(request: web.Request) -> web.Response:
    wanted = parse(CreateSampler, await request.read())
    return json_of(await request.app[STORE].create_sampler(tenant_of(request), wanted))


async def get_sampler(request: web.Request) -> web.Response:
    store = request.app[STORE]
    return json_of(await store.sampler(tenant_of(request), request.match_info["sampler"]))
