"""An operator's wishes: that a run has another trainer, or that a trainer has no runs.

Forwarded to the registry, which writes them into the audit log.
"""

from aiohttp import web

from luthier_core.admin_types import MoveRun
from luthier_core.registry_client import path_part
from luthier_core.types import parse
from luthier_gateway.admin import forward, part
from luthier_gateway.web_io import MAX_SMALL_BODY, read_body


def routes(prefix: str) -> list[web.RouteDef]:
    return [
        web.post(f"{prefix}/admin/runs/{{run_id}}/move", move_run),
        web.post(f"{prefix}/admin/trainers/{{trainer}}/drain", drain),
        web.delete(f"{prefix}/admin/trainers/{{trainer}}/drain", undrain),
    ]


async def move_run(request: web.Request) -> web.Response:
    """Let another trainer have a run: its requests wait about a second, none is repeated."""
    wanted = parse(MoveRun, await read_body(request, MAX_SMALL_BODY) or b"{}")
    run = path_part(request.match_info["run_id"])
    return await forward(request, "POST", f"/runs/{run}/move", wanted)


async def drain(request: web.Request) -> web.Response:
    """Let other trainers have all runs of one, which takes no more until this is undone."""
    return await forward(request, "POST", f"/trainers/{part(request, 'trainer')}/drain")


async def undrain(request: web.Request) -> web.Response:
    """Let a trainer take runs again."""
    return await forward(request, "DELETE", f"/trainers/{part(request, 'trainer')}/drain")
