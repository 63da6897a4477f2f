"""Administration: organisations, projects, users, keys; forwarded to the registry.

A key of scope `admin` administers its own organisation, one of scope `operator` all of them.
Another organisation than one's own is a 404, like one that is not there.
"""

from typing import Any

from aiohttp import web
from pydantic import BaseModel

from luthier_core.admin_types import CreateKey, CreateOrg, CreateProject, CreateUser, UpdateOrg
from luthier_core.caller import CALLER, Caller
from luthier_core.errors import InvalidField, NotFound
from luthier_core.types import WireModel, parse
from luthier_gateway.backends import BACKENDS
from luthier_gateway.web_io import MAX_SMALL_BODY, json_response, read_body


def routes(prefix: str) -> list[web.RouteDef]:
    org = f"{prefix}/orgs/{{org}}"
    return [
        web.get(f"{prefix}/orgs", list_orgs),
        web.post(f"{prefix}/orgs", create_org),
        web.get(org, get_org),
        web.patch(org, update_org),
        web.get(f"{org}/projects", list_projects),
        web.post(f"{org}/projects", create_project),
        web.get(f"{org}/users", list_users),
        web.post(f"{org}/users", create_user),
        web.delete(f"{org}/users/{{user}}", delete_user),
        web.get(f"{org}/keys", list_keys),
        web.post(f"{org}/keys", create_key),
        web.delete(f"{org}/keys/{{key_id}}", revoke_key),
        web.get(f"{org}/audit/check", check_audit),
    ]


async def list_orgs(request: web.Request) -> web.Response:
    """Every organisation, with its limits."""
    return await forward(request, "GET", "/orgs")


async def create_org(request: web.Request) -> web.Response:
    """Make an organisation: a tenant, with everything that is its own."""
    return await forward(request, "POST", "/orgs", CreateOrg)


async def get_org(request: web.Request) -> web.Response:
    """One organisation."""
    return await forward(request, "GET", org_path(request))


async def update_org(request: web.Request) -> web.Response:
    """Change the name or the limits of an organisation, or disable it with all its keys."""
    return await forward(request, "PATCH", org_path(request), UpdateOrg)


async def list_projects(request: web.Request) -> web.Response:
    """The projects of an organisation."""
    return await forward(request, "GET", f"{org_path(request)}/projects")


async def create_project(request: web.Request) -> web.Response:
    """Make a project."""
    return await forward(request, "POST", f"{org_path(request)}/projects", CreateProject)


async def list_users(request: web.Request) -> web.Response:
    """The users of an organisation."""
    return await forward(request, "GET", f"{org_path(request)}/users")


async def create_user(request: web.Request) -> web.Response:
    """Make a user, whose keys carry the name."""
    return await forward(request, "POST", f"{org_path(request)}/users", CreateUser)


async def delete_user(request: web.Request) -> web.Response:
    """Take a user away; all their keys end."""
    return await forward(request, "DELETE", f"{org_path(request)}/users/{part(request, 'user')}")


async def list_keys(request: web.Request) -> web.Response:
    """The keys of an organisation by their ids, ended ones too."""
    return await forward(request, "GET", f"{org_path(request)}/keys")


async def create_key(request: web.Request) -> web.Response:
    """Make an API key. The answer shows it, this once."""
    org = org_path(request)
    wanted = parse(CreateKey, await read_body(request, MAX_SMALL_BODY))
    if "operator" in wanted.scopes and not caller().is_operator:
        raise InvalidField("scopes: only an operator's key makes another of scope operator")
    return await forward(request, "POST", f"{org}/keys", wanted)


async def revoke_key(request: web.Request) -> web.Response:
    """End a key for good: here at once, at other gateways within `key_cache_s`."""
    key_id = part(request, "key_id")
    answer = await forward(request, "DELETE", f"{org_path(request)}/keys/{key_id}")
    request.app[BACKENDS].auth.forget(key_id)
    return answer


async def check_audit(request: web.Request) -> web.Response:
    """Whether the organisation's audit log is whole and as it was written."""
    return await forward(request, "GET", f"{org_path(request)}/audit/check")


async def forward(
    request: web.Request,
    method: str,
    path: str,
    body: type[WireModel] | BaseModel | None = None,
) -> web.Response:
    """The registry's answer; a body is read and checked first."""
    value: Any = None
    if isinstance(body, type):
        body = parse(body, await read_body(request, MAX_SMALL_BODY))
    if body is not None:
        value = body.model_dump(mode="json", exclude_unset=True)
    registry = request.app[BACKENDS].registry
    return json_response(await registry.admin(method, path, caller().tenant, value))


def caller() -> Caller:
    """Who makes this request."""
    found = CALLER.get()
    assert found is not None, "this route needs a key"
    return found


def org_path(request: web.Request) -> str:
    """/orgs/{org} of the URL; NotFound unless the caller administers it."""
    org = part(request, "org")
    if org != caller().tenant and not caller().is_operator:
        raise NotFound(f"org_id={org!r}")
    return f"/orgs/{org}"


def part(request: web.Request, name: str) -> str:
    """A part of the URL that may become a part of another; NotFound for what would walk it."""
    text = request.match_info[name]
    if not text.isascii() or not text.replace("-", "").isalnum():
        raise NotFound(f"{name}={text[:100]!r}")
    return text
