"""Training over HTTP: order, retries, gradients, and bad requests that fail and hurt nothing."""

import asyncio
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp.test_utils import TestServer
from tests.contract.gateway_client import (
    BASE_MODEL,
    Api,
    Run,
    datum,
    float32,
    int64,
    logprobs_of,
)
from tests.contract.gateway_stack import (
    LIMITS,
    MAX_CONTEXT_TOKENS,
    TOKENIZER,
    VOCAB_SIZE,
    GatewayStack,
)

from luthier_core.ops import INLINE_LIMIT
from luthier_core.proto import wire_pb2
from luthier_registry.app import build_app as build_registry

LAST_ID = VOCAB_SIZE - 1
ABSENT_RUN = f"{'0' * 32}:train:0"


async def logprobs(api: Api, run: Run) -> list[list[float]]:
    """What the run's weights say about one datum, without touching its gradient."""
    return logprobs_of(await api.training_output(await run.forward_backward(forward_only=True)))


async def grad_norm(api: Api, run: Run, **adam: float) -> float:
    """Of the summed gradient, which the step applies and clears."""
    metrics = (await api.result(await run.step(**adam)))["metrics"]
    return float(metrics["grad_norm"])


# --- results --------------------------------------------------------------------------------------


async def test_a_run_is_created_under_the_id_that_the_sdk_computes(api: Api):
    session = await api.session()
    run = await api.run(session, model_seq_id=7)
    assert run.run_id == f"{session}:train:7"
    info = (await api.post("get_info", {"model_id": run.run_id})).json()
    assert info["model_id"] == run.run_id
    assert info["model_data"]["model_name"] == info["model_name"] == BASE_MODEL
    assert info["model_data"]["tokenizer_id"] == TOKENIZER
    assert (info["is_lora"], info["lora_rank"]) == (True, 4)
    assert info["optimizer_config"] == {"type": "adamw"}


async def test_results_are_protobuf_with_one_entry_per_datum(api: Api):
    run = await api.run()
    data = [datum([1, 2, 3]), datum([4, 5]), datum([6] * 7)]
    output = await api.training_output(await run.forward_backward(*data))
    assert sum(record.num_datums for record in output.loss_fn_outputs) == 3
    assert [len(values) for values in logprobs_of(output)] == [3, 2, 7]
    assert output.metrics["loss:sum"] == pytest.approx(
        -sum(sum(values) for values in logprobs_of(output)), rel=1e-5
    )
    assert "clock_cycle:unique" in output.metrics
    assert all(name.count(":") == 1 for name in output.metrics)


async def test_a_fresh_run_scores_like_the_base_model_and_a_step_lowers_the_loss(api: Api):
    one, other = await api.run(), await api.run(lora_config={"rank": 2, "seed": 9})
    assert await logprobs(api, one) == await logprobs(api, other)
    losses = []
    for _ in range(3):
        request_id = await one.forward_backward()
        await one.step()
        losses.append((await api.training_output(request_id)).metrics["loss:sum"])
    assert losses[0] > losses[1] > losses[2]


async def test_chunks_add_up_to_one_call_and_forward_adds_nothing(api: Api):
    whole, chunked = await api.run(), await api.run()
    data = [datum([1, 2, 3]), datum([4, 5]), datum([6] * 7)]
    await whole.forward_backward(*data)
    for part in data:
        await chunked.forward_backward(part)
        await chunked.forward_backward(part, forward_only=True)
    assert await grad_norm(api, chunked) == pytest.approx(await grad_norm(api, whole), rel=1e-4)


async def test_a_step_without_a_gradient_is_no_error(api: Api):
    run = await api.run()
    before = await logprobs(api, run)
    assert await grad_norm(api, run) == 0
    assert await logprobs(api, run) == before


async def test_a_request_and_a_result_of_many_bytes_take_the_way_through_the_store(api: Api):
    run = await api.run()
    tokens = np.arange(60) % VOCAB_SIZE
    targets = np.tile(tokens[:, None], 9)
    inputs = {"target_tokens": int64(targets), "weights": float32(np.ones(targets.shape))}
    for tensor in inputs.values():
        tensor.shape.extend(targets.shape)
    message = run.message(*[datum(tokens.tolist(), **inputs)] * 8)
    body = message.SerializeToString()
    answer = await run.post_bytes(body)
    output = await api.training_output(answer.json()["request_id"])
    assert len(body) > INLINE_LIMIT
    assert len(output.SerializeToString()) > INLINE_LIMIT
    assert [len(values) for values in logprobs_of(output)] == [60 * 9] * 8


