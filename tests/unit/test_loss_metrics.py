"""What the metrics of a policy loss say, and that they survive being merged over chunks."""

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest
from tinker.lib.chunked_fwdbwd_helpers import _metrics_reduction

from luthier_core.losses import LOSSES
from luthier_trainer.loss_metrics import loss_metrics
from luthier_trainer.packing import Example

THRESHOLDS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


def example(sampled: list[float], advantages: list[float], **settings: float) -> Example:
    shape = (len(sampled),)
    inputs = {"logprobs": np.array(sampled, np.float32)}
    inputs["advantages"] = np.array(advantages, np.float32)
    inputs |= {name: np.full(shape, value) for name, value in settings.items()}
    zeros = np.zeros(shape, np.int64)
    return Example(tokens=zeros, targets=zeros, loss_inputs=inputs)


def metrics_of(loss_fn: str, *pairs: tuple[Example, list[float]]) -> dict[str, float]:
    examples, logprobs = zip(*pairs, strict=True)
    return loss_metrics(loss_fn, examples, [np.array(lp, np.float32) for lp in logprobs])


def test_ratios_clipping_and_kl_are_those_of_the_action_tokens() -> None:
    # The first position is a prompt's: its logprob must not count as a ratio.
    one = example([0.0, -1.0, -1.0, -1.0], [0.0, 1.0, -1.0, 0.5], **THRESHOLDS)
    metrics = metrics_of("ppo", (one, [-7.0, -1.0, -0.5, -2.0]))
    ratios = np.exp([0.0, 0.5, -1.0])
    assert metrics["num_action_tokens:sum"] == 3
    assert metrics["ratio:mean"] == pytest.approx(ratios.mean())
    assert metrics["ratio:min"] == pytest.approx(ratios.min())
    assert metrics["ratio:max"] == pytest.approx(ratios.max())
    assert metrics["clip_low_fraction:mean"] == pytest.approx(1 / 3)
    assert metrics["clip_high_fraction:mean"] == pytest.approx(1 / 3)
    assert metrics["clip_fraction:mean"] == pytest.approx(2 / 3)
    assert metrics["kl_k1:mean"] == pytest.approx(0.5 / 3)
    assert metrics["kl_k3:mean"] == pytest.approx((ratios - 1 - np.log(ratios)).mean())


def test_the_ratio_of_gspo_is_that_of_the_sequence() -> None:
    one = example([-1.0, -1.0], [1.0, 1.0], sequence_ratio_mask=1.0, **THRESHOLDS)
    metrics = metrics_of("gspo", (one, [0.0, -1.0]))
    assert metrics["ratio:min"] == metrics["ratio:max"] == pytest.approx(np.exp(0.5))
    assert metrics["clip_high_fraction:mean"] == 1


def test_a_datum_without_actions_counts_as_unchanged() -> None:
    padding = example([0.0, 0.0], [0.0, 0.0], **THRESHOLDS)
    metrics = metrics_of("cispo", (padding, [-5.0, -6.0]))
    assert [metrics[f"ratio:{kind}"] for kind in ("mean", "min", "max")] == [1, 1, 1]
    assert metrics["clip_fraction:mean"] == metrics["kl_k1:mean"] == 0


def test_cross_entropy_tells_the_sum_of_its_weights() -> None:
    zeros = np.zeros(2, np.int64)
    one = Example(zeros, zeros, {"weights": np.array([0.5, -2.0], np.float32)})
    assert metrics_of("cross_entropy", (one, [-1.0, -1.0])) == {"weights:sum": -1.5}


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
@pytest.mark.parametrize("chunks", [[2, 3], [1, 1, 3], [4, 1]])
def test_merged_over_chunks_by_the_sdk_they_are_those_of_the_whole(
    loss_fn: str, chunks: list[int]
) -> None:
    random = np.random.default_rng(0)
    settings = dict(LOSSES[loss_fn].config)
    if loss_fn == "gspo":
        settings["sequence_ratio_mask"] = 1.0
    pairs = []
    for length in (3, 1, 7, 4, 2):
        sampled, advantages = -random.random((2, length))
        one = example(sampled.tolist(), advantages.tolist(), **settings)
        pairs.append((one, (sampled + random.normal(size=length) / 3).tolist()))
    parts, start = [], 0
    for num in chunks:
        metrics = metrics_of(loss_fn, *pairs[start : start + num])
        parts.append(SimpleNamespace(metrics=metrics, loss_fn_outputs=[None] * num))
        start += num
    merged: Mapping[str, float] = _metrics_reduction(parts)
    assert merged == pytest.approx(metrics_of(loss_fn, *pairs))
