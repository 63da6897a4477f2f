"""What an optimizer step reports and refuses; its numbers are compared in tests/parity."""

import pytest
import torch
from torch import nn

from luthier_core.errors import BadRequest
from luthier_trainer.optim import AdamParams, FlatAdamW


@pytest.fixture
def parameter() -> nn.Parameter:
    parameter = nn.Parameter(torch.tensor([3.0, -4.0, 0.0]))
    parameter.grad = torch.tensor([6.0, 8.0, 0.0])
    return parameter


def test_a_step_reports_the_norms_of_gradient_update_and_weights(parameter: nn.Parameter) -> None:
    before = parameter.detach().clone()
    params = AdamParams(learning_rate=0.5, weight_decay=0.1, grad_clip_norm=1.0)
    metrics = FlatAdamW(parameter).step(params)
    update = parameter.detach() - before
    assert metrics["grad_norm"] == 10  # before clipping
    assert metrics["update_norm"] == pytest.approx(update.norm().item(), rel=1e-6)
    assert metrics["update_norm"] > 0.5
    assert metrics["param_norm"] == pytest.approx(parameter.detach().norm().item(), rel=1e-6)
    assert metrics["learning_rate"] == 0.5
    assert metrics["step"] == 1


def test_the_norm_of_large_gradients_does_not_overflow(parameter: nn.Parameter) -> None:
    parameter.grad = torch.tensor([1e25, 0.0, 0.0])
    metrics = FlatAdamW(parameter).step(AdamParams(grad_clip_norm=1.0))
    assert metrics["grad_norm"] == pytest.approx(1e25)
    assert parameter.isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 1e-46])
def test_an_eps_that_would_divide_nothing_by_nothing_is_refused(
    parameter: nn.Parameter, eps: float
) -> None:
    before = parameter.detach().clone()
    with pytest.raises(BadRequest, match=r"adam_params\.eps: .*must be at least 1\.2e-38"):
        FlatAdamW(parameter).step(AdamParams(eps=eps))
    assert torch.equal(parameter, before)


def test_weights_without_a_gradient_stay_where_they_are(parameter: nn.Parameter) -> None:
    FlatAdamW(parameter).step(AdamParams(learning_rate=0.5))
    assert parameter[2] == 0