# --- order and retries ----------------------------------------------------------------------------


async def test_requests_that_arrive_as_2_3_1_are_executed_as_1_2_3(api: Api):
    run, other = await api.run(), await api.run()
    ids = {}
    for seq in (2, 3, 1):
        data = datum([seq, seq + 1, seq + 2])
        ids[seq] = await run.forward_backward(data, seq_id=seq)
    run.next_seq = 4
    outputs = [await api.training_output(ids[seq]) for seq in (1, 2, 3)]
    cycles = [output.metrics["clock_cycle:unique"] for output in outputs]
    assert cycles == sorted(cycles)
    for seq in (1, 2, 3):
        await other.forward_backward(datum([seq, seq + 1, seq + 2]))
    # In another order the sum would have other bits.
    assert await grad_norm(api, run) == await grad_norm(api, other)


async def test_a_step_that_arrives_before_its_gradient_is_executed_after_it(api: Api):
    run = await api.run()
    step = await run.step(seq_id=2)
    assert (await api.poll(step)).status == 408
    await run.forward_backward(seq_id=1)
    assert (await api.result(step))["metrics"]["grad_norm"] > 0


async def test_a_post_that_is_sent_again_is_the_same_request(api: Api):
    run = await api.run()
    message = run.message(datum())
    answers = [await run.post_message(message) for _ in range(2)]
    first = await api.training_output(answers[0].json()["request_id"])
    answers.append(await run.post_message(message))  # after it has been executed
    assert len({answer.json()["request_id"] for answer in answers}) == 1
    assert await api.training_output(answers[2].json()["request_id"]) == first
    step = [(await run.post("optim_step", seq_id=2)).json() for _ in range(2)]
    assert step[0] == step[1]
    other = await api.run()
    await other.forward_backward()
    # One gradient was added, not three.
    metrics = (await api.result(step[0]["request_id"]))["metrics"]
    assert metrics["grad_norm"] == await grad_norm(api, other, learning_rate=1e-4)


async def test_the_same_json_in_another_order_is_the_same_request(api: Api):
    run = await api.run()
    adam = {"learning_rate": 0.5, "beta1": 0.5}
    one = await api.post("optim_step", {"model_id": run.run_id, "seq_id": 1, "adam_params": adam})
    reversed_adam = dict(reversed(adam.items()))
    body = {"adam_params": reversed_adam, "seq_id": 1, "model_id": run.run_id}
    assert (await api.post("optim_step", body)).json() == one.json()


async def test_a_seq_that_was_used_for_another_body_is_a_400_and_the_first_one_counts(api: Api):
    run = await api.run()
    first = await run.forward_backward(datum([1, 2, 3]), seq_id=1)
    answer = await run.post_message(run.message(datum([3, 2, 1]), seq_id=1))
    assert answer.status == 400
    assert "seq_id: 1" in answer.detail
    assert (await run.post("optim_step", seq_id=1)).status == 400
    await api.training_output(first)
    run.next_seq = 2
    assert await grad_norm(api, run) > 0


async def test_a_creation_sent_again_is_the_same_run_and_another_body_is_a_400(api: Api):
    wanted = {
        "session_id": await api.session(),
        "model_seq_id": 0,
        "base_model": BASE_MODEL,
        "lora_config": {"rank": 4},
    }
    one, again = await api.post("create_model", wanted), await api.post("create_model", wanted)
    assert one.status == again.status == 200
    assert one.json() == again.json()
    await api.result(one.json()["request_id"])
    other = await api.post("create_model", {**wanted, "lora_config": {"rank": 8}})
    assert other.status == 400
    assert (await api.post("get_info", {"model_id": f"{wanted['session_id']}:train:0"})).json()[
        "lora_rank"
    ] == 4


async def test_a_save_sent_again_keeps_the_sampling_session_of_the_first_try(api: Api):
    run = await api.run()
    ids = [
        await run.send("save_weights_for_sampler", seq_id=1, sampling_session_seq_id=seq)
        for seq in (0, 1)
    ]
    assert ids[0] == ids[1]
    session = run.run_id.partition(":")[0]
    result = await api.result(ids[0])
    assert result["sampling_session_id"] == f"{session}:sample:0"
    assert result.get("path") is None


