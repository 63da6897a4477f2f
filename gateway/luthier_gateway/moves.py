"""An operator's wishes: that a run has another trainer, or that a trainer has no runs."""

from aiohttp import web

from luthier_core.admin_types import MoveRun
from luthier_core.errors import BadRequest, InvalidField, NotFound
from luthier_core.moves import Moves
from luthier_core.types import parse
from luthier_gateway.backends import BACKENDS, Backends
from luthier_gateway.web_io import MAX_SMALL_BODY, json_response, read_body


def routes(prefix: str) -> list[web.RouteDef]:
    return [
        web.post(f"{prefix}/admin/runs/{{run_id}}/move", move_run),
        web.post(f"{prefix}/admin/trainers/{{trainer}}/drain", drain),
        web.delete(f"{prefix}/admin/trainers/{{trainer}}/drain", undrain),
    ]


async def move_run(request: web.Request) -> web.Response:
    """Let another trainer have a run: its requests wait about a second, none is repeated."""
    backends, run_id = request.app[BACKENDS], request.match_info["run_id"]
    wanted = parse(MoveRun, await read_body(request, MAX_SMALL_BODY) or b"{}")
    header = await backends.oplog.header(run_id)
    if header is None or not header.base_model:
        raise NotFound(f"training run {run_id!r}")
    owner = header.owner.partition("/")[0]
    moves = Moves(backends.oplog.redis, header.base_model)
    trainers = await _trainers(backends, header.base_model)
    others = [name for name in (await moves.read()).candidates(trainers) if name != owner]
    target = wanted.to or next(iter(sorted(others)), "")
    if wanted.to and wanted.to not in trainers:
        raise InvalidField(f"to={wanted.to!r}: the trainers of this run's model are {trainers}")
    if not target:
        raise BadRequest(f"no other trainer of {header.base_model} is alive")
    if target != owner:
        await moves.ask(run_id, target)
    return json_response({"run_id": run_id, "owner": owner or None, "to": target})


async def drain(request: web.Request) -> web.Response:
    """Let other trainers have all runs of one, which takes no more until this is undone."""
    backends, trainer = request.app[BACKENDS], request.match_info["trainer"]
    base_model = await _model_of(backends, trainer)
    moves = Moves(backends.oplog.redis, base_model)
    drained = (await moves.read()).drained
    others = [n for n in await _trainers(backends, base_model) if n not in {trainer, *drained}]
    if not others:
        raise BadRequest(f"{trainer} is the only trainer of {base_model} that takes runs")
    await moves.drain(trainer)
    return json_response({"trainer": trainer, "drained": True})


async def undrain(request: web.Request) -> web.Response:
    """Let a trainer take runs again."""
    backends, trainer = request.app[BACKENDS], request.match_info["trainer"]
    await Moves(backends.oplog.redis, await _model_of(backends, trainer)).undrain(trainer)
    return json_response({"trainer": trainer, "drained": False})


async def _trainers(backends: Backends, base_model: str) -> list[str]:
    leases = await backends.oplog.live_workers()
    return sorted(
        name
        for name, lease in leases.items()
        if lease["role"] == "trainer" and lease["base_model"] == base_model
    )


async def _model_of(backends: Backends, trainer: str) -> str:
    lease = (await backends.oplog.live_workers()).get(trainer)
    if lease is None or lease["role"] != "trainer":
        raise NotFound(f"trainer {trainer[:100]!r}")
    return lease["base_model"]
