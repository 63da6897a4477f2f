"""Bookkeeping calls about runs, sessions and keys, forwarded to the registry."""

import contextlib
from urllib.parse import urlencode

from aiohttp import web

from luthier_core.auth import key_id
from luthier_core.errors import InvalidField, Unavailable, Unsupported
from luthier_core.rest_types import SearchSessions, SetProject
from luthier_core.types import parse
from luthier_gateway import files
from luthier_gateway.backends import BACKENDS, TENANT
from luthier_gateway.web_io import MAX_SMALL_BODY, json_response, page_of, read_body

ACCESS_SCOPES = ("owned", "accessible")
_AUDIT_QUERY = (("event_type", "all"), ("day", ""))


async def list_training_runs(request: web.Request) -> web.Response:
    """Training runs of all projects or one, latest first."""
    limit, offset = page_of(request, default_limit=20)
    _access_scope(request)
    page = await request.app[BACKENDS].registry.list_runs(
        request[TENANT], limit=limit, offset=offset, project_id=request.query.get("project_id")
    )
    return json_response(page)


async def get_training_run(request: web.Request) -> web.Response:
    """One training run; in scope `accessible` also another's of which something is published."""
    run_id, scope = request.match_info["run_id"], _access_scope(request)
    return json_response(
        await request.app[BACKENDS].registry.describe_run(
            request[TENANT], run_id, accessible=scope == "accessible"
        )
    )


async def list_sessions(request: web.Request) -> web.Response:
    """Ids of sessions, latest first."""
    limit, offset = page_of(request, default_limit=20)
    _access_scope(request)
    page = await request.app[BACKENDS].registry.list_sessions(
        request[TENANT], limit=limit, offset=offset
    )
    return json_response(page)


async def get_session(request: web.Request) -> web.Response:
    """A session with the ids of its runs and sampling sessions."""
    session_id = request.match_info["session_id"]
    _access_scope(request)
    return json_response(
        await request.app[BACKENDS].registry.describe_session(request[TENANT], session_id)
    )


async def search_sessions(request: web.Request) -> web.Response:
    """Sessions that fit every condition, latest first."""
    wanted = parse(SearchSessions, await read_body(request, MAX_SMALL_BODY))
    return json_response(
        await request.app[BACKENDS].registry.search_sessions(
            request[TENANT], wanted.model_dump(mode="json", exclude_none=True)
        )
    )


async def set_session_project(request: web.Request) -> web.Response:
    """Move a session with its runs into a project."""
    wanted = parse(SetProject, await read_body(request, MAX_SMALL_BODY))
    await request.app[BACKENDS].registry.set_project(
        request[TENANT], request.match_info["session_id"], wanted.project_id
    )
    return json_response({})


async def get_sampler(request: web.Request) -> web.Response:
    """What a sampling session samples from."""
    backends = request.app[BACKENDS]
    sampler = await backends.sampler(request[TENANT], request.match_info["sampler_id"])
    answer = {"sampler_id": sampler.sampling_session_id, "base_model": sampler.base_model}
    with contextlib.suppress(Unavailable):  # a model that is not served any more has a name left
        answer["tokenizer_id"] = (await backends.model_facts(sampler.base_model))["tokenizer_id"]
    if sampler.model_path is not None:
        answer["model_path"] = sampler.model_path
    return json_response(answer)


async def get_own_key(request: web.Request) -> web.Response:
    """What the presented key is called and whom it belongs to."""
    name, identity = await request.app[BACKENDS].auth.look_up(request.headers["X-API-Key"])
    record = identity.key
    return json_response(
        {
            # The API wants a number; these 48 bits of the HMAC name the key and open nothing.
            "key_id": int(key_id(name), 16),
            "name": record.name or f"key-{name[:8]}",
            "note": record.note,
            "details": {
                "org_details": {"name": record.tenant},
                "user_details": {"email": identity.email or record.tenant},
            },
        }
    )


async def revoke_own_key(request: web.Request) -> web.Response:
    """End the presented key for good. Another gateway believes it for `key_cache_s` at most."""
    await request.app[BACKENDS].auth.revoke(request.headers["X-API-Key"])
    return json_response({})


async def export_trace(request: web.Request) -> web.Response:
    """A link to the session's timeline for ui.perfetto.dev, made anew, once it is ready."""
    key = await request.app[BACKENDS].registry.trace(
        request[TENANT], request.match_info["session_id"]
    )
    if key is None:
        return json_response({"status": "pending"})
    return json_response({"status": "ready", "url": files.link(request, key)})


async def get_audit(request: web.Request) -> web.Response:
    """What was done to checkpoints, projects, users and keys on one day."""
    query = {name: request.query.get(name, default) for name, default in _AUDIT_QUERY}
    return json_response(
        await request.app[BACKENDS].registry.admin(
            "GET", f"/audit?{urlencode(query)}", request[TENANT]
        )
    )


async def refuse_key_exchange(request: web.Request) -> web.Response:
    """Not offered: keys are given out by the operator and used as they are."""
    raise Unsupported("auth: use an API key of this server as it is; there is no exchange")


def _access_scope(request: web.Request) -> str:
    scope = request.query.get("access_scope", "owned")
    if scope not in ACCESS_SCOPES:
        raise InvalidField(f"access_scope: {scope[:50]!r}; allowed are {', '.join(ACCESS_SCOPES)}")
    return scope
