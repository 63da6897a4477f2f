"""Our optimizer against torch.optim.AdamW with one parameter per tensor."""

import pytest
import torch
from torch import nn

from luthier_model.lora import LoraSpec, init_adapter
from luthier_trainer.adapters import RunState
from luthier_trainer.optim import AdamParams

SHAPES = {"model.layers.0.self_attn.q_proj": (37, 41), "lm_head": (37, 101)}
STEPS = [
    AdamParams(learning_rate=1e-2),
    AdamParams(learning_rate=3e-3, beta1=0.8, beta2=0.99, eps=1e-8),
    AdamParams(learning_rate=1e-3, weight_decay=0.1),
    AdamParams(),
]


@pytest.mark.parametrize(("fused", "limit"), [(True, 0.0), (False, 1e-8)])
def test_steps_from_identical_gradients_are_those_of_torch_adamw_per_tensor(
    fused: bool, limit: float
) -> None:
    """Bit-equal to its one-pass form; its plain form rounds otherwise, by an ulp of a weight."""
    run, parameters = _twins()
    reference = torch.optim.AdamW(parameters, fused=fused)
    for params in STEPS:
        _give_both_the_same_gradient(run, parameters)
        run.optimizer.step(params)
        _step(reference, params)
        worst = _worst_deviation(run, parameters)
        print(f"\nAdamW, {params}: max|Δ| = {worst:.1e}")
        assert worst <= limit


def test_clipped_steps_equal_torch_clip_grad_norm() -> None:
    run, parameters = _twins()
    reference = torch.optim.AdamW(parameters)
    params = AdamParams(learning_rate=1e-2, grad_clip_norm=0.5, eps=1e-3)
    for _ in range(3):
        _give_both_the_same_gradient(run, parameters)
        norm = nn.utils.clip_grad_norm_(parameters, params.grad_clip_norm)
        metrics = run.optimizer.step(params)
        _step(reference, params)
        worst = _worst_deviation(run, parameters)
        print(
            f"\nclipped AdamW: max|Δ| = {worst:.1e}, norm {metrics['grad_norm']:.6f} / {norm:.6f}"
        )
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
        assert worst <= 1e-7


def _twins() -> tuple[RunState, list[nn.Parameter]]:
    torch.manual_seed(0)
    adapter = init_adapter(LoraSpec(rank=3, seed=8), SHAPES, "cpu")
    tensors = [tensor for pair in adapter.pairs.values() for tensor in (pair.a, pair.b)]
    run = RunState(adapter.spec, SHAPES, "cpu")
    run.set_weights(adapter)
    return run, [nn.Parameter(tensor.clone()) for tensor in tensors]


def _leaves(run: RunState) -> list[torch.Tensor]:
    return [tensor for pair in run.adapter.pairs.values() for tensor in (pair.a, pair.b)]


def _give_both_the_same_gradient(run: RunState, parameters: list[nn.Parameter]) -> None:
    for leaf, parameter in zip(_leaves(run), parameters, strict=True):
        parameter.grad = torch.randn_like(parameter)
        assert leaf.grad is not None
        leaf.grad.copy_(parameter.grad)


def _step(reference: torch.optim.Optimizer, params: AdamParams) -> None:
    reference.param_groups[0].update(
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        weight_decay=params.weight_decay,
    )
    reference.step()


def _worst_deviation(run: RunState, parameters: list[nn.Parameter]) -> float:
    pairs = zip(_leaves(run), parameters, strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)
