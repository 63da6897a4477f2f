"""The registry's internal REST for the gateway: route table, errors, handlers.

Every call but /livez and /readyz carries the service token; all but /keys name the caller's tenant
in X-Luthier-Tenant. An error is {"error": class, "detail", "category"} under its status.
"""

import hmac
import logging
import re
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from luthier_core.auth import service_token
from luthier_core.blobs import open_blobs
from luthier_core.checkpoints import PATH_KINDS, TinkerPath, check_name
from luthier_core.config import Config
from luthier_core.errors import (
    BodyTooLarge,
    InvalidField,
    LuthierError,
    NotFound,
    Unauthorized,
    Unavailable,
)
from luthier_core.oplog import REDIS_ERRORS, connect
from luthier_core.records import Record
from luthier_core.registry_client import MAX_BODY_BYTES, TENANT_HEADER
from luthier_registry.requests import (
    CreateRun,
    CreateSampler,
    CreateSession,
    FinishSession,
    Path,
    parse,
)
from luthier_registry.store import Store

log = logging.getLogger(__name__)

STORE = web.AppKey("store", Store)
MAX_PAGE = 1000
OPEN_PATHS = frozenset({"/livez", "/readyz"})


def build_app(config: Config, *, clock: Callable[[], datetime] | None = None) -> web.Application:
    """The application; its connections open when it starts and close when it stops."""
    app = web.Application(
        middlewares=[answer_errors, _authenticate(service_token(config.secret()))],
        client_max_size=MAX_BODY_BYTES,
    )
    app.add_routes(
        [
            web.get("/livez", livez),
            web.get("/readyz", readyz),
            web.get("/keys/{key}", get_key),
            web.post("/sessions", create_session),
            web.get("/sessions", list_sessions),
            web.get("/sessions/{session}", get_session),
            web.post("/sessions/{session}/heartbeat", heartbeat),
            web.post("/sessions/{session}/finish", finish_session),
            web.post("/runs", create_run),
            web.get("/runs", list_runs),
            web.get("/runs/{run}", get_run),
            web.get("/runs/{run}/checkpoints", list_run_checkpoints),
            web.delete("/runs/{run}/checkpoints/{kind}/{name}", delete_checkpoint),
            web.get("/checkpoints", list_checkpoints),
            web.post("/samplers", create_sampler),
            web.get("/samplers/{sampler}", get_sampler),
            web.post("/resolve", resolve),
            web.post("/weights_info", weights_info),
        ]
    )

    async def store(app: web.Application) -> AsyncIterator[None]:
        async with connect(config.redis_url) as client, open_blobs(config) as blobs:
            app[STORE] = Store(blobs, client, config, clock=clock or (lambda: datetime.now(UTC)))
            yield

    app.cleanup_ctx.append(store)
    return app


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
    await request.app[STORE].check()
    return web.json_response({"status": "ok"})


async def get_key(request: web.Request) -> web.Response:
    return _json(await request.app[STORE].api_key(request.match_info["key"]))


async def create_session(request: web.Request) -> web.Response:
    wanted = parse(CreateSession, await request.read())
    return _json(await request.app[STORE].create_session(_tenant(request), wanted))


async def list_sessions(request: web.Request) -> web.Response:
    offset, limit = _page(request)
    store = request.app[STORE]
    return web.json_response(
        await store.list_sessions(_tenant(request), offset=offset, limit=limit)
    )


async def get_session(request: web.Request) -> web.Response:
    store = request.app[STORE]
    return web.json_response(
        await store.describe_session(_tenant(request), request.match_info["session"])
    )


async def heartbeat(request: web.Request) -> web.Response:
    store = request.app[STORE]
    return _json(await store.heartbeat(_tenant(request), request.match_info["session"]))


async def finish_session(request: web.Request) -> web.Response:
    wanted = parse(FinishSession, await request.read())
    return _json(
        await request.app[STORE].finish_session(
            _tenant(request), request.match_info["session"], wanted.reason, wanted.detail
        )
    )


async def create_run(request: web.Request) -> web.Response:
    wanted = parse(CreateRun, await request.read())
    return _json(await request.app[STORE].create_run(_tenant(request), wanted))


async def list_runs(request: web.Request) -> web.Response:
    offset, limit = _page(request)
    store = request.app[STORE]
    return web.json_response(await store.list_runs(_tenant(request), offset=offset, limit=limit))


async def get_run(request: web.Request) -> web.Response:
    store = request.app[STORE]
    return web.json_response(await store.describe_run(_tenant(request), request.match_info["run"]))


async def list_run_checkpoints(request: web.Request) -> web.Response:
    """All of them: this list has no pages (wire protocol 8.2)."""
    page = await request.app[STORE].list_checkpoints(
        _tenant(request), request.match_info["run"], offset=0, limit=2**31
    )
    return web.json_response({"checkpoints": page["checkpoints"], "cursor": None})


async def list_checkpoints(request: web.Request) -> web.Response:
    offset, limit = _page(request)
    store = request.app[STORE]
    return web.json_response(
        await store.list_checkpoints(_tenant(request), offset=offset, limit=limit)
    )


async def delete_checkpoint(request: web.Request) -> web.Response:
    run_id, kind = request.match_info["run"], request.match_info["kind"]
    store, tenant = request.app[STORE], _tenant(request)
    await store.run(tenant, run_id)
    if kind not in PATH_KINDS:
        raise NotFound(f"checkpoint {kind!r}")
    path = TinkerPath(run_id, kind, check_name(request.match_info["name"]))
    await store.delete_checkpoint(tenant, path)
    return web.json_response({})


async def create_sampler(request: web.Request) -> web.Response:
    wanted = parse(CreateSampler, await request.read())
    return _json(await request.app[STORE].create_sampler(_tenant(request), wanted))


async def get_sampler(request: web.Request) -> web.Response:
    store = request.app[STORE]
    return _json(await store.sampler(_tenant(request), request.match_info["sampler"]))


async def resolve(request: web.Request) -> web.Response:
    path = TinkerPath.parse(parse(Path, await request.read()).tinker_path)
    return _json(await request.app[STORE].checkpoint(_tenant(request), path))


async def weights_info(request: web.Request) -> web.Response:
    path = TinkerPath.parse(parse(Path, await request.read()).tinker_path, "tinker_path")
    return web.json_response(await request.app[STORE].weights_info(_tenant(request), path))


# --- parts of a request ---------------------------------------------------------------------------


def _tenant(request: web.Request) -> str:
    """The caller's tenant, from the gateway."""
    return check_name(request.headers.get(TENANT_HEADER, ""), TENANT_HEADER)


def _page(request: web.Request) -> tuple[int, int]:
    """(offset, limit) of the query."""
    return (
        _whole_number(request, "offset", 0, 0, 2**31),
        _whole_number(request, "limit", 100, 1, MAX_PAGE),
    )


def _whole_number(request: web.Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query.get(name, str(default))
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII) or not least <= int(text) <= most:
        raise InvalidField(f"{name}={text[:50]!r} must be {least}..{most}")
    return int(text)


def _json(record: Record) -> web.Response:
    return web.Response(body=record.to_bytes(), content_type="application/json")
