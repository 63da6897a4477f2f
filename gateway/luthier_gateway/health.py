"""Is the service ready: the registry, and per configured model a trainer and a sampler."""

import contextlib
from importlib.metadata import version

from aiohttp import web

from luthier_core.errors import LuthierError, NotFound
from luthier_core.oplog import REDIS_ERRORS
from luthier_gateway.backends import BACKENDS, TENANT, Backends
from luthier_gateway.web_io import json_response

MAX_COUNTED = 1000
"""Live runs that are looked at for one answer."""


async def healthz(request: web.Request) -> web.Response:
    """200 only when every model can train and sample; else 503 naming what is missing."""
    missing = await _missing(request.app[BACKENDS])
    if missing:
        detail = f"not ready: {', '.join(missing)}"
        return json_response({"status": "starting", "detail": detail, "missing": missing}, 503)
    return json_response({"status": "ok"})


async def health(request: web.Request) -> web.Response:
    """What some clients ask for instead of healthz, with the caller's own runs and sessions."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    live = [
        run_id
        for name in backends.config.model_names
        for run_id in await backends.oplog.live_runs(name)
    ]
    own = []
    for run_id in live[:MAX_COUNTED]:
        with contextlib.suppress(NotFound):
            await backends.run(tenant, run_id)
            own.append(run_id)
    return json_response(
        {
            "status": "degraded" if await _missing(backends) else "healthy",
            "version": version("luthier"),
            "ray_status": "not used",
            "active_models": len(own),
            "active_sessions": len({run_id.partition(":")[0] for run_id in own}),
        }
    )


async def livez(request: web.Request) -> web.Response:
    """This process answers."""
    return json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """This process can serve: a lost trainer does not take gateways out."""
    if detail := await unready(request.app):
        return json_response({"status": "unready", "detail": detail}, 503)
    return json_response({"status": "ok"})


async def unready(app: web.Application) -> str:
    """Why this process cannot serve; empty if it can."""
    try:
        await app[BACKENDS].oplog.redis.ping()
    except REDIS_ERRORS:
        return "redis"
    return ""


async def _missing(backends: Backends) -> list[str]:
    missing = []
    try:
        await backends.registry.ready()
    except LuthierError:
        missing.append("registry")
    try:
        workers = (await backends.oplog.live_workers()).values()
    except REDIS_ERRORS:
        return [*missing, "redis"]
    ready = {(w["role"], w["base_model"]) for w in workers if w["state"] == "ready"}
    for name in backends.config.model_names:
        wanted = [(role, name) for role in ("trainer", "sampler")]
        missing += [f"{role} of {name}" for role, name in wanted if (role, name) not in ready]
    return missing
