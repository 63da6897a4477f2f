"""Which calls leave an entry in the audit log, and the middleware that writes it."""

import logging
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from luthier_core.errors import LuthierError
from luthier_core.redaction import redact
from luthier_core.registry_client import TENANT_HEADER
from luthier_registry import admin_calls, checkpoint_calls, move_calls, usage_calls
from luthier_registry.web_io import AUDIT, DETAILS, TENANT_OF_EVENT, actor_of, tenant_of

log = logging.getLogger(__name__)

EVENTS: dict[str, str] = {
    checkpoint_calls.publish.__name__: "checkpoints.publish",
    checkpoint_calls.unpublish.__name__: "checkpoints.unpublish",
    checkpoint_calls.delete_checkpoint.__name__: "checkpoints.delete",
    checkpoint_calls.set_ttl.__name__: "checkpoints.set_ttl",
    checkpoint_calls.get_files.__name__: "checkpoints.download",
    checkpoint_calls.make_archive.__name__: "checkpoints.download",
    checkpoint_calls.copy_weights.__name__: "checkpoints.copy",
    checkpoint_calls.set_keep_last.__name__: "checkpoints.set_keep_last",
    checkpoint_calls.adopt_upload.__name__: "checkpoints.upload",
    "set_project": "projects.move_session",
    "revoke_key": "organizations.revoke_key",
    admin_calls.create_org.__name__: "organizations.create",
    admin_calls.update_org.__name__: "organizations.update",
    admin_calls.create_project.__name__: "projects.create",
    admin_calls.create_user.__name__: "teams.create_user",
    admin_calls.delete_user.__name__: "teams.delete_user",
    admin_calls.create_key.__name__: "organizations.create_key",
    admin_calls.revoke_key_of.__name__: "organizations.revoke_key",
    usage_calls.run_job.__name__: "organizations.run_job",
    move_calls.move_run.__name__: "organizations.move_run",
    move_calls.drain.__name__: "organizations.drain",
    move_calls.undrain.__name__: "organizations.undrain",
}
"""Name of the handler -> event."""


@web.middleware
async def record_event(request: web.Request, handler: Handler) -> web.StreamResponse:
    """One entry per audited call that was done or refused; none for one that is to be repeated."""
    event = EVENTS.get(getattr(request.match_info.handler, "__name__", ""))
    if event is None:
        return await handler(request)
    try:
        response = await handler(request)
    except LuthierError as error:
        if error.status < 500:
            await _append(request, event, type(error).__name__)
        raise
    await _append(request, event, "ok")
    return response


async def _append(request: web.Request, event: str, outcome: str) -> None:
    parts = {
        # A key may have been put where a name was wanted.
        name: redact(value[:300])
        for name, value in request.match_info.items()
        if name != "key"
    }
    details: dict[str, Any] = {**parts, **request.get(DETAILS, {})}
    tenant = _whose_log(request, details, outcome)
    if tenant is None:
        return  # nobody's key was presented: there is no log it could be in
    await request.app[AUDIT].append(
        tenant, event, actor=actor_of(request), outcome=outcome, details=details
    )


def _whose_log(request: web.Request, details: dict[str, Any], outcome: str) -> str | None:
    """The organisation that the call was about; the caller's own if there is no such."""
    if TENANT_OF_EVENT in request:
        return request[TENANT_OF_EVENT]
    if outcome == "ok" and "org" in details:
        return str(details["org"])
    return tenant_of(request) if TENANT_HEADER in request.headers else None
