"""Parts of a request to the registry, and answers."""

import re
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from luthier_core.checkpoints import PATH_KINDS, TinkerPath, check_name
from luthier_core.errors import InvalidField, NotFound
from luthier_core.oplog import Oplog
from luthier_core.records import Record
from luthier_core.registry_client import ACTOR_HEADER, PROJECT_HEADER, TENANT_HEADER
from luthier_registry.audit import Audit
from luthier_registry.checkpoints import Checkpoints
from luthier_registry.copies import Copies
from luthier_registry.identity import Identities
from luthier_registry.jobs import Jobs
from luthier_registry.observing import Observer
from luthier_registry.rebuild import Rebuild
from luthier_registry.retention import Retention
from luthier_registry.sessions import Sessions
from luthier_registry.store import Store
from luthier_registry.traces import Traces
from luthier_registry.uploads import Uploads
from luthier_registry.usage import Usage

STORE = web.AppKey("store", Store)
SESSIONS = web.AppKey("sessions", Sessions)
CHECKPOINTS = web.AppKey("checkpoints", Checkpoints)
COPIES = web.AppKey("copies", Copies)
RETENTION = web.AppKey("retention", Retention)
UPLOADS = web.AppKey("uploads", Uploads)
IDENTITIES = web.AppKey("identities", Identities)
AUDIT = web.AppKey("audit", Audit)
TRACES = web.AppKey("traces", Traces)
USAGE = web.AppKey("usage", Usage)
JOBS = web.AppKey("jobs", Jobs)
OBSERVER = web.AppKey("observer", Observer)
OPLOG = web.AppKey("oplog", Oplog)
REBUILD = web.AppKey("rebuild", Rebuild)
DETAILS = web.RequestKey("details", dict[str, Any])
"""What a handler adds to the audit entry of its call."""
TENANT_OF_EVENT = web.RequestKey("tenant_of_event", str)
"""Set by a handler whose request does not name the tenant."""
MAX_PAGE = 1000


def tenant_of(request: web.Request) -> str:
    """The caller's tenant, from the gateway."""
    return check_name(request.headers.get(TENANT_HEADER, ""), TENANT_HEADER)


def actor_of(request: web.Request) -> str:
    """Id of the API key on whose behalf the gateway calls; empty for the service itself."""
    actor = request.headers.get(ACTOR_HEADER, "")
    if not re.fullmatch(r"[0-9a-f]{12}|", actor):
        raise InvalidField(f"{ACTOR_HEADER}={actor[:50]!r}")
    return actor


def project_of(request: web.Request) -> str | None:
    """The project of that key, if it has one."""
    project = request.headers.get(PROJECT_HEADER)
    return None if project is None else unquote(project)


def path_of(request: web.Request) -> TinkerPath:
    """The checkpoint that the URL names, with a kind and a name that can be."""
    kind = request.match_info["kind"]
    if kind not in PATH_KINDS:
        raise NotFound(f"checkpoint {kind!r}")
    name = check_name(request.match_info["name"])
    return TinkerPath.parse(f"tinker://{request.match_info['run']}/{kind}/{name}")


def page_of(request: web.Request) -> tuple[int, int]:
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


def json_of(record: Record) -> web.Response:
    return web.Response(body=record.to_bytes(), content_type="application/json")
