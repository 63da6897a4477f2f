"""Losses through the official SDK: its custom losses, sparse targets, chunks and refusals."""

import pytest
import tinker
import torch
from tests.acceptance.stack import ANSWER_S
from tests.acceptance.training import create_run, make_data
from tinker import types
from transformers import PreTrainedTokenizerFast

STEP = types.AdamParams(learning_rate=1e-4)
RL_LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "gspo")


@pytest.fixture
def data(tokenizer: PreTrainedTokenizerFast) -> list[types.Datum]:
    return make_data(tokenizer)


@pytest.fixture
def policy_data(service: tinker.ServiceClient, data: list[types.Datum]) -> list[types.Datum]:
    """With advantages on the completions, and logprobs from which the model has moved a little."""
    outputs = create_run(service).forward(data, "cross_entropy").result(timeout=ANSWER_S)
    generator = torch.Generator().manual_seed(0)
    made = []
    for datum, output in zip(data, outputs.loss_fn_outputs, strict=True):
        mask = datum.loss_fn_inputs["weights"].to_torch()
        logprobs = output["logprobs"].to_torch()
        moved = logprobs + 0.05 * torch.randn(logprobs.shape, generator=generator)
        inputs = {
            "target_tokens": datum.loss_fn_inputs["target_tokens"],
            "logprobs": moved * mask,
            "advantages": torch.randn(logprobs.shape, generator=generator) * mask,
        }
        made.append(types.Datum(model_input=datum.model_input, loss_fn_inputs=inputs))
    return made


@pytest.mark.parametrize("loss_fn", RL_LOSSES)
def test_a_policy_loss_trains_and_forward_gives_the_same_metrics(
    service: tinker.ServiceClient, policy_data: list[types.Datum], loss_fn: str
) -> None:
    run = create_run(service)
    before = run.forward(policy_data, loss_fn).result(timeout=ANSWER_S)
    first = run.forward_backward(policy_data, loss_fn)
    step = run.optim_step(STEP).result(timeout=ANSWER_S)
    after = run.forward(policy_data, loss_fn).result(timeout=ANSWER_S)
    trained = first.result(timeout=ANSWER_S)
    assert _untimed(trained.metrics) == _untimed(before.metrics)
    assert _objective(policy_data, after) > _objective(policy_data, trained)
    assert {"ratio:mean", "kl_k3:mean"} <= trained.metrics.keys()
    assert {"grad_norm", "param_norm", "update_norm", "step"} <= (step.metrics or {}).keys()


def test_a_custom_loss_computed_by_the_client_equals_the_built_in_one(
    service: tinker.ServiceClient, policy_data: list[types.Datum]
) -> None:
    def importance_sampling(
        data: list[types.Datum], logprobs_list: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        losses = []
        for datum, logprobs in zip(data, logprobs_list, strict=True):
            advantages = datum.loss_fn_inputs["advantages"].to_torch()
            ratio = (logprobs - datum.loss_fn_inputs["logprobs"].to_torch()).exp()
            losses.append(-(ratio * advantages).sum())
        return torch.stack(losses).sum(), {"custom:sum": 1.0}

    built_in, custom = create_run(service), create_run(service)
    expected = built_in.forward_backward(policy_data, "importance_sampling")
    got = custom.forward_backward_custom(policy_data, importance_sampling)
    steps = [run.optim_step(STEP).result(timeout=ANSWER_S).metrics for run in (built_in, custom)]

    loss = expected.result(timeout=ANSWER_S).metrics["loss:sum"]
    metrics = got.result(timeout=ANSWER_S).metrics
    assert metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)
    assert metrics["custom:sum"] == 1.0
    assert steps[0] is not None
    assert steps[1] is not None
    assert steps[1]["grad_norm"] == pytest.approx(steps[0]["grad_norm"], rel=1e-5)
    after = [
        run.forward(policy_data, "importance_sampling").result(timeout=ANSWER_S)
        for run in (built_in, custom)
    ]
    for one, two in zip(after[0].loss_fn_outputs, after[1].loss_fn_outputs, strict=True):
        torch.testing.assert_close(
            one["logprobs"].to_torch(), two["logprobs"].to_torch(), rtol=1e-4, atol=1e-4
        )


def test_sparse_targets_of_several_tokens_are_distillation(
    service: tinker.ServiceClient, data: list[types.Datum]
) -> None:
    run = create_run(service)
    one = data[0]
    targets = one.loss_fn_inputs["target_tokens"].to_torch()
    weights = one.loss_fn_inputs["weights"].to_torch()
    two_targets = torch.stack([targets, torch.zeros_like(targets)], dim=1)
    split = torch.stack([0.75 * weights, 0.25 * weights], dim=1)
    inputs = {"target_tokens": two_targets, "weights": split}
    datum = types.Datum(model_input=one.model_input, loss_fn_inputs=inputs)

    result = run.forward([datum], "cross_entropy").result(timeout=ANSWER_S)

    logprobs = result.loss_fn_outputs[0]["logprobs"].to_torch()
    assert logprobs.shape == (len(targets), 2)
    alone = run.forward([one], "cross_entropy").result(timeout=ANSWER_S)
    torch.testing.assert_close(logprobs[:, 0], alone.loss_fn_outputs[0]["logprobs"].to_torch())
    assert result.metrics["loss:sum"] == pytest.approx(-(split * logprobs).sum().item(), rel=1e-5)


def test_a_refused_loss_says_why_and_the_run_goes_on(
    service: tinker.ServiceClient, policy_data: list[types.Datum], data: list[types.Datum]
) -> None:
    run = create_run(service)
    with pytest.raises(tinker.RequestFailedError, match="not published"):
        run.forward_backward(policy_data, "stable_reinforce").result(timeout=ANSWER_S)
    with pytest.raises(tinker.RequestFailedError, match=r"loss_fn_config\.clip_range"):
        run.forward_backward(policy_data, "ppo", {"clip_range": 0.2}).result(timeout=ANSWER_S)
    with pytest.raises(tinker.RequestFailedError, match=r"data\[0\].*logprobs: missing"):
        run.forward_backward(data, "ppo").result(timeout=ANSWER_S)
    run.forward_backward(policy_data, "ppo", {"clip_high_threshold": 1.3}).result(timeout=ANSWER_S)


def _objective(data: list[types.Datum], output: types.ForwardBackwardOutput) -> float:
    """What every policy loss raises near a ratio of 1: advantage times logprob."""
    pairs = zip(data, output.loss_fn_outputs, strict=True)
    return sum(
        float((d.loss_fn_inputs["advantages"].to_torch() * o["logprobs"].to_torch()).sum())
        for d, o in pairs
    )


def _untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "cycle" not in name}
