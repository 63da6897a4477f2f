"""Chunked logprobs against the log-softmax of all logits at once."""

from pathlib import Path

import pytest
import torch

from luthier_model.base import load_base_model
from luthier_model.logprobs import token_logprobs
from luthier_model.lora import LoraSpec, Segment, init_adapter


@pytest.mark.parametrize("chunk_tokens", [1, 4, 10, 64])
@pytest.mark.parametrize("num_targets", [None, 3])
def test_logprobs_and_gradients_do_not_depend_on_the_chunks(
    model_folder: Path, chunk_tokens: int, num_targets: int | None
) -> None:
    torch.manual_seed(0)
    model = load_base_model("tiny", model_folder)
    lm_head = {"lm_head": model.lora_shapes["lm_head"]}
    adapters = [init_adapter(LoraSpec(rank=rank, seed=rank), lm_head, "cpu") for rank in (2, 3)]
    for adapter in adapters:
        adapter.pairs["lm_head"].b.normal_(std=0.1).requires_grad_()
    segments = [Segment(0, 3, adapters[0]), Segment(3, 5, None), Segment(5, 10, adapters[1])]
    hidden_TD = torch.randn(10, model.facts.hidden_size, requires_grad=True)
    shape = (10,) if num_targets is None else (10, num_targets)
    targets = torch.randint(0, model.facts.vocab_size, shape)
    leaves = [hidden_TD, *(adapter.pairs["lm_head"].b for adapter in adapters)]

    logprobs = token_logprobs(model, hidden_TD, targets, segments, chunk_tokens=chunk_tokens)
    gradients = torch.autograd.grad(logprobs.square().sum(), leaves)

    rows = targets if num_targets else targets[:, None]
    expected = model.logits(hidden_TD, segments).log_softmax(-1).gather(1, rows).view(shape)
    torch.testing.assert_close(logprobs, expected)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    # The largest are around 100.
    torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-4)
