"""Saving, loading and listing over HTTP: names, overwriting, paging, and what a path stands for."""

from typing import Any

import pytest
from tests.contract.gateway_client import BASE_MODEL, Api, Run, datum, logprobs_of
from tests.contract.gateway_stack import KEYS, GatewayStack

ABSENT_RUN = f"{'0' * 32}:train:0"


async def train(run: Run, steps: int = 1) -> None:
    for _ in range(steps):
        await run.forward_backward()
        await run.step(learning_rate=0.1)


async def save(run: Run, name: str, **fields: Any) -> str:
    """The path of a training checkpoint."""
    result = await run.api.result(await run.send("save_weights", path=name, **fields))
    return str(result["path"])


async def logprobs(run: Run) -> list[list[float]]:
    request_id = await run.forward_backward(datum([7, 8, 9]), forward_only=True)
    return logprobs_of(await run.api.training_output(request_id))


async def names_of(api: Api, run: Run) -> set[str]:
    listed = (await api.get(f"training_runs/{run.run_id}/checkpoints")).json()
    return {checkpoint["checkpoint_id"] for checkpoint in listed["checkpoints"]}


# --- saving ---------------------------------------------------------------------------------------


async def test_a_save_answers_with_the_path_that_everything_else_takes(api: Api):
    run = await api.run(user_metadata={"exp": "x"})
    path = await save(run, "step-1", user_metadata={"loss": "0.5"})
    assert path == f"tinker://{run.run_id}/weights/step-1"
    info = (await api.post("weights_info", {"tinker_path": path})).json()
    assert info == {
        "base_model": BASE_MODEL,
        "is_lora": True,
        "lora_rank": 4,
        "train_unembed": True,
        "train_mlp": True,
        "train_attn": True,
    }
    listed = (await api.get(f"training_runs/{run.run_id}/checkpoints")).json()["checkpoints"]
    assert len(listed) == 1
    assert (
        listed[0].items()
        >= {
            "checkpoint_id": "weights/step-1",
            "checkpoint_type": "training",
            "tinker_path": path,
            "public": False,
            "user_metadata": {"loss": "0.5"},
            "expires_at": None,
        }.items()
    )
    assert listed[0]["size_bytes"] > 0


async def test_a_name_that_exists_fails_the_save_and_keeps_the_first(api: Api):
    run = await api.run()
    path = await save(run, "x")
    before = await logprobs(run)
    await train(run)
    message = await api.failure(await run.send("save_weights", path="x"))
    assert "name='x' exists" in message
    assert "overwrite" in message
    await api.result(await run.send("load_weights", path=path, optimizer=True))
    assert await logprobs(run) == before


async def test_overwrite_replaces_what_the_name_stands_for(api: Api):
    run = await api.run()
    await save(run, "x", user_metadata={"at": "0"})
    await train(run)
    after = await logprobs(run)
    path = await save(run, "x", overwrite=True, user_metadata={"at": "1"})
    await train(run)
    await api.result(await run.send("load_weights", path=path, optimizer=True))
    assert await logprobs(run) == after
    listed = (await api.get(f"training_runs/{run.run_id}/checkpoints")).json()["checkpoints"]
    assert [checkpoint["user_metadata"] for checkpoint in listed] == [{"at": "1"}]


async def test_one_name_may_stand_for_weights_of_both_kinds(api: Api):
    run = await api.run()
    await save(run, "x")
    result = await api.result(await run.send("save_weights_for_sampler", path="x"))
    assert result["path"] == f"tinker://{run.run_id}/sampler_weights/x"
    assert await names_of(api, run) == {"weights/x", "sampler_weights/x"}


async def test_a_sampler_name_that_exists_fails_the_save(api: Api):
    run = await api.run()
    await api.result(await run.send("save_weights_for_sampler", path="x"))
    message = await api.failure(await run.send("save_weights_for_sampler", path="x"))
    assert "name='x' exists" in message


async def test_weights_of_a_sampling_session_are_not_listed(api: Api):
    run = await api.run()
    await api.result(await run.send("save_weights_for_sampler", sampling_session_seq_id=0))
    assert await names_of(api, run) == set()


async def test_a_save_that_expires_says_when(api: Api):
    run = await api.run()
    await save(run, "x", ttl_seconds=3600)
    listed = (await api.get(f"training_runs/{run.run_id}/checkpoints")).json()["checkpoints"]
    assert listed[0]["expires_at"] > listed[0]["time"]


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [True, False])
async def test_a_new_run_from_a_checkpoint_goes_on_as_the_first_would_have(
    api: Api, optimizer: bool
):
    run = await api.run()
    await train(run, 2)
    path = await save(run, "x")
    session = await api.session()
    wanted = {"session_id": session, "model_seq_id": 3, "path": path, "optimizer": optimizer}
    created = await api.result(await api.accepted("load_weights", wanted))
    assert created["path"] == path
    other = Run(api, f"{session}:train:3")
    assert (await api.post("get_info", {"model_id": other.run_id})).json()["lora_rank"] == 4
    assert await logprobs(other) == await logprobs(run)
    await train(run)
    await train(other)
    assert (await logprobs(other) == await logprobs(run)) is optimizer


async def test_loading_into_a_run_restores_weights_and_clears_the_gradient(api: Api):
    run = await api.run()
    await train(run)
    saved = await logprobs(run)
    path = await save(run, "x")
    await train(run, 2)
    assert await logprobs(run) != saved
    await run.forward_backward()
    result = await api.result(await run.send("load_weights", path=path, optimizer=True))
    assert result["path"] == path
    assert await logprobs(run) == saved
    assert (await api.result(await run.step()))["metrics"]["grad_norm"] == 0


