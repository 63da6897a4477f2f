"""Bootstrap and sessions: configuration, heartbeats, the end of a session, health."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.contract.gateway_client import BASE_MODEL, Api, datum
from tests.contract.gateway_stack import MAX_CONTEXT_TOKENS, GatewayStack

SUCCESS = {"reason": {"type": "success"}, "detail": None}


async def finish(api: Api, session_id: str, **fields: Any) -> int:
    answer = await api.post(f"sessions/{session_id}/finish", {**SUCCESS, **fields})
    return answer.status


# --- bootstrap ------------------------------------------------------------------------------------


NEEDS = {
    "sample_use_retrieve_futures": "retrieve_futures",
    "sample_cancel_enabled": "cancel_future",
    "sample_join_sampling_session": "join_sampling_session",
    "custom_loss_server_side": "create_custom_loss",
    "pjwt_auth_enabled": "auth/token",
    "create_model_via_load_weights": "load_weights",
    "proto_write_fwdbwd": "forward_backward",
    "fwd_via_fwdbwd": "forward_backward",
    "proto_compress_fwdbwd": "forward_backward",
}
"""Switch of the client -> the endpoint that it then calls."""


@pytest.mark.parametrize("path", ["client/config", "client/dynamic_config"])
async def test_the_client_is_told_to_use_nothing_that_is_not_there(api: Api, path: str):
    answer = await api.post(path, {"sdk_version": "0.38.0"})
    assert answer.status == 200
    switches = answer.json()
    assert switches.keys() <= NEEDS.keys()
    for name, value in switches.items():
        assert value in (True, False)
        if value:
            assert (await api.post(NEEDS[name])).status != 404


async def test_the_models_that_can_be_trained_are_listed(api: Api):
    answer = await api.get("get_server_capabilities")
    assert answer.json() == {
        "supported_models": [
            {
                "model_name": BASE_MODEL,
                "max_context_length": MAX_CONTEXT_TOKENS,
                "trainable": True,
                "sampleable": True,
            }
        ]
    }


async def test_telemetry_is_accepted_in_the_word_the_sdk_wants(api: Api):
    event = {"event": "SESSION_START", "event_id": "1", "severity": "INFO"}
    body = {"events": [event], "platform": "Linux", "session_id": "sessionless-1"}
    assert (await api.post("telemetry", body)).json() == {"status": "accepted"}


async def test_health_names_what_is_missing(
    second_gateway: Callable[..., Any], gateway_stack: GatewayStack
):
    config = gateway_stack.config
    other = replace(config.models[0], name="tiny/other")
    larger = await second_gateway(models=(*config.models, other))
    answer = await larger.get("healthz")
    assert answer.status == 503
    assert answer.json()["missing"] == ["trainer of tiny/other", "sampler of tiny/other"]
    assert (await larger.call("GET", f"{larger.url}/readyz")).status == 200
    without_registry = await second_gateway(registry_url="unix:///nowhere/registry.sock")
    answer = await without_registry.get("healthz")
    assert answer.status == 503
    assert answer.json()["missing"] == ["registry"]


# --- sessions -------------------------------------------------------------------------------------


async def test_sessions_are_different_and_one_key_makes_one_session(api: Api, stranger: Api):
    body = {"tags": ["a"], "user_metadata": None, "sdk_version": "0.38.0"}
    answers = [
        await api.post("create_session", body, X_Idempotency_Key="stainless-python-retry-1")
        for _ in range(2)
    ]
    one, again = (answer.json()["session_id"] for answer in answers)
    assert one == again
    others = [
        await api.post("create_session", body, X_Idempotency_Key="stainless-python-retry-2"),
        await api.post("create_session", body),
        await api.post("create_session", body),
        await stranger.post("create_session", body, X_Idempotency_Key="stainless-python-retry-1"),
    ]
    assert len({one, *(answer.json()["session_id"] for answer in others)}) == 5


async def test_a_session_is_described_with_its_runs_and_samplers(api: Api):
    session = await api.session(user_metadata={"exp": "x"}, display_name="mine")
    run, sampler = await api.run(session), await api.sampler(session)
    assert (await api.get(f"sessions/{session}")).json() == {
        "training_run_ids": [run.run_id],
        "sampler_ids": [sampler.session_id],
        "user_metadata": {"exp": "x"},
        "display_name": "mine",
    }
    assert session in (await api.get("sessions?limit=1000")).json()["sessions"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tags": "a"}, "tags"),
        ({"tags": [1]}, "tags.0"),
        ({"user_metadata": []}, "user_metadata"),
        ({"sdk_version": 38}, "sdk_version"),
    ],
)
async def test_a_wrong_field_of_a_session_is_named(api: Api, fields: dict[str, Any], said: str):
    answer = await api.post("create_session", {"tags": [], "sdk_version": "0", **fields})
    assert answer.status == 400
    assert said in answer.detail


async def test_heartbeats_are_answered_until_the_session_ends(api: Api):
    session = await api.session()
    for _ in range(2):
        answer = await api.post("session_heartbeat", {"session_id": session})
        assert (answer.status, answer.json()) == (200, {"type": "session_heartbeat"})
    assert await finish(api, session) == 200
    answer = await api.post("session_heartbeat", {"session_id": session})
    assert answer.status == 410
    assert session in answer.detail


async def test_a_session_may_be_finished_again_and_the_first_reason_stays(api: Api):
    session = await api.session()
    assert await finish(api, session, reason={"type": "interrupted"}) == 200
    assert await finish(api, session, reason={"type": "success"}) == 200
    assert await finish(api, session, reason={"type": "bored"}) == 400


async def test_what_was_accepted_before_the_end_is_executed(api: Api):
    session = await api.session()
    run, sampler = await api.run(session), await api.sampler(session)
    ids = [await run.forward_backward(datum([i, i + 1])) for i in range(8)]
    step, sample = await run.step(), await sampler.send()
    assert await finish(api, session) == 200
    for request_id in ids:
        await api.training_output(request_id)
    await api.result(step)
    await api.samples(sample)


async def test_an_ended_session_makes_no_new_runs_and_samplers(api: Api):
    session = await api.session()
    run = await api.run(session)
    path = (await api.result(await run.send("save_weights", path="x")))["path"]
    assert await finish(api, session) == 200
    new = {"session_id": session, "model_seq_id": 1}
    created = {**new, "base_model": BASE_MODEL, "lora_config": {"rank": 1}}
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE_MODEL}
    for endpoint, body in (("create_model", created), ("create_sampling_session", sampling)):
        answer = await api.post(endpoint, body)
        assert answer.status == 400
        assert f"session_id='{session}' is finished" in answer.detail
    loaded = await api.accepted("load_weights", {**new, "path": path, "optimizer": True})
    assert "is finished" in await api.failure(loaded)
    # A creation that had been accepted before is the same when it is sent again.
    wanted = {"session_id": session, "model_seq_id": 0, "base_model": BASE_MODEL}
    again = await api.post("create_model", {**wanted, "lora_config": {"rank": 4, "seed": 1}})
    assert (again.status, again.json()["model_id"]) == (200, run.run_id)


async def test_work_of_an_ended_session_is_refused(api: Api):
    session = await api.session()
    run, sampler = await api.run(session), await api.sampler(session)
    assert await finish(api, session) == 200
    answers = [
        await run.post_message(run.message(datum())),
        await run.post("optim_step"),
        await run.post("save_weights", path="x"),
        await run.post("save_weights_for_sampler", path="x"),
        await sampler.post(),
    ]
    assert [answer.status for answer in answers] == [400] * 5
    for answer in answers:
        assert f"session {session} is finished" in answer.detail


async def test_a_retry_of_what_was_accepted_before_the_finish_keeps_its_answer(api: Api):
    session = await api.session()
    run, sampler = await api.run(session), await api.sampler(session)
    step, sample = await run.step(seq_id=1), await sampler.send(seq_id=0)
    assert await finish(api, session) == 200
    assert await run.step(seq_id=1) == step
    assert await sampler.send(seq_id=0) == sample
    assert (await run.post("optim_step", seq_id=2)).status == 400
    assert (await sampler.post(seq_id=1)).status == 400
