"""Training through our own client."""

import asyncio
import sys
from typing import Any

import numpy as np
import pytest
import torch
from tests.sdk.conftest import BASE_MODEL

import luthier
from luthier import types, wire

ADAM = types.AdamParams(learning_rate=1e-2)


def datum(tokens: list[int]) -> types.Datum:
    weights = [1.0] * (len(tokens) - 1)
    inputs = {"target_tokens": tokens[1:], "weights": weights}
    return types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs)


DATA = [datum([5, 6, 7, 8, 9]), datum([11, 12, 13])]


def test_steps_that_are_sent_together_lower_the_loss(training: luthier.TrainingClient) -> None:
    sent = [
        (training.forward_backward(DATA, "cross_entropy"), training.optim_step(ADAM))
        for _ in range(6)
    ]
    losses = [gradient.result().metrics["loss:sum"] for gradient, _ in sent]
    assert losses[-1] < losses[0] / 2
    assert all(update.result().metrics for _, update in sent)


def test_outputs_are_in_the_order_of_the_data(training: luthier.TrainingClient) -> None:
    output = training.forward(DATA, "cross_entropy").result()
    assert [item["logprobs"].shape for item in output.loss_fn_outputs] == [[4], [2]]
    total = sum(float(item["logprobs"].to_numpy().sum()) for item in output.loss_fn_outputs)
    assert output.loss == pytest.approx(-total, rel=1e-5)


async def test_async_forms_return_futures_that_can_be_awaited_twice(
    service: luthier.ServiceClient,
) -> None:
    training = await service.create_lora_training_client_async(BASE_MODEL, rank=4, seed=1)
    gradient = await training.forward_backward_async(DATA, "cross_entropy")
    update = await training.optim_step_async(adam_params=ADAM)
    first, again, _ = await asyncio.gather(gradient, gradient, update)
    assert first is again


def test_data_may_be_changed_once_the_call_has_returned(training: luthier.TrainingClient) -> None:
    weights = np.ones(4, np.float32)
    inputs = {"target_tokens": np.array([6, 7, 8, 9]), "weights": weights}
    one = types.Datum(types.ModelInput.from_ints([5, 6, 7, 8]), inputs)
    before = training.forward([one], "cross_entropy").result().loss
    future = training.forward([one], "cross_entropy")
    weights[:] = 0.0
    assert future.result().loss == before != 0.0


def test_a_bad_request_fails_with_category_request_id_and_reason(
    training: luthier.TrainingClient,
) -> None:
    bad = training.forward_backward(DATA, "no_such_loss")  # type: ignore[arg-type]
    with pytest.raises(luthier.RequestFailedError, match="no_such_loss") as caught:
        bad.result()
    assert caught.value.category == "user"
    assert caught.value.request_id.startswith(training.model_id)


def test_a_client_of_a_model_that_does_not_exist_says_so(service: luthier.ServiceClient) -> None:
    client = service.create_lora_training_client("no/such-model")
    with pytest.raises(luthier.RequestFailedError, match="no/such-model"):
        client.result()
    with pytest.raises(luthier.RequestFailedError, match="no/such-model"):
        client.optim_step(ADAM).result()


def test_a_custom_loss_has_the_gradient_of_the_built_in_one(
    service: luthier.ServiceClient,
) -> None:
    def negated_sum(
        data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        loss = -torch.cat(logprobs).sum()
        return loss, {"mine": loss.item()}

    def after_one_step(custom: bool) -> tuple[float, float]:
        training = service.create_lora_training_client(BASE_MODEL, rank=4, seed=1)
        if custom:
            output = training.forward_backward_custom(DATA, negated_sum)
        else:
            output = training.forward_backward(DATA, "cross_entropy")
        training.optim_step(ADAM)
        return output.result().loss, training.forward(DATA, "cross_entropy").result().loss

    assert after_one_step(custom=True) == pytest.approx(after_one_step(custom=False), rel=1e-5)


def test_a_custom_loss_that_raises_stops_the_step_that_was_called_before_it_was_known(
    training: luthier.TrainingClient,
) -> None:
    before = training.forward(DATA, "cross_entropy").result().loss

    def broken(data: object, logprobs: object) -> tuple[torch.Tensor, dict[str, float]]:
        raise ZeroDivisionError("in the loss")

    gradient = training.forward_backward_custom(DATA, broken)
    update = training.optim_step(ADAM)
    with pytest.raises(ZeroDivisionError):
        gradient.result()
    with pytest.raises(luthier.RequestFailedError, match="ZeroDivisionError"):
        update.result()
    assert training.forward(DATA, "cross_entropy").result().loss == before


def test_a_custom_loss_without_torch_is_refused_before_anything_is_sent(
    training: luthier.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="forward_backward_custom needs torch: pip install"):
        training.forward_backward_custom([], lambda data, logprobs: (logprobs[0].sum(), {}))
    assert (training.optim_step().result().metrics or {})["step"] == 1


def test_chunks_of_one_call_sum_to_what_one_request_gives(
    service: luthier.ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = service.create_lora_training_client(BASE_MODEL, rank=4, seed=1)
    expected = whole.forward_backward(DATA * 3, "cross_entropy").result()
    expected_norm = whole.optim_step(ADAM).result().metrics

    split, num_chunks = wire.split, []

    def small_chunks(data: Any, request: Any, **limits: int) -> Any:
        chunks = split(data, request, **{**limits, "max_datums": 2})
        num_chunks.append(len(chunks))
        return chunks

    monkeypatch.setattr(wire, "split", small_chunks)
    chunked = service.create_lora_training_client(BASE_MODEL, rank=4, seed=1)
    output = chunked.forward_backward(DATA * 3, "cross_entropy").result()
    assert output.loss == pytest.approx(expected.loss, rel=1e-5)
    assert len(output.loss_fn_outputs) == 6
    assert num_chunks == [3]
    assert chunked.optim_step(ADAM).result().metrics == pytest.approx(expected_norm, rel=1e-4)


def test_saved_states_are_loaded_with_and_without_the_optimizer(
    service: luthier.ServiceClient, training: luthier.TrainingClient
) -> None:
    training.forward_backward(DATA, "cross_entropy")
    training.optim_step(ADAM)
    path = training.save_state("state").result().path
    assert types.ParsedCheckpointTinkerPath.from_tinker_path(path).checkpoint_type == "training"

    same = service.create_training_client_from_state_with_optimizer(path)
    other = service.create_training_client_from_state(path)
    losses = []
    for client in (training, same, other):
        losses.append(client.forward_backward(DATA, "cross_entropy").result().loss)
        client.optim_step(ADAM)
        losses.append(client.forward(DATA, "cross_entropy").result().loss)
    assert losses[0] == losses[2] == losses[4]
    assert losses[1] == losses[3] != losses[5]

    training.load_state_with_optimizer(path).result()
    assert training.forward(DATA, "cross_entropy").result().loss == losses[0]
    with pytest.raises(luthier.RequestFailedError, match="state"):
        training.save_state("state").result()
    assert training.save_state("state", overwrite=True).result().path == path
