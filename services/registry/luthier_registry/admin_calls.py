"""The registry's calls about organisations, projects, users, keys and the audit log."""

from datetime import UTC, date, datetime
from typing import TypeVar

from aiohttp import web

from luthier_core.admin_types import CreateKey, CreateOrg, CreateProject, CreateUser, UpdateOrg
from luthier_core.errors import InvalidField
from luthier_core.types import WireModel
from luthier_core.types import parse as parse_wire
from luthier_registry.audit import EVENT_TYPES
from luthier_registry.web_io import AUDIT, DETAILS, IDENTITIES, json_of, tenant_of

W = TypeVar("W", bound=WireModel)

_ORG = "/admin/orgs/{org}"


def routes() -> list[web.RouteDef]:
    return [
        web.get("/admin/orgs", list_orgs),
        web.post("/admin/orgs", create_org),
        web.get(_ORG, get_org),
        web.patch(_ORG, update_org),
        web.get(f"{_ORG}/projects", list_projects),
        web.post(f"{_ORG}/projects", create_project),
        web.get(f"{_ORG}/users", list_users),
        web.post(f"{_ORG}/users", create_user),
        web.delete(f"{_ORG}/users/{{user}}", delete_user),
        web.get(f"{_ORG}/keys", list_keys),
        web.post(f"{_ORG}/keys", create_key),
        web.delete(f"{_ORG}/keys/{{key_id}}", revoke_key_of),
        web.get("/admin/audit", list_audit),
        web.get(f"{_ORG}/audit/check", check_audit),
    ]


async def list_orgs(request: web.Request) -> web.Response:
    records = await request.app[IDENTITIES].orgs()
    return web.json_response({"orgs": [record.to_dict() for record in records]})


async def create_org(request: web.Request) -> web.Response:
    wanted = await _body(request, CreateOrg)
    request[DETAILS] = {"org": wanted.org_id}
    return json_of(await request.app[IDENTITIES].create_org(wanted))


async def get_org(request: web.Request) -> web.Response:
    return json_of(await request.app[IDENTITIES].org(request.match_info["org"]))


async def update_org(request: web.Request) -> web.Response:
    wanted = await _body(request, UpdateOrg)
    request[DETAILS] = wanted.model_dump(mode="json", exclude_unset=True)
    return json_of(await request.app[IDENTITIES].update_org(request.match_info["org"], wanted))


async def list_projects(request: web.Request) -> web.Response:
    records = await request.app[IDENTITIES].projects(request.match_info["org"])
    return web.json_response({"projects": [record.to_dict() for record in records]})


async def create_project(request: web.Request) -> web.Response:
    wanted = await _body(request, CreateProject)
    request[DETAILS] = {"project": wanted.project_id}
    return json_of(await request.app[IDENTITIES].create_project(request.match_info["org"], wanted))


async def list_users(request: web.Request) -> web.Response:
    records = await request.app[IDENTITIES].users(request.match_info["org"])
    return web.json_response({"users": [record.to_dict() for record in records]})


async def create_user(request: web.Request) -> web.Response:
    wanted = await _body(request, CreateUser)
    request[DETAILS] = {"user": wanted.user_id}
    return json_of(await request.app[IDENTITIES].create_user(request.match_info["org"], wanted))


async def delete_user(request: web.Request) -> web.Response:
    """Beside the user, every key of theirs ends."""
    org, user = request.match_info["org"], request.match_info["user"]
    return web.json_response(
        {"num_revoked_keys": await request.app[IDENTITIES].delete_user(org, user)}
    )


async def list_keys(request: web.Request) -> web.Response:
    found = await request.app[IDENTITIES].keys_of(request.match_info["org"])
    return web.json_response({"keys": found})


async def create_key(request: web.Request) -> web.Response:
    wanted = await _body(request, CreateKey)
    key = await request.app[IDENTITIES].create_key(request.match_info["org"], wanted)
    request[DETAILS] = {"key_id": key["key_id"], "scopes": list(wanted.scopes)}
    return web.json_response(key)


async def revoke_key_of(request: web.Request) -> web.Response:
    org, key_id = request.match_info["org"], request.match_info["key_id"]
    return web.json_response(await request.app[IDENTITIES].revoke_of(org, key_id))


async def list_audit(request: web.Request) -> web.Response:
    """The caller's own events of one day, as the Tinker API shows them."""
    event_type = request.query.get("event_type", "all")
    if event_type not in EVENT_TYPES:
        raise InvalidField(f"event_type={event_type[:50]!r}: one of {', '.join(EVENT_TYPES)}")
    today = datetime.now(UTC).date()
    try:
        day = date.fromisoformat(request.query.get("day") or today.isoformat())
    except ValueError:
        raise InvalidField("day: must be YYYY-MM-DD") from None
    found = await request.app[AUDIT].of_day(tenant_of(request), day, event_type)
    return web.json_response(
        {
            "entries": [
                {
                    "timestamp": entry.at.isoformat(),
                    "event": entry.event,
                    "event_details": {
                        **entry.details,
                        "actor": entry.actor,
                        "outcome": entry.outcome,
                    },
                    "model_id": entry.details.get("run"),
                    "tinker_path": _tinker_path(entry.details),
                }
                for entry in found
            ]
        }
    )


async def check_audit(request: web.Request) -> web.Response:
    """Whether every entry is as it was written, none is missing and none is cut off."""
    org = request.match_info["org"]
    checked = await request.app[AUDIT].verify(org)
    if not checked.num_entries:
        await request.app[IDENTITIES].org(org)  # NotFound
    return web.json_response(
        {
            "num_entries": checked.num_entries,
            "intact": checked.broken_at is None,
            "broken_at": checked.broken_at,
        }
    )


async def _body(request: web.Request, kind: type[W]) -> W:
    return parse_wire(kind, await request.read())


def _tinker_path(details: dict[str, str]) -> str | None:
    if "kind" not in details:
        return None
    return f"tinker://{details['run']}/{details['kind']}/{details['name']}"
