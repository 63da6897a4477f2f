"""Is the service ready: the registry, and per configured model a trainer and a sampler."""

from aiohttp import web

from luthier_core.errors import LuthierError
from luthier_core.oplog import REDIS_ERRORS
from luthier_gateway.backends import BACKENDS, Backends
from luthier_gateway.web_io import json_response


async def healthz(request: web.Request) -> web.Response:
    """200 only when every model can train and sample; else 503 naming what is missing."""
    missing = await _missing(request.app[BACKENDS])
    if missing:
        detail = f"not ready: {', '.join(missing)}"
        return json_response({"status": "starting", "detail": detail, "missing": missing}, 503)
    return json_response({"status": "ok"})


async def livez(request: web.Request) -> web.Response:
    """This process answers."""
    return json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """This process can serve: a lost trainer does not take gateways out."""
    try:
        await request.app[BACKENDS].oplog.redis.ping()
    except REDIS_ERRORS:
        return json_response({"status": "unready", "detail": "redis"}, 503)
    return json_response({"status": "ok"})


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
