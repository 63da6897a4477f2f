"""JSON bodies and JSON results of SDKs up to 0.24.1: the same requests, the same results."""

import io
import json
import math
from typing import Any

import numpy as np
import pytest
from backports import zstd
from tests.contract.gateway_client import (
    PROTOBUF,
    Api,
    Run,
    datum,
    float32,
    int64,
    logprobs_of,
    tokens_of,
)
from tests.contract.gateway_stack import MAX_BODY_BYTES, VOCAB_SIZE

JSON = "application/json"
EITHER = f"{PROTOBUF}, {JSON}"
TOKENS = [1, 2, 3]
GREEDY = {"max_tokens": 4, "temperature": 0, "stop": []}


def tensor(data: list[Any], dtype: str, **fields: Any) -> dict[str, Any]:
    return {"data": data, "dtype": dtype, "shape": [len(data)], **fields}


def json_datum(**inputs: Any) -> dict[str, Any]:
    """The datum that `datum()` is, as SDKs up to 0.16.1 write it: without types."""
    wanted = {
        "target_tokens": tensor([2, 3, 0], "int64"),
        "weights": tensor([1.0, 1.0, 1.0], "float32"),
        **inputs,
    }
    return {
        "model_input": {"chunks": [{"tokens": TOKENS}]},
        "loss_fn_inputs": {name: value for name, value in wanted.items() if value is not None},
    }


def json_body(run: Run, *data: Any, forward: bool = False, **fields: Any) -> dict[str, Any]:
    """A request of SDK 0.6.3 under the run's next seq: its ids come last."""
    given = {"data": list(data) or [json_datum()], "loss_fn": "cross_entropy", **fields}
    return {
        "forward_input" if forward else "forward_backward_input": given,
        "model_id": run.run_id,
        "seq_id": run.take_seq(),
    }


async def post(api: Api, body: dict[str, Any]) -> str:
    """The request_id of a forward or forward_backward."""
    endpoint = "forward" if "forward_input" in body else "forward_backward"
    return await api.accepted(endpoint, body)


async def json_output(api: Api, request_id: str) -> dict[str, Any]:
    answer = await api.poll(request_id, accept=JSON)
    while answer.status == 408:
        answer = await api.poll(request_id, accept=JSON)
    assert answer.status == 200, answer
    return answer.json()


async def assert_goes_on(api: Api, run: Run) -> None:
    """What comes after a refused body is executed, and nothing waits for it."""
    output = await api.training_output(await post(api, json_body(run)))
    assert output.metrics["loss:sum"] > 0


# --- requests -------------------------------------------------------------------------------------


async def test_json_is_trained_on_like_protobuf(api: Api):
    old, new = await api.run(), await api.run()
    ids = await post(api, json_body(old)), await new.forward_backward()
    outputs = [await api.training_output(request_id) for request_id in ids]
    assert logprobs_of(outputs[0]) == logprobs_of(outputs[1])
    norms = [(await api.result(await run.step()))["metrics"]["grad_norm"] for run in (old, new)]
    assert norms[0] == norms[1] > 0


async def test_both_styles_of_json_are_the_same_request(api: Api):
    run = await api.run()
    terse = json_body(run, loss_fn_config=None)
    typed = {**json_body(run), "type": "forward_backward", "seq_id": 1}
    for one in typed["forward_backward_input"]["data"]:
        one["model_input"]["chunks"][0]["type"] = "encoded_text"
        for name in ("target_tokens", "weights"):
            one["loss_fn_inputs"][name] |= {"sparse_crow_indices": None, "unknown": 1}
    assert await post(api, terse) == await post(api, typed)


async def test_forward_leaves_the_gradient_alone(api: Api):
    run = await api.run()
    output = await api.training_output(await post(api, json_body(run, forward=True)))
    assert len(logprobs_of(output)[0]) == 3
    assert (await api.result(await run.step()))["metrics"]["grad_norm"] == 0


async def test_sparse_targets_are_those_of_protobuf(api: Api):
    targets = [[2, 0], [0, 3], [0, 0]]
    csr = {"shape": [3, 2], "sparse_crow_indices": [0, 1, 2, 2], "sparse_col_indices": [0, 1]}
    inputs = {
        "target_tokens": {"data": [2, 3], "dtype": "int64", **csr},
        "weights": {"data": [1.0, 0.5], "dtype": "float32", **csr},
    }
    dense = {"target_tokens": int64(targets), "weights": float32([[1, 0], [0, 0.5], [0, 0]])}
    for value in dense.values():
        value.shape.extend([3, 2])
    old, new = await api.run(), await api.run()
    ids = (
        await post(api, json_body(old, json_datum(**inputs))),
        await new.forward_backward(datum(TOKENS, **dense)),
    )
    losses = [(await api.training_output(each)).metrics["loss:sum"] for each in ids]
    assert losses[0] == losses[1] > 0


