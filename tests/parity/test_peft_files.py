"""Adapter files are PEFT's, in both directions."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier_model.attention import PackedAttention
from luthier_model.base import BaseModel, load_base_model
from luthier_model.lora import LORA_ALPHA, LoraAdapter, LoraSpec, Segment, init_adapter
from luthier_model.peft_io import adapter_files, adapter_from_files

# PEFT warns that merging a tied lm_head is difficult; nothing is merged here.
pytestmark = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")

TOKENS = torch.arange(3, 90, 5)


def test_peft_loads_our_adapter_files_and_computes_our_logits(
    model_folder: Path, tmp_path: Path
) -> None:
    model = load_base_model("tiny", model_folder)
    adapter = init_adapter(LoraSpec(rank=6, seed=2), model.lora_shapes, "cpu")
    generator = torch.Generator().manual_seed(1)
    for pair in adapter.pairs.values():
        pair.b.normal_(std=0.05, generator=generator)
    for name, content in adapter_files(adapter, "tiny").items():
        (tmp_path / name).write_bytes(content)

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        untuned = base(TOKENS[None]).logits[0]
        theirs = PeftModel.from_pretrained(base, tmp_path)(TOKENS[None]).logits[0]

    worst = (_logits(model, adapter) - theirs).abs().max().item()
    moved = (theirs - untuned).abs().max().item()
    print(
        f"\nPEFT loads our files: logits max|Δ| = {worst:.1e}; the adapter moves them {moved:.1f}"
    )
    assert worst <= 1e-5
    assert moved > 0.1


def test_we_load_an_adapter_that_peft_saved(model_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    torch.manual_seed(6)
    config = LoraConfig(r=4, lora_alpha=LORA_ALPHA, target_modules=targets, init_lora_weights=False)
    tuned = get_peft_model(base, config).eval()
    tuned.save_pretrained(tmp_path)

    model = load_base_model("tiny", model_folder)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    adapter = adapter_from_files(files, model.lora_shapes, "cpu")

    with torch.no_grad():
        theirs = tuned(TOKENS[None]).logits[0]
        with tuned.disable_adapter():
            untuned = tuned(TOKENS[None]).logits[0]
    worst = (_logits(model, adapter) - theirs).abs().max().item()
    moved = (theirs - untuned).abs().max().item()
    print(
        f"\nwe load PEFT's files: logits max|Δ| = {worst:.1e}; the adapter moves them {moved:.1f}"
    )
    assert worst <= 1e-5 * moved
    assert moved > 0.1
    assert adapter.spec == LoraSpec(rank=4, seed=0, train_mlp=False, train_unembed=False)


def _logits(model: BaseModel, adapter: LoraAdapter) -> Tensor:
    segments = [Segment(0, len(TOKENS), adapter)]
    with torch.no_grad():
        positions = torch.arange(len(TOKENS))
        hidden = model.hidden(TOKENS, positions, PackedAttention([len(TOKENS)]), segments)
        return model.logits(hidden, segments)
