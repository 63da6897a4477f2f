"""The layer's own gradient and its two ways to add deltas, against torch's autograd of the loop."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from luthier_model.adapted_linear import adapted_linear, widened
from luthier_model.lora import (
    LoraAdapter,
    LoraPair,
    LoraSpec,
    Segment,
    add_deltas_loop,
    deltas_of,
)

NAME, NUM_IN, NUM_OUT = "lm_head", 24, 40
RANKS = (4, 1, 16)
ROWS = (3, 40, 1)
"""Of each adapter; rows of the base model alone lie between the second and the third."""

# max|Δ| / max|g|: bfloat16 rounds x, the output and the gradient of x; the factors stay float32.
LIMITS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random_segments(dtype: torch.dtype) -> list[Segment]:
    torch.manual_seed(3)
    wide = torch.promote_types(dtype, torch.float32)
    segments, stop = [], 0
    for rank, num_rows in zip((*RANKS[:2], 0, RANKS[2]), (*ROWS[:2], 5, ROWS[2]), strict=True):
        adapter = None
        if rank:
            a, b = torch.randn(rank, NUM_IN, dtype=wide), torch.randn(NUM_OUT, rank, dtype=wide)
            pair = LoraPair(a=a.requires_grad_(), b=b.requires_grad_())
            adapter = LoraAdapter(spec=LoraSpec(rank=rank, seed=0), pairs={NAME: pair})
        segments.append(Segment(stop, stop + num_rows, adapter))
        stop += num_rows
    return segments


def factors_of(segments: Sequence[Segment]) -> list[Tensor]:
    return [factor for delta in deltas_of(segments, NAME) for factor in (delta.a, delta.b)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_output_and_gradients_are_those_of_the_loop(
    dtype: torch.dtype, grouped: bool, with_bias: bool
) -> None:
    segments = random_segments(dtype)
    x = torch.randn(segments[-1].stop, NUM_IN).to(dtype).requires_grad_()
    weight = torch.randn(NUM_OUT, NUM_IN).to(dtype)
    bias = torch.randn(NUM_OUT).to(dtype) if with_bias else None
    upstream = torch.randn(len(x), NUM_OUT).to(dtype)

    base = widened(F.linear(x, weight, bias))
    expected = add_deltas_loop(base, widened(x), segments, NAME).to(dtype)
    got = adapted_linear(x, weight, bias, deltas_of(segments, NAME), grouped=grouped)

    leaves = [x, *factors_of(segments)]
    expected_grads = torch.autograd.grad(expected, leaves, upstream)
    got_grads = torch.autograd.grad(got, leaves, upstream)
    for ours, theirs in zip((got, *got_grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= LIMITS[dtype] * theirs.abs().max()
