"""Each loss against its formula written out datum by datum, and where numbers get extreme."""

import math
from collections.abc import Mapping
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier_core.errors import InvalidField, Unsupported
from luthier_core.losses import LOSSES, loss_config, loss_spec
from luthier_core.proto import wire_pb2
from luthier_trainer.losses import loss_named
from luthier_trainer.packing import Example, pack


def config_request(loss_fn: str, **numbers: float | str) -> wire_pb2.ForwardBackwardRequest:
    request = wire_pb2.ForwardBackwardRequest(loss_fn=loss_fn)
    for key, value in numbers.items():
        if isinstance(value, str):
            request.loss_fn_config_v2[key].text = value
        else:
            request.loss_fn_config[key] = value
    return request


def summed_loss(
    loss_fn: str, model_logprobs: list[list[float]], **inputs: list[list[float]]
) -> tuple[float, Tensor]:
    """Loss and its gradient by logprob, of datums with one target per position."""
    settings = loss_config(config_request(loss_fn))
    examples = []
    for index, row in enumerate(model_logprobs):
        given = {name: np.array(values[index], np.float64) for name, values in inputs.items()}
        defaults = {name: np.full(len(row), value) for name, value in settings.items()}
        mask = {"sequence_ratio_mask": np.ones(len(row))} if loss_fn == "gspo" else {}
        zeros = np.zeros(len(row), np.int64)
        examples.append(
            Example(tokens=zeros, targets=zeros, loss_inputs={**defaults, **mask, **given})
        )
    batch = pack(examples, torch.device("cpu"), torch.float64)
    flat = torch.tensor([*chain(*model_logprobs)], dtype=torch.float64, requires_grad=True)
    loss = loss_named(loss_fn)(flat[:, None], batch.loss_inputs_TK, batch.datum_T).sum()
    loss.backward()
    assert flat.grad is not None
    return loss.item(), flat.grad


LOGPROBS = [[-0.5, -2.0, -1.0], [-0.1]]
SAMPLED = [[-1.0, -1.0, -1.1], [-3.0]]
ADVANTAGES = [[1.0, -2.0, 0.5], [-1.5]]


@pytest.mark.parametrize(
    ("loss_fn", "of_token"),
    [
        ("importance_sampling", lambda r, lp, q, a: -r * a),
        ("ppo", lambda r, lp, q, a: -min(r * a, min(max(r, 0.8), 1.2) * a)),
        ("cispo", lambda r, lp, q, a: -min(max(r, 0.0), 4.0) * lp * a),
        ("dro", lambda r, lp, q, a: -(lp * a - 0.5 * 0.05 * (lp - q) ** 2)),
    ],
)
def test_a_policy_loss_is_the_sum_of_its_formula_over_all_tokens(loss_fn: str, of_token) -> None:
    expected = sum(
        of_token(math.exp(lp - q), lp, q, a)
        for row in zip(LOGPROBS, SAMPLED, ADVANTAGES, strict=True)
        for lp, q, a in zip(*row, strict=True)
    )
    loss, _ = summed_loss(loss_fn, LOGPROBS, logprobs=SAMPLED, advantages=ADVANTAGES)
    assert loss == pytest.approx(expected, rel=1e-12)


def test_gspo_has_one_length_normalised_ratio_per_datum() -> None:
    expected = 0.0
    for lps, qs, advantages in zip(LOGPROBS, SAMPLED, ADVANTAGES, strict=True):
        ratio = math.exp(sum(lp - q for lp, q in zip(lps, qs, strict=True)) / len(lps))
        clipped = min(max(ratio, 0.8), 1.2)
        expected -= sum(min(ratio * a, clipped * a) for a in advantages)
    loss, gradient = summed_loss("gspo", LOGPROBS, logprobs=SAMPLED, advantages=ADVANTAGES)
    assert loss == pytest.approx(expected, rel=1e-12)
    # One ratio, so one gradient for all tokens of a datum.
    assert gradient[0] == gradient[1] == gradient[2] != 0


