"""The second dialect in circulation, on the same endpoints: other names, and a few fields more."""

from importlib.metadata import version
from typing import Any

import pytest
from tests.contract.gateway_client import BASE_MODEL, Api, Run, logprobs_of, tokens_of

TOKENS = [1, 2, 3]
GREEDY = {"max_tokens": 4, "temperature": 0, "stop": []}
INPUTS = {
    "target_tokens": {"data": [2, 3, 0], "dtype": "int32"},
    "weights": {"data": [True, True, True], "dtype": "bool"},
}


async def forward_backward(run: Run, model_input: dict[str, Any]) -> str:
    """As that dialect writes it: the data is not wrapped, and tensors have no shape."""
    data = [{"model_input": model_input, "loss_fn_inputs": INPUTS}]
    return await run.send("forward_backward", data=data, loss_fn="cross_entropy")


async def test_tokens_and_input_ids_are_one_chunk(api: Api):
    run = await api.run()
    told = []
    for model_input in (
        {"chunks": [{"tokens": TOKENS}]},
        {"tokens": TOKENS},
        {"input_ids": TOKENS, "chunks": None},
    ):
        output = await api.training_output(await forward_backward(run, model_input))
        told.append(logprobs_of(output))
    assert told[0] == told[1] == told[2]
    sampler = await api.sampler()
    fields = {"prompt": {"input_ids": TOKENS}, "sampling_params": GREEDY}
    ours, theirs = (
        await sampler.sample(TOKENS, sampling_params=GREEDY),
        await sampler.sample(**fields),
    )
    assert tokens_of(ours.sequences[0]) == tokens_of(theirs.sequences[0])


async def test_tokens_that_are_none_are_named(api: Api):
    run = await api.run()
    message = await api.failure(await forward_backward(run, {"tokens": "abc"}))
    assert "tokens" in message


async def test_a_model_may_be_asked_for_by_model_name(api: Api):
    wanted = {
        "session_id": await api.session(),
        "model_seq_id": 0,
        "model_name": BASE_MODEL,
        "lora_config": {"rank": 2},
    }
    answer = (await api.post("create_model", wanted)).json()
    assert answer["message"] == "accepted"
    assert (await api.result(answer["request_id"]))["model_id"] == answer["model_id"]


@pytest.mark.parametrize(
    "field",
    [
        {"checkpoint_path": "x"},
        {"rlve_config": {"enabled": True}},
        {"wandb_config": {"project": "x"}},
    ],
)
async def test_a_model_with_what_only_that_dialect_can_do_fails(api: Api, field: dict[str, Any]):
    run = await api.run_unchecked(**field)
    assert next(iter(field)) in await api.failure(f"{run.run_id}:0")


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
async def test_a_penalty_is_refused_and_none_is_not(api: Api, field: str):
    sampler = await api.sampler()
    refused = await sampler.send(sampling_params={"max_tokens": 2, field: 0.5})
    assert f"sampling_params.{field}" in await api.failure(refused)
    assert (await sampler.sample(sampling_params={"max_tokens": 2, field: 0.0})).sequences


async def test_a_step_tells_its_rate_and_its_number(api: Api):
    run = await api.run()
    for number in (1, 2):
        await run.forward_backward()
        result = await api.result(await run.step(learning_rate=0.5))
        assert (result["learning_rates"], result["step_count"]) == ([0.5], number)


@pytest.mark.parametrize("endpoint", ["save_weights", "save_weights_for_sampler"])
async def test_a_saved_path_is_told_under_both_names(api: Api, endpoint: str):
    run = await api.run()
    result = await api.result(await run.send(endpoint, path="x"))
    assert result["tinker_path"] == result["path"]


async def test_a_future_has_a_status(api: Api):
    run = await api.run()
    request_id = await run.step()
    await api.result(request_id)
    told = (await api.get(f"futures/{request_id}")).json()
    assert (told["status"], told["error"]) == ("completed", None)
    assert told["result"]["step_count"] == 1


async def test_health_counts_what_is_the_callers(api: Api, stranger: Api, keyless: Api):
    session = await api.session()
    for index in range(2):
        await api.run(session, model_seq_id=index)
    mine, theirs = [(await client.get(f"{client.url}/health")).json() for client in (api, stranger)]
    assert mine["status"] == "healthy"
    assert mine["version"] == version("luthier")
    assert mine["active_models"] - theirs["active_models"] >= 2
    assert mine["active_sessions"] >= 1
    assert (await keyless.get(f"{keyless.url}/health")).status == 401
