"""The registry's calls about checkpoints."""

from aiohttp import web

from luthier_core.checkpoints import TinkerPath
from luthier_registry.record_store import cursor
from luthier_registry.requests import (
    AdoptUpload,
    CopyWeights,
    CreateUpload,
    Path,
    SetKeepLast,
    SetTtl,
    parse,
)
from luthier_registry.web_io import (
    CHECKPOINTS,
    COPIES,
    RETENTION,
    STORE,
    UPLOADS,
    actor_of,
    json_of,
    page_of,
    path_of,
    project_of,
    tenant_of,
)

_ONE = "/runs/{run}/checkpoints/{kind}/{name}"


def routes() -> list[web.RouteDef]:
    return [
        web.get("/checkpoints", list_checkpoints),
        web.get("/runs/{run}/checkpoints", list_run_checkpoints),
        web.delete(_ONE, delete_checkpoint),
        web.post(f"{_ONE}/publish", publish),
        web.delete(f"{_ONE}/publish", unpublish),
        web.put(f"{_ONE}/ttl", set_ttl),
        web.get(f"{_ONE}/files", get_files),
        web.post(f"{_ONE}/archive", make_archive),
        web.post("/resolve", resolve),
        web.post("/weights_info", weights_info),
        web.post("/copy_weights", copy_weights),
        web.get("/runs/{run}/keep_last", get_keep_last),
        web.put("/runs/{run}/keep_last", set_keep_last),
        web.post("/uploads", create_upload),
        web.get("/uploads/{upload}", get_upload),
        web.post("/uploads/{upload}/adopt", adopt_upload),
    ]


async def list_checkpoints(request: web.Request) -> web.Response:
    offset, limit = page_of(request)
    page = await request.app[CHECKPOINTS].page(
        tenant_of(request),
        offset=offset,
        limit=limit,
        external=request.query.get("external") == "1",
    )
    return web.json_response(
        {"checkpoints": page.rows, "cursor": cursor(offset, limit, page.total_count)}
    )


async def list_run_checkpoints(request: web.Request) -> web.Response:
    """All of them: this list has no pages (wire protocol 8.2)."""
    rows = await request.app[STORE].run_checkpoints(tenant_of(request), request.match_info["run"])
    return web.json_response({"checkpoints": rows, "cursor": None})


async def delete_checkpoint(request: web.Request) -> web.Response:
    await request.app[CHECKPOINTS].delete(tenant_of(request), path_of(request))
    return web.json_response({})


async def publish(request: web.Request) -> web.Response:
    await request.app[CHECKPOINTS].publish(tenant_of(request), path_of(request))
    return web.json_response({})


async def unpublish(request: web.Request) -> web.Response:
    await request.app[CHECKPOINTS].unpublish(tenant_of(request), path_of(request))
    return web.json_response({})


async def set_ttl(request: web.Request) -> web.Response:
    wanted = parse(SetTtl, await request.read())
    await request.app[CHECKPOINTS].set_ttl(tenant_of(request), path_of(request), wanted.ttl_seconds)
    return web.json_response({})


async def get_files(request: web.Request) -> web.Response:
    """What to sign: file name -> object key."""
    files = await request.app[CHECKPOINTS].files(tenant_of(request), path_of(request))
    return web.json_response({"files": files})


async def make_archive(request: web.Request) -> web.Response:
    """What to sign: the object key of the tar, which is there."""
    key = await request.app[CHECKPOINTS].archive(tenant_of(request), path_of(request))
    return web.json_response({"key": key})


async def resolve(request: web.Request) -> web.Response:
    wanted = parse(Path, await request.read())
    path = TinkerPath.parse(wanted.tinker_path)
    return json_of(
        await request.app[CHECKPOINTS].read(
            tenant_of(request), path, access_tenant=wanted.access_tenant
        )
    )


async def weights_info(request: web.Request) -> web.Response:
    """What a client must create to load this checkpoint (wire protocol 2.5)."""
    path = TinkerPath.parse(parse(Path, await request.read()).tinker_path, "tinker_path")
    record = await request.app[CHECKPOINTS].read(tenant_of(request), path)
    lora = record.lora
    return web.json_response(
        {
            "base_model": record.base_model,
            "is_lora": True,
            "lora_rank": lora.rank,
            **lora.model_dump(include={"train_unembed", "train_mlp", "train_attn"}),
        }
    )


async def copy_weights(request: web.Request) -> web.Response:
    wanted = parse(CopyWeights, await request.read())
    path = await request.app[COPIES].copy(
        tenant_of(request), wanted, key_id=actor_of(request), key_project=project_of(request)
    )
    return web.json_response({"tinker_path": path})


async def get_keep_last(request: web.Request) -> web.Response:
    """How many checkpoints of each kind the run keeps; 0: all."""
    tenant = tenant_of(request)
    run = await request.app[STORE].run(tenant, request.match_info["run"])
    return web.json_response({"keep_last": await request.app[RETENTION].get(tenant, run.run_id)})


async def set_keep_last(request: web.Request) -> web.Response:
    wanted = parse(SetKeepLast, await request.read())
    tenant = tenant_of(request)
    run = await request.app[STORE].run(tenant, request.match_info["run"])
    await request.app[RETENTION].set(tenant, run.run_id, wanted.keep_last)
    return web.json_response({})


async def create_upload(request: web.Request) -> web.Response:
    wanted = parse(CreateUpload, await request.read())
    return json_of(
        await request.app[UPLOADS].create(
            tenant_of(request),
            wanted,
            key_id=actor_of(request),
            key_project=project_of(request),
        )
    )


async def get_upload(request: web.Request) -> web.Response:
    """The record, and the paths of its checkpoints once it is one."""
    tenant, uploads = tenant_of(request), request.app[UPLOADS]
    upload = await uploads.get(tenant, request.match_info["upload"])
    return web.json_response({"upload": upload.to_dict(), "paths": await uploads.paths(upload)})


async def adopt_upload(request: web.Request) -> web.Response:
    wanted = parse(AdoptUpload, await request.read())
    paths = await request.app[UPLOADS].adopt(
        tenant_of(request), request.match_info["upload"], wanted
    )
    return web.json_response({"paths": paths})
