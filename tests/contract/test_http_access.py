"""Who may call what: keys, tenants kept apart, and errors that say what was wrong."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from tests.contract.gateway_client import Api, Run, datum
from tests.contract.gateway_stack import KEYS, GatewayStack

from luthier_gateway.app import OPEN_PATHS, needs_key, routes
from luthier_gateway.openai.handlers import is_openai

ABSENT_SESSION = "0" * 32
GUARDED = [
    (route.method, route.path.replace(":weights|sampler_weights|external_weights", ""))
    for route in routes()
    if isinstance(route, web.RouteDef) and needs_key(route.path) and not is_openai(route.path)
]


def url_of(api: Api, path: str) -> str:
    """A route's path with something in its variable parts."""
    run_id = f"{ABSENT_SESSION}:train:0"
    filled = {"run_id": run_id, "session_id": ABSENT_SESSION, "request_id": f"{run_id}:1"}
    filled |= {"org": "ann", "user": "kim", "key_id": "0" * 12, "job": "usage"}
    filled |= {"upload_id": "0" * 32, "trainer": "trainer-0"}
    return api.url + path.format_map({"kind": "weights", "name": "x", "sampler_id": "s", **filled})


@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_without_a_key_nothing_is_answered(keyless: Api, method: str, path: str):
    answer = await keyless.call(method, url_of(keyless, path), b"{}")
    assert answer.status == 401
    assert "X-API-Key" in answer.detail


@pytest.mark.parametrize("key", ["tml-nobody", "TML-KEY-OF-ANN", "", "x" * 513, "tml-\u00fc"])
async def test_a_wrong_key_is_answered_with_401(keyless: Api, key: str):
    answer = await keyless.call("GET", "get_server_capabilities", headers={"X-API-Key": key})
    assert answer.status == 401
    assert "X-API-Key" in answer.detail
    assert key not in answer.detail or not key


async def test_a_key_is_no_bearer_token(keyless: Api):
    headers = {"Authorization": "Bearer tml-key-of-ann"}
    assert (await keyless.call("GET", "training_runs", headers=headers)).status == 401


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
async def test_health_is_answered_without_a_key(keyless: Api, path: str):
    answer = await keyless.call("GET", keyless.url + path)
    assert answer.status == 200
    assert answer.json() == {"status": "ok"}


async def test_an_unknown_route_is_a_404_in_json(api: Api, keyless: Api):
    answer = await api.post("no_such_endpoint")
    assert answer.status == 404
    assert "/api/v1/no_such_endpoint" in answer.detail
    assert (await keyless.post("no_such_endpoint")).status == 401


async def test_a_wrong_method_is_a_405_in_json(api: Api):
    assert (await api.get("optim_step")).status == 405


# --- tenants --------------------------------------------------------------------------------------

RUN_REQUESTS = {
    "get_info": {},
    "optim_step": {"seq_id": 1},
    "save_weights": {"seq_id": 1, "path": "x"},
    "save_weights_for_sampler": {"seq_id": 1, "sampling_session_seq_id": 0},
    "load_weights": {"seq_id": 1, "path": f"tinker://{ABSENT_SESSION}:train:0/weights/x"},
}
"""POST endpoint -> what it needs beside the model_id."""


@pytest.mark.parametrize("path", RUN_REQUESTS)
async def test_a_foreign_run_is_answered_like_an_absent_one(api: Api, stranger: Api, path: str):
    run = await api.run()
    absent = f"{ABSENT_SESSION}:train:0"
    answers = [
        await stranger.post(path, {"model_id": run_id, **RUN_REQUESTS[path]})
        for run_id in (run.run_id, absent)
    ]
    assert [answer.status for answer in answers] == [404, 404]
    assert answers[0].detail.replace(run.run_id, absent) == answers[1].detail


async def test_a_foreign_run_takes_no_protobuf_either(api: Api, stranger: Api):
    run = await api.run()
    absent = Run(stranger, f"{ABSENT_SESSION}:train:0")
    answers = [
        await other.post_message(other.message(datum()))
        for other in (Run(stranger, run.run_id), absent)
    ]
    assert [answer.status for answer in answers] == [404, 404]
    assert answers[0].detail.replace(run.run_id, absent.run_id) == answers[1].detail
    # Its seq 1 has not been used up by the stranger.
    assert (await api.training_output(await run.forward_backward())).metrics["loss:sum"] > 0


async def test_foreign_futures_are_answered_like_absent_ones(api: Api, stranger: Api):
    run, sampler = await api.run(), await api.sampler()
    sample = await sampler.send()
    for mine, absent in (
        (f"{run.run_id}:0", f"{ABSENT_SESSION}:train:0:0"),
        (sample, f"{ABSENT_SESSION}:sample:0:0"),
    ):
        answers = [await stranger.poll(request_id) for request_id in (mine, absent)]
        assert [answer.status for answer in answers] == [404, 404]
        own, other = mine.rpartition(":")[0], absent.rpartition(":")[0]
        assert answers[0].detail.replace(own, other) == answers[1].detail


