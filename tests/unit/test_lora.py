"""Promises of the LoRA layer: routing by row, initial weights, target modules."""

import pytest
import torch
from torch import nn

from luthier_core.errors import BadRequest
from luthier_model.lora import (
    LORA_ALPHA,
    LoraAdapter,
    LoraPair,
    LoraSpec,
    MultiLoRALinear,
    Routing,
    Segment,
    init_adapter,
    target_modules,
)

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.o_proj",
    "model.layers.0.mlp.up_proj",
    "lm_head",
]


def random_adapter(rank: int, name: str = "lm_head") -> LoraAdapter:
    pair = LoraPair(a=torch.randn(rank, 6), b=torch.randn(5, rank))
    return LoraAdapter(spec=LoraSpec(rank=rank, seed=0), pairs={name: pair})


def test_each_row_gets_the_delta_of_its_own_adapter() -> None:
    torch.manual_seed(0)
    routing, linear, x_TD = Routing(), nn.Linear(6, 5), torch.randn(9, 6)
    layer = MultiLoRALinear(linear, "lm_head", routing)
    first, second = random_adapter(2), random_adapter(3)
    elsewhere = random_adapter(2, name="another_module")
    segments = [
        Segment(0, 2, first),
        Segment(2, 3, None),
        Segment(3, 7, second),
        Segment(7, 8, elsewhere),
        Segment(8, 9, first),
    ]
    with routing.use(segments):
        out_TE = layer(x_TD)
    for segment in segments:
        for row in range(segment.start, segment.stop):
            expected = linear(x_TD[row])
            if segment.adapter is not None and "lm_head" in segment.adapter.pairs:
                pair = segment.adapter.pairs["lm_head"]
                scale = LORA_ALPHA / segment.adapter.spec.rank
                expected = expected + scale * (pair.b @ (pair.a @ x_TD[row]))
            torch.testing.assert_close(out_TE[row], expected)


def test_a_bfloat16_layer_adds_the_delta_in_float32() -> None:
    torch.manual_seed(0)
    routing, linear = Routing(), nn.Linear(6, 5, bias=False).to(torch.bfloat16)
    layer, adapter = MultiLoRALinear(linear, "lm_head", routing), random_adapter(2)
    x = torch.randn(1, 4, 6).to(torch.bfloat16)
    with routing.use([Segment(0, 4, adapter)]):
        out = layer(x)
    pair = adapter.pairs["lm_head"]
    delta = adapter.scale * (x.float() @ pair.a.T @ pair.b.T)
    assert out.dtype == torch.bfloat16
    assert out.shape == (1, 4, 5)
    torch.testing.assert_close(out, (linear(x).float() + delta).to(torch.bfloat16))


def test_routing_ends_with_its_block_even_after_an_error() -> None:
    routing = Routing()
    with pytest.raises(RuntimeError), routing.use([Segment(0, 1, random_adapter(2))]):
        raise RuntimeError
    assert routing.segments == ()


def test_initial_weights_of_a_module_do_not_depend_on_its_neighbours() -> None:
    spec = LoraSpec(rank=4, seed=5)
    shapes = dict.fromkeys(NAMES, (30, 20))
    alone = init_adapter(spec, {NAMES[1]: (30, 20)}, "cpu").pairs[NAMES[1]]
    torch.manual_seed(123)
    together = init_adapter(spec, dict(reversed(shapes.items())), "cpu").pairs
    assert torch.equal(alone.a, together[NAMES[1]].a)
    assert not torch.equal(alone.a, together[NAMES[0]].a)


def test_initial_a_is_uniform_as_in_peft_and_b_is_zero() -> None:
    pair = init_adapter(LoraSpec(rank=64, seed=5), {"lm_head": (400, 20)}, "cpu").pairs["lm_head"]
    bound = 400**-0.5
    assert pair.a.abs().max() <= bound
    assert pair.a.abs().max() > 0.99 * bound
    assert pair.a.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not pair.b.any()


def test_another_seed_gives_other_initial_weights() -> None:
    one, two = (
        init_adapter(LoraSpec(rank=4, seed=seed), {"lm_head": (30, 20)}, "cpu") for seed in (1, 2)
    )
    assert not torch.equal(one.pairs["lm_head"].a, two.pairs["lm_head"].a)


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ((True, True, True), NAMES),
        ((True, False, False), NAMES[:2]),
        ((False, True, False), NAMES[2:3]),
        ((False, False, True), NAMES[3:]),
    ],
)
def test_the_switches_choose_the_modules(
    switches: tuple[bool, bool, bool], expected: list[str]
) -> None:
    assert target_modules(NAMES, LoraSpec(4, 0, *switches)) == expected


def test_a_spec_that_trains_nothing_is_refused() -> None:
    with pytest.raises(BadRequest, match="train_attn, train_mlp, train_unembed must be true"):
        target_modules(NAMES, LoraSpec(4, 0, False, False, False))


def test_a_kind_of_module_that_the_model_lacks_is_refused_by_name() -> None:
    with pytest.raises(BadRequest, match=r"lora_config\.train_mlp: .* gate_proj"):
        target_modules(["model.layers.0.self_attn.q_proj"], LoraSpec(4, 0, train_unembed=False))
