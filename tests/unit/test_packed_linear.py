"""Packed linear layers beside plain ones."""

from pathlib import Path

import pytest
import torch
from tests.tiny_qwen3 import TWO_LAYERS, save_tiny_qwen3
from torch import nn

from luthier_model.attention import PackedAttention
from luthier_model.base import load_base_model
from luthier_model.lora import MultiLoRALinear
from luthier_model.packed_linear import PackedLinear, pack_linears

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 4, 33])
def test_a_packed_layer_computes_what_the_plain_one_does(num_rows, bias):
    torch.manual_seed(0)
    linear = nn.Linear(70, 30, bias=bias)
    with torch.inference_mode():
        x = torch.randn(1, num_rows, 70)
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_gives_the_logits_it_gave_before(tmp_path: Path, tied: bool):
    torch.set_num_threads(1)
    save_tiny_qwen3(tmp_path, seed=0, vocab_size=50, tie_word_embeddings=tied, **TWO_LAYERS)
    model, tokens = load_base_model("tiny", tmp_path), torch.arange(9)

    @torch.inference_mode()
    def logits() -> torch.Tensor:
        return model.logits(model.hidden(tokens, tokens, PackedAttention([9]), ()), ())

    before = logits()
    pack_linears(model)
    torch.testing.assert_close(logits(), before, rtol=1e-5, atol=1e-6)
    layers = [part for part in model.module.modules() if isinstance(part, MultiLoRALinear)]
    assert all(isinstance(layer.linear, PackedLinear) for layer in layers)
    # The plain weights are let go, but for the one that the embedding shares.
    assert [layer.weight.numel() > 0 for layer in layers] == [False] * 14 + [tied]