def test_gspo_takes_its_ratio_over_the_masked_tokens_only() -> None:
    masked, _ = summed_loss(
        "gspo",
        [[-9.0, -0.5, -0.6]],
        logprobs=[[0.0, -0.4, -0.5]],
        advantages=[[0.0, 1.0, 1.0]],
        sequence_ratio_mask=[[0.0, 1.0, 1.0]],
    )
    assert masked == pytest.approx(-2 * math.exp(-0.1), rel=1e-12)


def test_cispo_lets_no_gradient_through_its_ratio() -> None:
    _, gradient = summed_loss("cispo", [[-0.5]], logprobs=[[-1.0]], advantages=[[2.0]])
    assert gradient.item() == pytest.approx(-2 * math.exp(0.5), rel=1e-12)


def test_ppo_has_no_gradient_where_it_clips_and_the_full_one_elsewhere() -> None:
    _, gradient = summed_loss(
        "ppo",
        [[-0.5, -0.5, -1.0, -0.5]],
        logprobs=[[-1.0, -1.0, -0.5, -0.5]],
        advantages=[[1.0, -1.0, -1.0, 1.0]],
    )
    # Too likely and good, too likely and bad, too unlikely and bad, unchanged.
    assert gradient.tolist() == pytest.approx([0, math.exp(0.5), 0, -1])


def test_thresholds_can_differ_by_token() -> None:
    loss, _ = summed_loss(
        "ppo",
        [[0.0, 0.0]],
        logprobs=[[-1.0, -1.0]],
        advantages=[[1.0, 1.0]],
        clip_high_threshold=[[1.5, 2.0]],
    )
    assert loss == pytest.approx(-3.5)


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_a_token_without_advantage_adds_nothing_whatever_its_ratio(loss_fn: str) -> None:
    loss, gradient = summed_loss(
        loss_fn, [[-1.0, -0.5]], logprobs=[[-1e6, -1e6]], advantages=[[0.0, 0.0]]
    )
    assert loss == 0
    assert gradient.tolist() == [0, 0]


@pytest.mark.parametrize("loss_fn", ["ppo", "gspo"])
def test_a_clipped_ratio_that_overflows_leaves_the_gradient_finite(loss_fn: str) -> None:
    loss, gradient = summed_loss(loss_fn, [[-1.0]], logprobs=[[-1e6]], advantages=[[1.0]])
    assert loss == pytest.approx(-1.2)
    assert gradient.tolist() == [0]


def test_settings_are_the_requests_over_the_defaults() -> None:
    assert loss_config(config_request("ppo", clip_high_threshold=1.3)) == {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 1.3,
    }
    assert loss_config(config_request("cispo")) == {
        "clip_low_threshold": 0.0,
        "clip_high_threshold": 4.0,
    }
    assert loss_config(config_request("dro")) == {"beta": 0.05}


def test_a_number_in_the_newer_map_of_settings_counts() -> None:
    request = config_request("dro")
    request.loss_fn_config_v2["beta"].number = 0.5
    assert loss_config(request) == {"beta": 0.5}


@pytest.mark.parametrize(
    ("loss_fn", "settings", "message"),
    [
        ("ppo", {"clip_high": 1.3}, r"loss_fn_config\.clip_high: .*clip_high_threshold"),
        ("cross_entropy", {"beta": 0.1}, r"loss_fn_config\.beta: .*cross_entropy has no such"),
        ("dro", {"beta": -1.0}, r"loss_fn_config\.beta: -1\.0; must be finite and at least 0"),
        ("dro", {"beta": math.inf}, r"loss_fn_config\.beta: inf; must be finite"),
        ("dro", {"beta": "0.1"}, r"loss_fn_config\.beta: must be a number"),
        ("ppo", {"clip_low_threshold": 1.3}, r"clip_low_threshold: 1\.3 is above .*1\.2"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(
    loss_fn: str, settings: Mapping[str, float | str], message: str
) -> None:
    with pytest.raises(InvalidField, match=message):
        loss_config(config_request(loss_fn, **settings))


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [("stable_reinforce", "not published"), ("custom", "forward_backward_custom")],
)
def test_a_loss_that_is_not_served_is_refused_with_its_reason(loss_fn: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=f"loss_fn: '{loss_fn}': .*{reason}.*importance_sampling"):
        loss_spec(loss_fn)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_every_loss_of_the_table_can_be_computed(loss_fn: str) -> None:
    assert callable(loss_named(loss_fn))
