"""The obvious twin of a run: the same model and adapter in transformers + PEFT."""

from pathlib import Path

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from luthier_model.base import BaseModel
from luthier_model.lora import LORA_ALPHA, LoraAdapter, LoraSpec, init_adapter
from luthier_trainer.engine import Engine
from luthier_trainer.optim import AdamParams


def random_adapter(model: BaseModel, *, rank: int) -> LoraAdapter:
    """On every module, in the model's dtype; B is not 0, or every gradient of A would be."""
    adapter = init_adapter(LoraSpec(rank=rank, seed=3), model.lora_shapes, "cpu")
    generator = torch.Generator().manual_seed(1)
    for pair in adapter.pairs.values():
        pair.a = pair.a.to(model.compute_dtype)
        pair.b = (pair.b + torch.empty_like(pair.b).normal_(std=0.05, generator=generator)).to(
            model.compute_dtype
        )
    return adapter


def peft_twin(
    folder: Path, adapter: LoraAdapter, dtype: torch.dtype, *, weights: torch.dtype | None = None
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The tuned model in `dtype`, and its LoRA weights by our tensor names.

    `weights`: what the base model is rounded to first, so that only the computing differs.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=weights or dtype).to(dtype)
    config = LoraConfig(
        r=adapter.spec.rank, lora_alpha=LORA_ALPHA, target_modules=list(adapter.pairs)
    )
    tuned = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    parameters = {}
    for name, pair in adapter.pairs.items():
        layer = model.get_submodule(name)
        for factor, value in (("lora_A", pair.a), ("lora_B", pair.b)):
            weight = getattr(layer, factor)["default"].weight
            weight.data = value.to(dtype)
            parameters[f"{name}.{factor}"] = weight
    return tuned, parameters


def gradients_of(engine: Engine, run_id: str) -> dict[str, Tensor]:
    """The summed gradient by tensor: with beta1 = 0 it is exactly Adam's first moment."""
    engine.optim_step(run_id, AdamParams(beta1=0.0))
    saved = safetensors.torch.load(engine.save(run_id, optimizer=True)["optimizer.safetensors"])
    end = ".exp_avg"
    return {name.removesuffix(end): value for name, value in saved.items() if name.endswith(end)}


def relative_deviation(ours: Tensor, theirs: Tensor | None) -> float:
    """max|Δ| / max|g|"""
    assert theirs is not None
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
