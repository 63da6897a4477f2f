"""Bookkeeping over HTTP: publishing, expiry, copies, sessions, keys, and what is refused."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientSession
from tests.contract.gateway_client import BASE_MODEL, Answer, Api, Run, Sampler
from tests.contract.gateway_stack import KEYS, GatewayStack

from luthier_core import keys
from luthier_core.auth import key_hmac
from luthier_core.blobs import open_blobs
from luthier_core.records import ApiKeyRecord

ABSENT_SESSION = "0" * 32
ABSENT_RUN = f"{ABSENT_SESSION}:train:0"


async def save(run: Run, name: str = "x", **fields: Any) -> str:
    result = await run.api.result(await run.send("save_weights", path=name, **fields))
    return str(result["path"])


async def send(api: Api, method: str, path: str, value: str = "") -> Answer:
    return await api.call(method, path, value.encode() or None)


async def listed(api: Api, run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]]
    rows = (await api.get(f"training_runs/{run.run_id}/checkpoints")).json()["checkpoints"]
    return rows


# --- published checkpoints ------------------------------------------------------------------------


async def test_a_published_checkpoint_can_be_used_by_others_until_it_is_private(
    api: Api, stranger: Api
):
    run = await api.run()
    path = await save(run)
    url = f"training_runs/{run.run_id}/checkpoints/weights/x/publish"
    info = {"tinker_path": path}
    assert (await stranger.post("weights_info", info)).status == 404
    for _ in range(2):
        assert (await send(api, "POST", url)).status == 200
    assert (await listed(stranger, run))[0]["public"]
    assert (await stranger.post("weights_info", info)).json()["lora_rank"] == 4
    described = await stranger.get(f"training_runs/{run.run_id}?access_scope=accessible")
    assert described.json()["base_model"] == BASE_MODEL

    session = await stranger.session()
    wanted = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": True}
    created = await stranger.result(await stranger.accepted("load_weights", wanted))
    assert created["path"] == path
    sampler = await stranger.sampler(session, model_path=path)
    archive = f"training_runs/{run.run_id}/checkpoints/weights/x/archive"
    assert (await stranger.get(archive)).status == 200

    for _ in range(2):
        assert (await send(api, "DELETE", url)).status == 200
    assert (await stranger.post("weights_info", info)).status == 404
    assert (await stranger.get(archive)).status == 404
    # What was begun while it was public goes on.
    assert (await Sampler(stranger, sampler.session_id).sample()).sequences


async def test_what_names_a_foreign_checkpoint_is_answered_like_an_absent_one(
    api: Api, stranger: Api
):
    run = await api.run()
    path = await save(run)
    requests = [
        ("DELETE", "", ""),
        ("POST", "/publish", ""),
        ("DELETE", "/publish", ""),
        ("PUT", "/ttl", '{"ttl_seconds": 3600}'),
        ("GET", "/archive", ""),
        ("GET", "/external_weights_urls", ""),
    ]
    for run_id, caller in ((run.run_id, stranger), (ABSENT_RUN, api)):
        for method, tail, body in requests:
            url = f"training_runs/{run_id}/checkpoints/weights/x{tail}"
            answer = await send(caller, method, url, body)
            assert answer.status == 404, url
            message = answer.detail.replace(run_id, ABSENT_RUN)
            assert message.endswith(f"tinker://{ABSENT_RUN}/weights/x"), message
    copy = {"source_path": path, "destination_project_id": "p"}
    assert (await stranger.post("copy_weights", copy)).status == 404
    assert len(await listed(api, run)) == 1


async def test_an_expiry_is_set_moved_and_taken_away(api: Api):
    run = await api.run()
    await save(run)
    url = f"training_runs/{run.run_id}/checkpoints/weights/x/ttl"
    assert (await send(api, "PUT", url, '{"ttl_seconds": 3600}')).status == 200
    first = (await listed(api, run))[0]["expires_at"]
    assert (await send(api, "PUT", url, '{"ttl_seconds": 7200}')).status == 200
    assert (await listed(api, run))[0]["expires_at"] > first
    assert (await send(api, "PUT", url, '{"ttl_seconds": null}')).status == 200
    assert (await listed(api, run))[0]["expires_at"] is None
    for wrong in ("0", "3599", "-1", '"1h"', "9e99", str(11 * 366 * 24 * 3600)):
        answer = await send(api, "PUT", url, f'{{"ttl_seconds": {wrong}}}')
        assert answer.status in (400, 422), wrong
        assert answer.status == 422 or "ttl_seconds" in answer.detail


async def test_checkpoints_of_a_run_are_listed_under_their_old_address(api: Api):
    run = await api.run()
    await save(run)
    old = await api.get(f"models/{run.run_id}/checkpoints")
    assert old.json() == (await api.get(f"training_runs/{run.run_id}/checkpoints")).json()


# --- copies ---------------------------------------------------------------------------------------


async def test_a_copy_is_made_once_under_one_idempotency_key(api: Api):
    path = await save(await api.run())
    wanted = {"source_path": path, "destination_project_id": "archive", "ttl_seconds": 3600}
    answers = [
        (await api.post("copy_weights", wanted, X_Idempotency_Key="one")).json() for _ in range(2)
    ]
    assert answers[0] == answers[1]
    copy = answers[0]["tinker_path"]
    assert copy != path
    assert (await api.post("weights_info", {"tinker_path": copy})).json()["lora_rank"] == 4
    run_id = copy.split("/")[2]
    assert (await api.get(f"training_runs/{run_id}")).json()["training_run_id"] == run_id
    listing = (await api.get("training_runs?project_id=archive")).json()["training_runs"]
    assert run_id in [row["training_run_id"] for row in listing]
    for endpoint, body in (("get_info", {}), ("optim_step", {"seq_id": 1})):
        assert (await api.post(endpoint, {"model_id": run_id, **body})).status == 404
    session = {"session_id": await api.session(), "model_seq_id": 0}
    loaded = await api.accepted("load_weights", {**session, "path": copy, "optimizer": True})
    assert (await api.result(loaded))["path"] == copy


async def test_a_copy_from_another_account_needs_a_key_of_it(api: Api, stranger: Api):
    path = await save(await api.run())
    wanted = {"source_path": path, "destination_project_id": "p"}
    header = "X_Tinker_Weights_Access_Token"
    assert (await stranger.post("copy_weights", wanted, **{header: KEYS["bob"]})).status == 404
    answer = await stranger.post("copy_weights", wanted, **{header: "tml-nobody"})
    assert answer.status == 400
    assert "weights_access_token" in answer.detail
    assert "tml-nobody" not in answer.detail
    copy = await stranger.post("copy_weights", wanted, **{header: KEYS["ann"]})
    assert (await stranger.post("weights_info", copy.json())).status == 200
    older = {**wanted, "weights_access_token": KEYS["ann"]}
    assert (await stranger.post("copy_weights", older)).status == 200
    assert (await api.post("weights_info", copy.json())).status == 404


async def test_another_account_s_checkpoint_is_loaded_with_a_key_of_it(api: Api, stranger: Api):
    path = await save(await api.run())
    session = {"session_id": await stranger.session(), "model_seq_id": 0}
    wanted = {**session, "path": path, "weights_access_token": KEYS["ann"]}
    created = await stranger.result(await stranger.accepted("load_weights", wanted))
    assert created["path"] == path
    run = await stranger.run()
    assert path in await stranger.failure(await run.send("load_weights", path=path))
    token = {"path": path, "weights_access_token": KEYS["ann"]}
    assert (await stranger.result(await run.send("load_weights", **token)))["path"] == path
    message = await stranger.failure(
        await run.send("load_weights", path=path, weights_access_token="tml-nobody")
    )
    assert "weights_access_token" in message


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"session_id": ABSENT_SESSION},
        {"destination_project_id": "p", "session_id": ABSENT_SESSION, "model_seq_id": 0},
        {"destination_project_id": "p", "ttl_seconds": 60},
        {"destination_project_id": "p", "source_path": "x"},
        {"destination_project_id": "p", "source_path": f"tinker://{ABSENT_RUN}/external_weights/x"},
        {"destination_project_id": ""},
    ],
)
async def test_a_copy_to_nowhere_is_a_400(api: Api, fields: dict[str, Any]):
    wanted = {"source_path": f"tinker://{ABSENT_RUN}/weights/x", **fields}
    assert (await api.post("copy_weights", wanted)).status == 400


# --- sessions -------------------------------------------------------------------------------------


async def test_sessions_are_searched_over_http(api: Api, stranger: Api):
    session = await api.session(display_name="Needle in hay", user_metadata={"n": "1"})
    await api.session()
    wanted = {"display_name": "HAY needle", "owner": {"type": "accessible"}, "limit": 5}
    (found,) = (await api.post("sessions/search", wanted)).json()["sessions"]
    assert found["session_id"] == session
    assert found["status"] == {"type": "active"}
    assert found["user_metadata"] == {"n": "1"}
    assert (await stranger.post("sessions/search", wanted)).json()["sessions"] == []
    for wrong in ({"limit": 0}, {"limit": 201}, {"statuses": []}, {"owner": {"type": "user"}}):
        answer = await api.post("sessions/search", wrong)
        assert answer.status == 400
        assert next(iter(wrong)) in answer.detail


async def test_a_session_is_moved_to_a_project_with_its_runs(api: Api, stranger: Api):
    run = await api.run()
    session = run.run_id.partition(":")[0]
    assert (
        await send(api, "PUT", f"sessions/{session}/project", '{"project_id": "q"}')
    ).status == 200
    page = (await api.get("training_runs?project_id=q")).json()
    assert [row["training_run_id"] for row in page["training_runs"]] == [run.run_id]
    assert page["cursor"]["total_count"] == 1
    body = '{"project_id": "mine"}'
    assert (await send(stranger, "PUT", f"sessions/{session}/project", body)).status == 404
    assert (await send(api, "PUT", f"sessions/{session}/project", "{}")).status == 400


@pytest.mark.parametrize("path", ["training_runs", "sessions", f"training_runs/{ABSENT_RUN}"])
async def test_an_access_scope_that_is_none_is_a_400(api: Api, path: str):
    answer = await api.get(f"{path}?access_scope=all")
    assert answer.status == 400
    assert "owned, accessible" in answer.detail


# --- keys -----------------------------------------------------------------------------------------


@asynccontextmanager
async def new_key(stack: GatewayStack, key: str, **fields: Any) -> AsyncIterator[str]:
    """A key of ann."""
    record = ApiKeyRecord(tenant="ann", created_at="2026-01-02T03:04:05Z", **fields)
    async with open_blobs(stack.config) as blobs:
        await blobs.put(
            keys.api_key_record(key_hmac(stack.config.secret(), key)), record.to_bytes()
        )
        yield key


async def test_a_key_says_what_it_is_and_can_end_itself(
    gateway_stack: GatewayStack, http: ClientSession
):
    async with new_key(gateway_stack, "tml-short-lived", name="laptop", note="for tests") as key:
        api = Api(http, gateway_stack.url, key)
        told = (await api.get("auth/apikey/me")).json()
        assert isinstance(told.pop("key_id"), int)
        assert told == {
            "name": "laptop",
            "note": "for tests",
            "details": {"org_details": {"name": "ann"}, "user_details": {"email": "ann"}},
        }
        assert (await send(api, "DELETE", "auth/apikey/me")).status == 200
        assert (await api.get("auth/apikey/me")).status == 401
        assert (await api.get("training_runs")).status == 401


async def test_a_key_ends_no_other_key(api: Api, gateway_stack: GatewayStack, http: ClientSession):
    async with new_key(gateway_stack, "tml-other") as key:
        await send(Api(http, gateway_stack.url, key), "DELETE", "auth/apikey/me")
    assert (await api.get("auth/apikey/me")).status == 200


# --- description ----------------------------------------------------------------------------------


async def test_the_api_describes_itself(api: Api):
    description = (await api.get("openapi.json")).json()
    assert description["openapi"].startswith("3.1")
    assert "/api/v1/training_runs/{run_id}" in description["paths"]


# --- not offered ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "auth/token"),
        ("POST", "auth/apikey"),
    ],
)
async def test_what_is_not_offered_is_refused_with_a_sentence(api: Api, method: str, path: str):
    answer = await send(api, method, path)
    assert answer.status == 400
    assert answer.detail.startswith("This server does not support that: ")


async def test_telemetry_is_accepted_whatever_it_is(api: Api):
    for value in ({}, {"events": [{"event": "x"}] * 100, "session_id": "sessionless-1"}):
        assert (await api.post("telemetry", value)).json() == {"status": "accepted"}