async def test_a_checkpoint_of_another_rank_is_refused_and_the_run_goes_on(api: Api):
    path = await save(await api.run(), "x")
    run = await api.run(lora_config={"rank": 2})
    before = await logprobs(run)
    message = await api.failure(await run.send("load_weights", path=path, optimizer=True))
    assert "rank 4" in message
    assert "rank 2" in message
    assert await logprobs(run) == before


async def test_sampler_weights_cannot_be_trained_on(api: Api):
    run = await api.run()
    path = (await api.result(await run.send("save_weights_for_sampler", path="x")))["path"]
    wanted = {"session_id": await api.session(), "model_seq_id": 0, "path": path}
    message = await api.failure(await api.accepted("load_weights", {**wanted, "optimizer": False}))
    assert path in message
    assert "weights" in message


async def test_a_path_that_is_none_is_refused_with_the_form_of_one(api: Api):
    for path in ("x", "tinker://", f"tinker://{ABSENT_RUN}/weights", "tinker://a/../../b"):
        answer = await api.post("weights_info", {"tinker_path": path})
        assert answer.status in (400, 404)
        assert "tinker" in answer.detail
    answer = await api.post("weights_info", {"tinker_path": f"tinker://{ABSENT_RUN}/weights/x"})
    assert answer.status == 404


# --- deleting -------------------------------------------------------------------------------------


async def test_a_deleted_checkpoint_is_gone_and_its_name_is_free(api: Api):
    run = await api.run()
    path = await save(run, "x")
    url = f"training_runs/{run.run_id}/checkpoints/weights/x"
    assert (await api.call("DELETE", url)).status == 200
    assert await names_of(api, run) == set()
    assert (await api.post("weights_info", {"tinker_path": path})).status == 404
    assert path in await api.failure(await run.send("load_weights", path=path))
    assert (await api.call("DELETE", url)).status == 404
    assert await save(run, "x") == path


async def test_what_is_no_checkpoint_cannot_be_deleted(api: Api):
    run = await api.run()
    for tail in ("weights/none", "nonsense/x", "weights/a/b", "weights/%2e%2e", "weights"):
        answer = await api.call("DELETE", f"training_runs/{run.run_id}/checkpoints/{tail}")
        assert answer.status in (400, 404)
    answer = await api.call("DELETE", f"training_runs/{ABSENT_RUN}/checkpoints/weights/x")
    assert answer.status == 404


# --- lists ----------------------------------------------------------------------------------------


async def test_checkpoints_come_in_pages_latest_first(api: Api):
    run = await api.run()
    for index in range(5):
        await save(run, f"c{index}")
    whole = (await api.get("checkpoints?limit=1000")).json()
    paths = [row["tinker_path"] for row in whole["checkpoints"]]
    latest_first = [f"tinker://{run.run_id}/weights/c{index}" for index in (4, 3, 2, 1, 0)]
    assert [path for path in paths if run.run_id in path] == latest_first
    assert whole["cursor"] == {
        "offset": 0,
        "limit": 1000,
        "total_count": len(paths),
    }
    pages = [(await api.get(f"checkpoints?limit=2&offset={at}")).json() for at in (0, 2, 4)]
    assert [page["cursor"]["offset"] for page in pages] == [0, 2, 4]
    paged = [row["tinker_path"] for page in pages for row in page["checkpoints"]]
    assert paged == paths[:6]
    beyond = (await api.get("checkpoints?offset=100000")).json()
    assert beyond["checkpoints"] == []
    assert beyond["cursor"]["limit"] == 100


async def test_training_runs_are_listed_with_their_last_checkpoints(api: Api):
    run = await api.run(user_metadata={"exp": "x"})
    await save(run, "a")
    path = await save(run, "b")
    described = (await api.get(f"training_runs/{run.run_id}")).json()
    assert (
        described.items()
        >= {
            "training_run_id": run.run_id,
            "base_model": BASE_MODEL,
            "is_lora": True,
            "lora_rank": 4,
            "corrupted": False,
            "user_metadata": {"exp": "x"},
            "last_sampler_checkpoint": None,
        }.items()
    )
    assert described["last_checkpoint"]["tinker_path"] == path
    assert described["model_owner"]
    assert described["last_request_time"]
    page = (await api.get("training_runs?limit=1")).json()
    assert described.pop("recovered") == []  # told of a single run only
    assert page["training_runs"] == [described]
    assert page["cursor"]["limit"] == 1
    assert page["cursor"]["total_count"] >= 1
    default = (await api.get("training_runs")).json()
    assert default["cursor"]["limit"] == 20


@pytest.mark.parametrize("path", ["training_runs", "checkpoints", "sessions"])
@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=-1", "limit"),
        ("limit=ten", "limit"),
        ("offset=-1", "offset"),
        ("offset=1.5", "offset"),
        (f"offset={'9' * 5000}", "offset"),
        ("limit=%C2%B2", "limit"),
    ],
)
async def test_a_page_that_there_is_not_is_a_400(api: Api, path: str, query: str, field: str):
    answer = await api.get(f"{path}?{query}")
    assert answer.status == 400
    assert field in answer.detail
    assert "allowed are" in answer.detail


async def test_lists_take_what_the_sdk_sends_beside_the_page(api: Api):
    assert (await api.get("training_runs?access_scope=owned&limit=5&project_id=p")).status == 200


async def test_nothing_that_is_answered_holds_a_key(api: Api, gateway_stack: GatewayStack):
    run = await api.run()
    await save(run, "x")
    for path in ("training_runs", "checkpoints", "sessions", f"training_runs/{run.run_id}"):
        body = (await api.get(path)).body.decode()
        assert not any(key in body for key in KEYS.values())
        assert gateway_stack.config.secret().hex() not in body
