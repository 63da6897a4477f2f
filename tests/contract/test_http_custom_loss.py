"""create_custom_loss: the official SDK uploads a loss, and what cannot be run is refused."""

import asyncio
import copy
import gc

import numpy as np
import pytest
import tinker
from tests.contract.gateway_client import BASE_MODEL, Api
from tests.contract.gateway_stack import KEYS, GatewayStack
from tests.contract.tenant_cases import CUSTOM_LOSS
from tinker import types
from torch import Tensor


def squared(logprobs: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = (logprobs * scale).square().sum()
    return loss, {"custom/likeliest:mean": logprobs.max()}


def train(url: str) -> list[dict[str, float]]:
    """What an uploaded loss answers, and the same function in the client."""
    ranks: dict[str, types.CustomLossInputRank] = {"logprobs": 1, "scale": 1}
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(list(range(length))),
            loss_fn_inputs={
                "target_tokens": list(range(1, length + 1)),
                "scale": np.linspace(0.5, 1.5, length).astype(np.float32),
            },
        )
        for length in (4, 6)
    ]
    with tinker.ServiceClient(base_url=url, api_key=KEYS["ann"]) as service:
        handle = service.create_custom_loss(squared, ranks).result(timeout=60)
        assert handle.loss_id

        def in_the_client(
            data: list[types.Datum], logprobs: list[Tensor]
        ) -> tuple[Tensor, dict[str, float]]:
            scales = [datum.loss_fn_inputs["scale"].to_torch() for datum in data]
            pairs = [squared(*pair) for pair in zip(logprobs, scales, strict=True)]
            likeliest = [its["custom/likeliest:mean"].item() for _, its in pairs]
            loss = pairs[0][0] + pairs[1][0]
            return loss, {"custom/likeliest:mean": sum(likeliest) / len(likeliest)}

        metrics = []
        for loss in (handle, in_the_client):
            training = service.create_lora_training_client(BASE_MODEL, rank=2, seed=1).result()
            future = training.forward_backward_custom(data, loss)
            step = training.optim_step(types.AdamParams(learning_rate=1e-2))
            stepped = step.result(timeout=60).metrics or {}
            metrics.append({**future.result(timeout=60).metrics, **stepped})
    return metrics


@pytest.mark.filterwarnings(
    "ignore:unclosed transport:ResourceWarning", "ignore:unclosed <socket:ResourceWarning"
)
async def test_an_uploaded_loss_trains_as_the_same_function_in_the_client(
    gateway_stack: GatewayStack,
):
    server, client = await asyncio.to_thread(train, gateway_stack.url)
    gc.collect()  # what the SDK leaks is found here, and not in some later test
    for name in ("loss:sum", "custom/likeliest:mean", "grad_norm", "update_norm"):
        assert server[name] == pytest.approx(client[name], rel=1e-5)


async def test_a_graph_that_is_not_allowed_is_refused_with_the_place(api: Api):
    graph = copy.deepcopy(CUSTOM_LOSS["graph"])
    graph["nodes"][1] |= {"op": "call_function", "target": "torch.load"}
    body = {**CUSTOM_LOSS, "session_id": await api.session(), "graph": graph}
    answer = await api.post("create_custom_loss", {**body, "custom_loss_seq_id": 0, "name": "x"})
    assert answer.status == 400
    assert "torch.load" in answer.detail


async def test_a_retried_upload_has_the_same_future(api: Api):
    body = {"session_id": await api.session(), "custom_loss_seq_id": 0, "name": "x", **CUSTOM_LOSS}
    first, second = [await api.post("create_custom_loss", body) for _ in range(2)]
    assert first.json() == second.json()
    answer = await api.post("retrieve_future", {"request_id": first.json()["request_id"]})
    assert answer.json()["type"] == "create_custom_loss"


async def test_a_future_that_holds_no_loss_is_not_there(api: Api):
    answer = await api.post("retrieve_future", {"request_id": "loss:graph1.AAAA"})
    assert answer.status in (400, 404)
