"""The registry's calls by which an operator moves runs between trainers."""

from aiohttp import web

from luthier_core.admin_types import MoveRun
from luthier_core.errors import BadRequest, InvalidField, NotFound
from luthier_core.moves import Moves
from luthier_core.oplog import Oplog
from luthier_core.types import parse
from luthier_registry.web_io import DETAILS, OPLOG, TENANT_OF_EVENT

_DRAIN = "/admin/trainers/{trainer}/drain"


def routes() -> list[web.RouteDef]:
    return [
        web.post("/admin/runs/{run}/move", move_run),
        web.post(_DRAIN, drain),
        web.delete(_DRAIN, undrain),
    ]


async def move_run(request: web.Request) -> web.Response:
    oplog, run_id = request.app[OPLOG], request.match_info["run"]
    wanted = parse(MoveRun, await request.read())
    header = await oplog.header(run_id)
    if header is None or not header.base_model:
        raise NotFound(f"training run {run_id!r}")
    request[TENANT_OF_EVENT] = header.tenant
    owner = header.owner.partition("/")[0]
    moves = Moves(oplog.redis, header.base_model)
    trainers = await _trainers(oplog, header.base_model)
    others = [name for name in (await moves.read()).candidates(trainers) if name != owner]
    target = wanted.to or next(iter(sorted(others)), "")
    if wanted.to and wanted.to not in trainers:
        raise InvalidField(f"to={wanted.to!r}: the trainers of this run's model are {trainers}")
    if not target:
        raise BadRequest(f"no other trainer of {header.base_model} is alive")
    request[DETAILS] = {"to": target}
    if target != owner:
        await moves.ask(run_id, target)
    return web.json_response({"run_id": run_id, "owner": owner or None, "to": target})


async def drain(request: web.Request) -> web.Response:
    oplog, trainer = request.app[OPLOG], request.match_info["trainer"]
    base_model = await _model_of(oplog, trainer)
    moves = Moves(oplog.redis, base_model)
    drained = (await moves.read()).drained
    others = [n for n in await _trainers(oplog, base_model) if n not in {trainer, *drained}]
    if not others:
        raise BadRequest(f"{trainer} is the only trainer of {base_model} that takes runs")
    await moves.drain(trainer)
    return web.json_response({"trainer": trainer, "drained": True})


async def undrain(request: web.Request) -> web.Response:
    oplog, trainer = request.app[OPLOG], request.match_info["trainer"]
    await Moves(oplog.redis, await _model_of(oplog, trainer)).undrain(trainer)
    return web.json_response({"trainer": trainer, "drained": False})


async def _trainers(oplog: Oplog, base_model: str) -> list[str]:
    leases = await oplog.live_workers()
    return sorted(
        name
        for name, lease in leases.items()
        if lease["role"] == "trainer" and lease["base_model"] == base_model
    )


async def _model_of(oplog: Oplog, trainer: str) -> str:
    lease = (await oplog.live_workers()).get(trainer)
    if lease is None or lease["role"] != "trainer":
        raise NotFound(f"trainer {trainer[:100]!r}")
    return lease["base_model"]
