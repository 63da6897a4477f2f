"""Packed attention against the textbook formula, one sequence at a time."""

import pytest
import torch
from torch import Tensor

from luthier_model.attention import PackedAttention

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", [[11], [1, 6, 3]])
def test_tokens_attend_causally_within_their_own_sequence(
    lengths: list[int], window: int | None
) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    inputs = [
        torch.randn(heads, total, HEAD_DIM, requires_grad=True)
        for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    ]
    upstream = torch.randn(total, NUM_HEADS, HEAD_DIM)

    out = PackedAttention(lengths).attend(0, *inputs, scale=0.3, window=window)
    gradients = torch.autograd.grad(out, inputs, upstream)

    expected = torch.cat(
        [
            textbook(*parts, scale=0.3, window=window)
            for parts in zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
        ]
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, upstream))


def textbook(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    num_tokens = query.shape[1]
    key, value = (x.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=0) for x in (key, value))
    scores = query @ key.transpose(1, 2) * scale
    visible = [
        [
            column <= row and (window is None or column > row - window)
            for column in range(num_tokens)
        ]
        for row in range(num_tokens)
    ]
    scores = scores.masked_fill(~torch.tensor(visible), float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(0, 1)
