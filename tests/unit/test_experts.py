"""LoRA on a layer of experts: each row gets the deltas of its own adapter and experts."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from luthier_model.experts import MultiLoRAExperts, is_fused_experts
from luthier_model.lora import LoraAdapter, LoraSpec, Routing, Segment, init_adapter

NUM_EXPERTS, HIDDEN, INSIDE = 5, 6, 4


@pytest.fixture
def layer() -> MultiLoRAExperts:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INSIDE,
        num_experts=NUM_EXPERTS,
        experts_implementation="eager",
    )
    experts = Qwen3MoeExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5).requires_grad_(False)
    return MultiLoRAExperts(experts, "mlp.experts", Routing())


def random_adapter(layer: MultiLoRAExperts, rank: int) -> LoraAdapter:
    adapter = init_adapter(LoraSpec(rank=rank, seed=rank), layer.shapes, "cpu")
    for pair in adapter.pairs.values():
        pair.b.normal_(std=0.5)
    return adapter


def some_rows(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.stack([torch.randperm(NUM_EXPERTS)[:2] for _ in range(num_rows)])
    return torch.randn(num_rows, HIDDEN), chosen, torch.rand(num_rows, 2)


def expected_row(
    layer: MultiLoRAExperts, adapter: LoraAdapter | None, x: Tensor, chosen: Tensor, gates: Tensor
) -> Tensor:
    """One row, from weights to which the deltas have been added."""
    out = torch.zeros(HIDDEN)
    for expert, gate in zip(chosen.tolist(), gates, strict=True):
        weights = SimpleNamespace(
            gate_up=layer.experts.gate_up_proj[expert], down=layer.experts.down_proj[expert]
        )
        if adapter is not None:
            gate_up, down = adapter.pairs[layer.gate_up], adapter.pairs[layer.down]
            weights.gate_up = (
                weights.gate_up + adapter.scale * gate_up.b[expert] @ gate_up.a[expert]
            )
            weights.down = weights.down + adapter.scale * down.b[expert] @ down.a[expert]
        half_gate, half_up = (weights.gate_up @ x).chunk(2)
        out += gate * (weights.down @ (nn.functional.silu(half_gate) * half_up))
    return out


def test_each_row_gets_the_deltas_of_its_adapter_on_its_experts(layer: MultiLoRAExperts) -> None:
    first, second = random_adapter(layer, 2), random_adapter(layer, 3)
    segments = [Segment(0, 4, first), Segment(4, 5, None), Segment(5, 9, second)]
    x, chosen, gates = some_rows(9)
    with layer.routing.use(segments):
        out = layer(x, chosen, gates)
    for segment in segments:
        for row in range(segment.start, segment.stop):
            expected = expected_row(layer, segment.adapter, x[row], chosen[row], gates[row])
            torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-4)


def test_rows_without_an_adapter_are_transformers_own(layer: MultiLoRAExperts) -> None:
    x, chosen, gates = some_rows(6)
    torch.testing.assert_close(layer(x, chosen, gates), layer.experts(x, chosen, gates))


def test_an_expert_that_no_token_chose_has_no_gradient(layer: MultiLoRAExperts) -> None:
    adapter = random_adapter(layer, 2)
    leaves = [adapter.pairs[name].b.requires_grad_() for name in (layer.gate_up, layer.down)]
    x, gates = torch.randn(3, HIDDEN), torch.rand(3, 2)
    with layer.routing.use([Segment(0, 3, adapter)]):
        out = layer(x, torch.tensor([[0, 2], [2, 4], [4, 0]]), gates)
    for gradient in torch.autograd.grad(out.square().sum(), leaves):
        assert [bool(g.any()) for g in gradient] == [True, False, True, False, True]


def test_only_a_layout_that_is_understood_counts_as_experts(layer: MultiLoRAExperts) -> None:
    assert is_fused_experts(layer.experts)
    layer.experts.has_bias = True
    assert not is_fused_experts(layer.experts)
    assert not is_fused_experts(nn.Linear(2, 2))