async def test_many_requests_at_once_are_executed_in_their_order(api: Api):
    run, other = await api.run(), await api.run()

    async def send(target: Run, seq: int) -> str:
        if seq % 3:
            return await target.forward_backward(datum([seq, seq + 1]), seq_id=seq)
        return await target.step(seq_id=seq)

    await asyncio.gather(*(send(run, seq) for seq in range(30, 0, -1)))
    for seq in range(1, 31):
        await send(other, seq)
    run.next_seq = other.next_seq = 31
    assert await logprobs(api, run) == await logprobs(api, other)


# --- bad requests fail their future, and the run goes on ------------------------------------------

BAD_DATA: dict[str, tuple[list[wire_pb2.Datum], dict[str, Any], str, str]] = {
    "unknown loss": ([datum()], {"loss_fn": "mse"}, "loss_fn: 'mse'", "cross_entropy"),
    "empty batch": ([], {}, "data: empty", "at least one datum"),
    "too many datums": ([datum()] * 9, {}, "data: 9 datums", "at most 8"),
    "missing target_tokens": (
        [datum(target_tokens=None)],
        {},
        "data[0].loss_fn_inputs.target_tokens: missing",
        "['target_tokens', 'weights']",
    ),
    "missing weights": (
        [datum(), datum(weights=None)],
        {},
        "data[1].loss_fn_inputs.weights: missing",
        "['target_tokens', 'weights']",
    ),
    "length mismatch": (
        [datum([1, 2, 3], weights=float32([1, 1]))],
        {},
        "data[0].loss_fn_inputs.weights: shape [2]",
        "[3] or [3, K]",
    ),
    "input token beyond the vocabulary": (
        [datum([1, LAST_ID + 1])],
        {},
        f"data[0].model_input: token id {LAST_ID + 1}",
        f"0 to {LAST_ID}",
    ),
    "target beyond the vocabulary": (
        [datum(target_tokens=int64([1, 2, LAST_ID + 1]))],
        {},
        f"data[0].loss_fn_inputs.target_tokens: token id {LAST_ID + 1}",
        f"0 to {LAST_ID}",
    ),
    "context over the limit": (
        [datum([1] * (MAX_CONTEXT_TOKENS + 1))],
        {},
        f"data[0].model_input: {MAX_CONTEXT_TOKENS + 1} tokens",
        f"context has {MAX_CONTEXT_TOKENS}",
    ),
    "weight that is no number": (
        [datum(weights=float32([1, np.nan, 1]))],
        {},
        "data[0].loss_fn_inputs.weights",
        "finite",
    ),
    "image": (
        [
            wire_pb2.Datum(
                model_input=[wire_pb2.Chunk(image=wire_pb2.ImageChunk(data=b"", format="png"))]
            )
        ],
        {},
        "data[0].model_input: chunk of type 'image'",
        "'encoded_text'",
    ),
}


async def assert_goes_on(api: Api, run: Run) -> None:
    """The next seqs are executed as if nothing had been."""
    output = await api.training_output(await run.forward_backward())
    assert output.metrics["loss:sum"] > 0
    assert await grad_norm(api, run) > 0


@pytest.mark.parametrize("name", BAD_DATA)
async def test_a_bad_forward_backward_fails_its_future_and_the_run_goes_on(api: Api, name: str):
    data, fields, field, allowed = BAD_DATA[name]
    run = await api.run()
    answer = await run.post_message(run.message(*data, **fields))
    assert answer.status == 200
    message = await api.failure(answer.json()["request_id"])
    assert field in message
    assert allowed in message[message.index(field) :]
    await assert_goes_on(api, run)


BAD_JSON: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "learning rate": (
        "optim_step",
        {"adam_params": {"learning_rate": -1}},
        "adam_params.learning_rate",
        "greater than or equal to 0, got -1",
    ),
    "beta": ("optim_step", {"adam_params": {"beta1": 1.5}}, "adam_params.beta1", "less than 1"),
    "another optimizer": (
        "optim_step",
        {"optimizer_params": {"type": "dimuon", "learning_rate": 1}},
        "optimizer_params",
        "adam_params",
    ),
    "name of a checkpoint": ("save_weights", {"path": "a/b"}, "path", "pattern"),
    "no name": ("save_weights", {}, "path", "required"),
    "ttl": ("save_weights", {"path": "a", "ttl_seconds": 5}, "ttl_seconds", "3600"),
    "neither name nor session": (
        "save_weights_for_sampler",
        {},
        "path or sampling_session_seq_id",
        "required",
    ),
    "absent checkpoint": (
        "load_weights",
        {"path": f"tinker://{ABSENT_RUN}/weights/x"},
        f"{ABSENT_RUN}/weights/x",
        "",
    ),
    "no path of a checkpoint": ("load_weights", {"path": "weights/x"}, "path", "tinker://"),
    "a checkpoint of somebody else": (
        "load_weights",
        {"path": f"tinker://{ABSENT_RUN}/weights/x", "weights_access_token": "t"},
        "weights_access_token",
        "",
    ),
}