async def test_a_compressed_json_body_is_the_same_request(api: Api):
    run = await api.run()
    body = json.dumps(json_body(run)).encode()
    packed = await api.call(
        "POST", "forward_backward", zstd.compress(body), headers={"Content-Encoding": "zstd"}
    )
    assert packed.json() == (await api.call("POST", "forward_backward", body)).json()


BAD_DATA: dict[str, tuple[Any, str, str]] = {
    "no datum": ([], "data: empty", "at least one"),
    "data that is no list": ("x", "data", "list"),
    "a datum that is no object": ([1], "data.0", "dictionary"),
    "no inputs": ([{"model_input": {"chunks": []}}], "data.0.loss_fn_inputs", "required"),
    "no weights": ([json_datum(weights=None)], "weights: missing", "needed"),
    "text in a tensor": (
        [json_datum(weights=tensor(["1", 1, 1], "float32"))],
        "data[0].loss_fn_inputs.weights.data",
        "numbers, got str",
    ),
    "a nested tensor": (
        [json_datum(weights=tensor([[1], 1, 1], "float32"))],
        "data[0].loss_fn_inputs.weights.data",
        "flat list",
    ),
    "half a token": (
        [json_datum(target_tokens=tensor([2, 3, 0.5], "int64"))],
        "data[0].loss_fn_inputs.target_tokens.data",
        "whole number",
    ),
    "an enormous token": (
        [json_datum(target_tokens=tensor([2, 3, 2**64 - 1], "int64"))],
        "data[0].loss_fn_inputs.target_tokens.data",
        "does not fit int64",
    ),
    "an enormous weight": (
        [json_datum(weights=tensor([1e300, 1, 1], "float32"))],
        "data[0].loss_fn_inputs.weights",
        "finite",
    ),
    "a dtype that is none": (
        [json_datum(weights=tensor([1, 1, 1], "complex64"))],
        "weights.dtype",
        "'float32', 'int64'",
    ),
    "a shape that lies": (
        [json_datum(weights=tensor([1, 1, 1], "float32", shape=[4]))],
        "weights: 3 values do not fill shape [4]",
        "",
    ),
    "half of a sparse tensor": (
        [json_datum(weights=tensor([1, 1, 1], "float32", sparse_col_indices=[0, 1, 2]))],
        "data.0.loss_fn_inputs.weights",
        "belong together",
    ),
    "an input token beyond the vocabulary": (
        [{**json_datum(), "model_input": {"chunks": [{"tokens": [1, 2, VOCAB_SIZE]}]}}],
        f"token id {VOCAB_SIZE} at position 2",
        f"0 to {VOCAB_SIZE - 1}",
    ),
    "an input token beyond int32": (
        [{**json_datum(), "model_input": {"chunks": [{"tokens": [1, 2, 2**40]}]}}],
        "data[0].model_input",
        "does not fit int32",
    ),
    "an image of SDK 0.5.1": (
        [{**json_datum(), "model_input": {"chunks": [{"data": "", "tokens": 3, "height": 1}]}}],
        "chunk of type 'image'",
        "encoded_text",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
async def test_bad_json_data_fails_its_future_and_the_run_goes_on(api: Api, name: str):
    data, field, allowed = BAD_DATA[name]
    run = await api.run()
    body = json_body(run)
    body["forward_backward_input"]["data"] = data
    message = await api.failure(await post(api, body))
    assert field in message
    assert allowed in message[message.index(field) :]
    await assert_goes_on(api, run)


# --- bodies that cannot be read -------------------------------------------------------------------


@pytest.mark.parametrize("ids_first", [True, False])
async def test_an_over_size_json_body_is_a_413_and_its_seq_is_used_up(api: Api, ids_first: bool):
    run = await api.run()
    body = json_body(run, json_datum(padding=tensor([0.125] * (MAX_BODY_BYTES // 4), "float32")))
    if ids_first:
        body = dict(reversed(body.items()))
    raw = json.dumps(body).encode()
    assert MAX_BODY_BYTES < len(raw) < 2 * MAX_BODY_BYTES
    for _ in range(2):  # the second is a retry
        answer = await api.call("POST", "forward_backward", raw)
        assert answer.status == 413
    assert str(MAX_BODY_BYTES) in await api.failure(f"{run.run_id}:1")
    await assert_goes_on(api, run)


@pytest.mark.parametrize("endpoint", ["optim_step", "save_weights", "load_weights"])
async def test_an_over_size_body_of_another_kind_uses_up_its_seq_too(api: Api, endpoint: str):
    run = await api.run()
    body = {"x": ["y" * 5_000_000], "model_id": run.run_id, "seq_id": run.take_seq()}
    answer = await api.call("POST", endpoint, io.BytesIO(json.dumps(body).encode()))
    assert answer.status == 413
    await api.failure(f"{run.run_id}:1")
    await assert_goes_on(api, run)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("1.0", "NaN", 1),
        lambda text: text.replace("[", "{", 1),
        lambda text: text.replace("[1.0", "[" + "[" * 40 + "1.0" + "]" * 40, 1),
    ],
    ids=["NaN", "brackets", "depth"],
)
async def test_damaged_json_whose_ids_can_be_read_fails_its_future(api: Api, damage: Any):
    run = await api.run()
    raw = damage(json.dumps(json_body(run))).encode()
    answer = await api.call("POST", "forward_backward", raw)
    assert answer.status == 200
    assert "JSON" in await api.failure(answer.json()["request_id"])
    await assert_goes_on(api, run)


@pytest.mark.parametrize("raw", [b"", b"{", b'{"model_id": "x"}', b"\xff" * 100, b"[" * 10_000])
async def test_json_without_readable_ids_is_a_422(api: Api, raw: bytes):
    for endpoint in ("forward_backward", "forward"):
        assert (await api.call("POST", endpoint, raw)).status == 422


async def test_many_wrong_values_make_a_short_message(api: Api):
    run = await api.run()
    wrong = {**json_datum(), "model_input": {"chunks": [{"tokens": ["x"] * 20_000}]}}
    message = await api.failure(await post(api, json_body(run, wrong)))
    assert "tokens.0" in message
    assert len(message) < 1000
    inputs = {f"input{index}": 1 for index in range(10_000)}
    message = await api.failure(await post(api, json_body(run, json_datum(**inputs))))
    assert "more than 4096 names" in message


# --- results --------------------------------------------------------------------------------------


async def test_a_training_result_is_json_for_who_reads_no_protobuf(api: Api):
    run = await api.run()
    request_id = await run.forward_backward(datum(TOKENS), datum([4, 5]))
    output = await api.training_output(request_id)
    value = await json_output(api, request_id)
    assert value["metrics"] == dict(output.metrics)
    assert value["loss_fn_output_type"] == output.loss_fn_output_type
    for told, logprobs in zip(value["loss_fn_outputs"], logprobs_of(output), strict=True):
        assert told == {"logprobs": tensor(logprobs, "float32")}


async def test_a_sample_is_json_for_who_reads_no_protobuf(api: Api):
    sampler = await api.sampler()
    request_id = await sampler.send(
        sampling_params=GREEDY, prompt_logprobs=True, topk_prompt_logprobs=2
    )
    response = await api.samples(request_id)
    value = await json_output(api, request_id)
    (sequence,) = value["sequences"]
    assert sequence["stop_reason"] == "length"
    assert sequence["tokens"] == tokens_of(response.sequences[0])
    assert sequence["logprobs"] == np.frombuffer(response.sequences[0].logprobs, "<f4").tolist()
    assert value["prompt_logprobs"][0] is None
    assert [type(number) for number in value["prompt_logprobs"][1:]] == [float, float]
    assert value["topk_prompt_logprobs"][0] is None
    assert [len(row) for row in value["topk_prompt_logprobs"][1:]] == [2, 2]


@pytest.mark.parametrize(("accept", "is_protobuf"), [(EITHER, True), ("*/*", False), ("", False)])
async def test_accept_decides_the_encoding(api: Api, accept: str, is_protobuf: bool):
    run = await api.run()
    request_id = await run.forward_backward()
    await api.training_output(request_id)
    answer = await api.poll(request_id, accept=accept)
    assert answer.headers["Content-Type"].startswith(PROTOBUF if is_protobuf else JSON)


async def test_a_failure_is_json_whatever_is_accepted(api: Api):
    run = await api.run()
    request_id = await run.forward_backward(datum(weights=None))
    await api.failure(request_id)
    for accept in (PROTOBUF, EITHER, JSON):
        assert (await api.poll(request_id, accept=accept)).json().keys() == {"error", "category"}


async def test_a_loss_that_is_no_number_is_told_as_python_reads_it(api: Api):
    run = await api.run()
    request_id = await run.forward_backward(datum(weights=float32([3e38] * 3)))
    value = await json_output(api, request_id)
    assert math.isinf(value["metrics"]["loss:sum"])
    status = (await api.get(f"futures/{request_id}")).json()
    assert status["result"]["metrics"]["loss:sum"] is None  # strict JSON, for any language