async def test_foreign_sessions_and_samplers_are_answered_like_absent_ones(api: Api, stranger: Api):
    session = await api.session()
    sampler = (await api.sampler(session)).session_id
    absent_sampler = sampler.replace(session, ABSENT_SESSION)

    async def details(session_id: str, sampler_id: str) -> list[str]:
        model = {"session_id": session_id, "model_seq_id": 5, "base_model": "tiny/base"}
        sampling = {
            "session_id": session_id,
            "sampling_session_seq_id": 5,
            "base_model": "tiny/base",
        }
        sample = {"sampling_session_id": sampler_id, "seq_id": 9, "prompt": {"chunks": []}}
        answers = [
            await stranger.post("create_model", model),
            await stranger.post("create_model", {**model, "base_model": "not served"}),
            await stranger.post("create_sampling_session", sampling),
            await stranger.post("session_heartbeat", {"session_id": session_id}),
            await stranger.post(f"sessions/{session_id}/finish", {"reason": {"type": "success"}}),
            await stranger.get(f"sessions/{session_id}"),
            await stranger.get(f"samplers/{sampler_id}"),
            await stranger.post("asample", sample),
        ]
        assert {answer.status for answer in answers} == {404}
        return [
            answer.detail.replace(session_id, "<session>").replace(sampler_id, "<sampler>")
            for answer in answers
        ]

    assert await details(session, sampler) == await details(ABSENT_SESSION, absent_sampler)


async def test_foreign_checkpoints_are_answered_like_absent_ones(api: Api, stranger: Api):
    run = await api.run()
    await api.result(await run.send("save_weights", path="mine"))
    own = await stranger.run()

    async def details(run_id: str, name: str) -> list[str]:
        path = f"tinker://{run_id}/weights/{name}"
        session = await stranger.session()
        sampling = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
        answers = [
            await stranger.post("weights_info", {"tinker_path": path}),
            await stranger.post("create_sampling_session", sampling),
            await stranger.get(f"training_runs/{run_id}"),
            await stranger.get(f"training_runs/{run_id}/checkpoints"),
            await stranger.call("DELETE", f"training_runs/{run_id}/checkpoints/weights/{name}"),
        ]
        assert {answer.status for answer in answers} == {404}
        said = [answer.detail for answer in answers]
        said.append(await stranger.failure(await own.send("load_weights", path=path)))
        new = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": True}
        said.append(await stranger.failure(await stranger.accepted("load_weights", new)))
        return [text.replace(run_id, "<run>").replace(name, "<name>") for text in said]

    assert await details(run.run_id, "mine") == await details(f"{ABSENT_SESSION}:train:0", "none")
    assert (
        await api.post("weights_info", {"tinker_path": f"tinker://{run.run_id}/weights/mine"})
    ).status == 200


async def test_lists_hold_what_is_ones_own(api: Api, stranger: Api):
    run = await api.run()
    await api.result(await run.send("save_weights", path="mine"))
    session = run.run_id.partition(":")[0]
    for path in ("training_runs", "checkpoints", "sessions"):
        mine, theirs = await api.get(f"{path}?limit=1000"), await stranger.get(f"{path}?limit=1000")
        assert session in mine.body.decode()
        assert session not in theirs.body.decode()


@pytest.mark.parametrize(
    "model_id", ["", "x", ABSENT_SESSION, "}:h", "a}b:train:0", "\u0000", "x" * 5000, "w:train:0"]
)
async def test_what_could_be_no_run_id_is_a_404(api: Api, model_id: str):
    assert (await api.post("optim_step", {"model_id": model_id, "seq_id": 1})).status == 404


async def test_a_session_id_is_no_run_id(api: Api):
    session = await api.session()
    assert (await api.post("optim_step", {"model_id": session, "seq_id": 1})).status == 404
    assert (await api.post("get_info", {"model_id": session})).status == 404


async def test_a_tenant_with_too_many_requests_under_way_is_refused_and_others_are_not(
    second_gateway: Callable[..., Any], gateway_stack: GatewayStack, http: aiohttp.ClientSession
):
    gateway = replace(
        gateway_stack.config.gateway, tenant_requests_at_once=1, tenant_requests_waiting=0
    )
    api = await second_gateway(gateway=gateway)
    run = await api.run()
    done, go_on = await run.step(), asyncio.Event()
    await api.outcome(done)
    url, mine = f"{api.url}/api/v1/create_session", {"X-API-Key": KEYS["ann"]}

    async def slow_body() -> AsyncIterator[bytes]:
        yield b'{"tags": [], '
        await go_on.wait()
        yield b'"sdk_version": "0.38.0"}'

    async def post() -> int:
        async with http.post(url, data=slow_body(), headers=mine) as response:
            return response.status

    under_way = asyncio.create_task(post())
    for _ in range(1000):  # until the body's head has arrived
        if (refused := await api.get("get_server_capabilities")).status != 200:
            break
    assert refused.status == 429
    assert int(refused.headers["Retry-After"]) > 0
    assert (await api.poll(done)).status == 200
    assert (await Api(http, api.url, KEYS["bob"]).get("get_server_capabilities")).status == 200
    go_on.set()
    assert await under_way == 200
    assert (await api.get("get_server_capabilities")).status == 200