@pytest.mark.parametrize("name", BAD_JSON)
async def test_a_bad_json_request_fails_its_future_and_the_run_goes_on(api: Api, name: str):
    endpoint, fields, field, allowed = BAD_JSON[name]
    run = await api.run()
    message = await api.failure(await run.send(endpoint, **fields))
    assert field in message
    assert allowed in message[message.index(field) :]
    await assert_goes_on(api, run)


BAD_CREATION: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown model": ({"base_model": "huge"}, "base_model: 'huge'", f"['{BASE_MODEL}']"),
    "rank over the limit": (
        {"lora_config": {"rank": LIMITS.max_rank + 1}},
        f"lora_config.rank: {LIMITS.max_rank + 1}",
        f"1 to {LIMITS.max_rank}",
    ),
    "rank 0": ({"lora_config": {"rank": 0}}, "lora_config.rank", "greater than or equal to 1"),
    "rank that is no number": ({"lora_config": {"rank": "big"}}, "lora_config.rank", "integer"),
    "nothing to train": (
        {
            "lora_config": {
                "rank": 1,
                "train_unembed": False,
                "train_mlp": False,
                "train_attn": False,
            }
        },
        "lora_config",
        "train_unembed, train_mlp, train_attn must be true",
    ),
    "another optimizer": (
        {"optimizer_config": {"type": "dimuon", "version": 1}},
        "optimizer_config.type: 'dimuon'",
        "'adamw'",
    ),
}


@pytest.mark.parametrize("name", BAD_CREATION)
async def test_a_bad_creation_fails_its_future_and_the_session_goes_on(api: Api, name: str):
    fields, field, allowed = BAD_CREATION[name]
    session = await api.session()
    refused = await api.run_unchecked(session, **fields)
    message = await api.failure(f"{refused.run_id}:0")
    assert field in message
    assert allowed in message[message.index(field) :]
    again = await api.run_unchecked(session, **fields)
    assert await api.failure(f"{again.run_id}:0") == message
    await assert_goes_on(api, await api.run(session, model_seq_id=1))


async def test_a_run_that_could_not_be_created_takes_nothing(api: Api):
    run = await api.run_unchecked(base_model="huge")
    await api.failure(f"{run.run_id}:0")
    answers = [
        await run.post_message(run.message(datum())),
        await run.post("optim_step"),
        await run.post("save_weights", path="x"),
        await run.post("load_weights", path=f"tinker://{ABSENT_RUN}/weights/x"),
    ]
    assert [answer.status for answer in answers] == [400] * 4
    for answer in answers:
        assert run.run_id in answer.detail
        assert "could not be created" in answer.detail
    assert (await api.post("get_info", {"model_id": run.run_id})).status == 400


async def test_an_id_is_needed_to_fail_a_creation(api: Api):
    session = await api.session()
    for ids in ({}, {"session_id": session}, {"session_id": session, "model_seq_id": -1}):
        answer = await api.post("create_model", {"base_model": BASE_MODEL, **ids})
        assert answer.status == 400
        assert "model_seq_id" in answer.detail


@pytest.mark.parametrize("seq_id", [0, -1, 2**31])
async def test_a_seq_id_that_there_cannot_be_is_refused(api: Api, seq_id: int):
    run = await api.run()
    answer = await api.post("optim_step", {"model_id": run.run_id, "seq_id": seq_id})
    assert answer.status == 422
    assert "seq_id" in answer.detail
    await assert_goes_on(api, run)


async def test_a_protobuf_request_without_a_seq_id_is_refused(api: Api):
    run = await api.run()
    message = run.message(datum())
    message.ClearField("seq_id")
    answer = await run.post_message(message)
    assert answer.status == 422
    assert "seq_id" in answer.detail


