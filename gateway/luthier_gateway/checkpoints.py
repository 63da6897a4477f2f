"""Checkpoints over REST: lists, publish, expiry, downloads, copies; forwarded to the registry.

A checkpoint is named in the URL by its kind and name with the slash between them.
"""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

from aiohttp import web

from luthier_core.caller import REFUSAL
from luthier_core.rest_types import CopyWeights, SetKeepLast, SetTtl
from luthier_core.types import TinkerPath, parse
from luthier_gateway import files
from luthier_gateway.backends import BACKENDS, TENANT
from luthier_gateway.client_version import is_before
from luthier_gateway.web_io import MAX_SMALL_BODY, json_response, page_of, read_body

FIRST_WITH_EXTERNAL = (0, 28, 0)
"""An SDK before this one cannot read a list in which a checkpoint is of type external."""


async def list_checkpoints(request: web.Request) -> web.Response:
    """Checkpoints of all runs, latest first."""
    limit, offset = page_of(request, default_limit=100)
    page = await request.app[BACKENDS].registry.list_checkpoints(
        request[TENANT],
        limit=limit,
        offset=offset,
        external=not is_before(request, FIRST_WITH_EXTERNAL),
    )
    return json_response(page)


async def list_run_checkpoints(request: web.Request) -> web.Response:
    """Checkpoints of one run, latest first; of another's run those that are published."""
    listed = await request.app[BACKENDS].registry.list_run_checkpoints(
        request[TENANT], request.match_info["run_id"]
    )
    if is_before(request, FIRST_WITH_EXTERNAL):
        rows = listed["checkpoints"]
        listed["checkpoints"] = [row for row in rows if row["checkpoint_type"] != "external"]
    return json_response(listed)


async def delete_checkpoint(request: web.Request) -> web.Response:
    """Delete a checkpoint. What was made from it stays."""
    await request.app[BACKENDS].registry.delete_checkpoint(request[TENANT], *_named(request))
    return json_response({})


async def publish_checkpoint(request: web.Request) -> web.Response:
    """Let everybody with a key read a checkpoint; no error if they can already."""
    await request.app[BACKENDS].registry.publish(request[TENANT], *_named(request))
    return json_response({})


async def unpublish_checkpoint(request: web.Request) -> web.Response:
    """Let only its owner read a checkpoint."""
    await request.app[BACKENDS].registry.unpublish(request[TENANT], *_named(request))
    return json_response({})


async def set_checkpoint_ttl(request: web.Request) -> web.Response:
    """Let a checkpoint expire so many seconds from now, or never."""
    wanted = parse(SetTtl, await read_body(request, MAX_SMALL_BODY))
    await request.app[BACKENDS].registry.set_ttl(
        request[TENANT], *_named(request), wanted.ttl_seconds
    )
    return json_response({})


async def get_keep_last(request: web.Request) -> web.Response:
    """How many checkpoints of each kind a run keeps; 0 is all of them."""
    run_id = request.match_info["run_id"]
    return json_response(await request.app[BACKENDS].registry.keep_last(request[TENANT], run_id))


async def set_keep_last(request: web.Request) -> web.Response:
    """Let all but the newest checkpoints of each kind of a run expire, now and from now on."""
    wanted = parse(SetKeepLast, await read_body(request, MAX_SMALL_BODY))
    await request.app[BACKENDS].registry.set_keep_last(
        request[TENANT], request.match_info["run_id"], wanted.keep_last
    )
    return json_response({})


async def get_checkpoint_archive(request: web.Request) -> web.Response:
    """A link to a tar of the PEFT files, as a redirect or as JSON; 503 while it is being made."""
    key = await request.app[BACKENDS].registry.archive(request[TENANT], *_named(request))
    url, expires = files.link(request, key), _link_expires()
    # SDKs up to 0.22.1 send two Accept headers and want the redirect.
    accepted = ",".join(request.headers.getall("Accept", []))
    if "application/json" in accepted and "application/gzip" not in accepted:
        return json_response({"url": url, "expires": expires.isoformat()})
    ends = format_datetime(expires, usegmt=True)
    return web.Response(status=302, headers={"Location": url, "Expires": ends})


async def get_external_weights_urls(request: web.Request) -> web.Response:
    """A link to each PEFT file."""
    keys = await request.app[BACKENDS].registry.checkpoint_files(request[TENANT], *_named(request))
    urls = {name: files.link(request, key) for name, key in keys.items()}
    return json_response({"urls": urls, "expires": _link_expires().isoformat()})


async def weights_info(request: web.Request) -> web.Response:
    """What must be created to load a checkpoint: base model and LoRA."""
    wanted = parse(TinkerPath, await read_body(request, MAX_SMALL_BODY))
    return json_response(
        await request.app[BACKENDS].registry.weights_info(request[TENANT], wanted.tinker_path)
    )


async def copy_weights(request: web.Request) -> web.Response:
    """Copy a checkpoint to a project or a session; a retry under one key makes no second copy."""
    backends = request.app[BACKENDS]
    wanted = parse(CopyWeights, await read_body(request, MAX_SMALL_BODY))
    if refusal := REFUSAL.get():
        raise refusal
    header = request.headers.get("X-Tinker-Weights-Access-Token")
    copy: dict[str, Any] = {
        **wanted.model_dump(exclude={"weights_access_token"}),
        "access_tenant": await backends.access_tenant(header or wanted.weights_access_token),
        "idempotency_key": request.headers.get("X-Idempotency-Key"),
    }
    return json_response(
        {"tinker_path": await backends.registry.copy_weights(request[TENANT], copy)}
    )


def _named(request: web.Request) -> tuple[str, str, str]:
    """(run id, kind, name) of the checkpoint in the URL."""
    part = request.match_info
    return part["run_id"], part["kind"], part["name"]


def _link_expires() -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=files.LINK_S)
