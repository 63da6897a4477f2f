"""Bookkeeping calls, forwarded to the registry with the caller's tenant."""

import re

from aiohttp import web

from luthier_core.errors import InvalidField
from luthier_core.types import TinkerPath, parse
from luthier_gateway.backends import BACKENDS, TENANT
from luthier_gateway.web_io import json_response, read_body

MAX_PAGE = 1000


async def list_training_runs(request: web.Request) -> web.Response:
    limit, offset = _page(request, default_limit=20)
    page = await request.app[BACKENDS].registry.list_runs(
        request[TENANT], limit=limit, offset=offset
    )
    return json_response(page)


async def get_training_run(request: web.Request) -> web.Response:
    run_id = request.match_info["run_id"]
    return json_response(await request.app[BACKENDS].registry.describe_run(request[TENANT], run_id))


async def list_run_checkpoints(request: web.Request) -> web.Response:
    run_id = request.match_info["run_id"]
    return json_response(
        await request.app[BACKENDS].registry.list_run_checkpoints(request[TENANT], run_id)
    )


async def delete_checkpoint(request: web.Request) -> web.Response:
    await request.app[BACKENDS].registry.delete_checkpoint(
        request[TENANT],
        request.match_info["run_id"],
        request.match_info["kind"],
        request.match_info["name"],
    )
    return json_response({})


async def list_checkpoints(request: web.Request) -> web.Response:
    limit, offset = _page(request, default_limit=100)
    page = await request.app[BACKENDS].registry.list_checkpoints(
        request[TENANT], limit=limit, offset=offset
    )
    return json_response(page)


async def list_sessions(request: web.Request) -> web.Response:
    limit, offset = _page(request, default_limit=20)
    page = await request.app[BACKENDS].registry.list_sessions(
        request[TENANT], limit=limit, offset=offset
    )
    return json_response(page)


async def get_session(request: web.Request) -> web.Response:
    session_id = request.match_info["session_id"]
    return json_response(
        await request.app[BACKENDS].registry.describe_session(request[TENANT], session_id)
    )


async def get_sampler(request: web.Request) -> web.Response:
    sampler = await request.app[BACKENDS].sampler(request[TENANT], request.match_info["sampler_id"])
    answer = {"sampler_id": sampler.sampling_session_id, "base_model": sampler.base_model}
    if sampler.model_path is not None:
        answer["model_path"] = sampler.model_path
    return json_response(answer)


async def weights_info(request: web.Request) -> web.Response:
    wanted = parse(TinkerPath, await read_body(request, 64 * 1024))
    return json_response(
        await request.app[BACKENDS].registry.weights_info(request[TENANT], wanted.tinker_path)
    )


def _page(request: web.Request, *, default_limit: int) -> tuple[int, int]:
    return (
        _whole_number(request, "limit", default_limit, 1, MAX_PAGE),
        _whole_number(request, "offset", 0, 0, 2**31),
    )


def _whole_number(request: web.Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII) or not least <= int(text) <= most:
        raise InvalidField(f"{name}: {text[:50]!r}; allowed are {least} to {most}")
    return int(text)