# --- incomplete and non-finite gradients ----------------------------------------------------------


async def test_a_step_sent_before_the_error_was_delivered_fails_and_says_so(api: Api):
    run = await api.run()
    before = await logprobs(api, run)  # seq 1
    await run.forward_backward()
    bad = await run.forward_backward(datum(weights=None))
    step = await run.step()
    message = await api.failure(step)
    assert "gradient of seq 3 missing" in message
    assert "data[0].loss_fn_inputs.weights: missing" in await api.failure(bad)
    assert await logprobs(api, run) == before
    assert await grad_norm(api, run) == 0  # the good half has been cleared as well


async def test_a_step_sent_after_the_error_was_delivered_is_obeyed(api: Api):
    run, other = await api.run(), await api.run()
    await run.forward_backward()
    await api.failure(await run.forward_backward(datum(weights=None)))
    await other.forward_backward()
    assert await grad_norm(api, run) == await grad_norm(api, other) > 0


async def test_knowing_one_failure_is_not_knowing_the_next(api: Api):
    run = await api.run()
    await api.failure(await run.forward_backward(datum(weights=None)))
    await run.forward_backward(datum(weights=None))
    assert "gradient of seq 2 missing" in await api.failure(await run.step())
    await assert_goes_on(api, run)


async def test_a_refused_request_that_is_no_gradient_does_not_make_one_incomplete(api: Api):
    run = await api.run()
    await run.forward_backward()
    await run.send("save_weights", path="a/b")
    await run.send("optim_step", adam_params={"learning_rate": -1})
    assert await grad_norm(api, run) > 0


async def test_a_gradient_that_is_not_finite_fails_the_step_and_the_run_goes_on(api: Api):
    run, other = await api.run(), await api.run()
    huge = datum(weights=float32([3e38, 3e38, 3e38]))
    output = await api.training_output(await run.forward_backward(huge))
    assert math.isinf(output.metrics["loss:sum"])
    message = await api.failure(await run.step())
    assert "not finite" in message
    assert await logprobs(api, run) == await logprobs(api, other)
    await other.forward_backward()
    await run.forward_backward()
    assert await grad_norm(api, run) == await grad_norm(api, other)


# --- limits of one run ----------------------------------------------------------------------------


async def test_a_seq_far_ahead_is_429_and_can_be_sent_again(api: Api):
    run = await api.run()
    answer = await run.post("optim_step", seq_id=LIMITS.max_seq_ahead + 1)
    assert answer.status == 429
    assert int(answer.headers["Retry-After"]) > 0
    assert "too far ahead" in answer.detail
    assert (await run.post("optim_step", seq_id=LIMITS.max_seq_ahead)).status == 200
    await assert_goes_on(api, run)


async def test_a_full_queue_is_429_only_while_something_can_be_executed(
    second_gateway: Any, api: Api
):
    tight = await second_gateway(limits=replace(LIMITS, max_pending_ops=2))
    run = await api.run()
    other = Run(tight, run.run_id)
    # Seq 3 to 5 wait for 1: a refusal now would keep the SDK from ever sending it.
    for seq in (5, 4, 3):
        assert (await other.post("optim_step", seq_id=seq)).status == 200
    await other.forward_backward(seq_id=1)
    await other.forward_backward(seq_id=2)
    assert (await api.result(f"{run.run_id}:5"))["metrics"]["step"] == 3


async def test_a_model_that_no_worker_has_loaded_yet_is_a_503_that_can_be_sent_again(
    second_gateway: Any, gateway_stack: GatewayStack
):
    config = gateway_stack.config
    second = replace(config.models[0], name="tiny/second")
    config = replace(config, models=(*config.models, second))
    async with TestServer(build_registry(config)) as registry:
        larger: Api = await second_gateway(
            models=config.models, registry_url=str(registry.make_url("")).rstrip("/")
        )
        health = await larger.get("healthz")
        assert health.status == 503
        assert health.json()["missing"] == ["trainer of tiny/second", "sampler of tiny/second"]
        session = await larger.session()
        wanted = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": second.name,
            "lora_config": {"rank": 1},
        }
        refused = await larger.post("create_model", wanted)
        assert refused.status == 503
        assert refused.status == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert "tiny/second" in refused.detail
        # What is served goes on being served.
        await assert_goes_on(larger, await larger.run(session, model_seq_id=1))
