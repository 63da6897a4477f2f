"""Our gradients and losses against a plain transformers + PEFT loop in float32."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier_core.proto import wire_pb2
from luthier_model.base import load_base_model
from luthier_model.lora import LORA_ALPHA, LoraAdapter, LoraSpec, init_adapter
from luthier_model.peft_io import adapter_files
from luthier_trainer.engine import Engine
from luthier_trainer.optim import AdamParams

# PEFT warns that merging a tied lm_head is difficult; nothing is merged here.
pytestmark = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")

RANK = 5


@pytest.mark.parametrize(
    ("micro_batch_tokens", "logprob_chunk_tokens"), [(4096, 1024), (16, 1024), (4096, 5)]
)
def test_gradients_equal_those_of_transformers_with_peft(
    model_folder: Path,
    ragged_data: list,
    encode_request: Callable[[list], bytes],
    micro_batch_tokens: int,
    logprob_chunk_tokens: int,
) -> None:
    model = load_base_model("tiny", model_folder)
    adapter = _random_adapter(model.lora_shapes)
    engine = Engine(
        model,
        logprob_chunk_tokens=logprob_chunk_tokens,
        num_threads=1,
        micro_batch_tokens=micro_batch_tokens,
    )
    engine.create("run", adapter.spec)
    engine.load("run", adapter_files(adapter, "tiny"), optimizer=False)

    answer = engine.forward_backward(
        "run", encode_request(ragged_data), backward=True, clock_cycle=1
    )

    ours = _gradients(engine, "run")
    loss, theirs = _peft_gradients(model_folder, adapter, ragged_data)
    worst = max(
        (_relative_deviation(ours[name], gradient), name) for name, gradient in theirs.items()
    )
    measured = wire_pb2.ForwardBackwardOutput.FromString(answer).metrics["loss:sum"]
    print(f"\ngradients: worst max|Δ|/max|g| = {worst[0]:.2e} at {worst[1]}, {len(theirs)} tensors")
    print(f"loss: ours {measured:.6f}, PEFT {loss:.6f}")
    assert ours.keys() == theirs.keys()
    assert worst[0] <= 1e-4
    assert measured == pytest.approx(loss, rel=1e-5)


def _random_adapter(shapes: dict[str, tuple[int, int]]) -> LoraAdapter:
    adapter = init_adapter(LoraSpec(rank=RANK, seed=3), shapes, "cpu")
    generator = torch.Generator().manual_seed(1)
    for pair in adapter.pairs.values():
        # B = 0 would leave every gradient of A at 0.
        pair.b.normal_(std=0.05, generator=generator)
    return adapter


def _gradients(engine: Engine, run_id: str) -> dict[str, Tensor]:
    """The summed gradient by tensor: with beta1 = 0 it is exactly Adam's first moment."""
    engine.optim_step(run_id, AdamParams(beta1=0.0))
    saved = safetensors.torch.load(engine.save(run_id, optimizer=True)["optimizer.safetensors"])
    end = ".exp_avg"
    return {name.removesuffix(end): value for name, value in saved.items() if name.endswith(end)}


def _peft_gradients(
    folder: Path, adapter: LoraAdapter, data: list
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the obvious loop: one datum at a time, summed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules=list(adapter.pairs))
    tuned = get_peft_model(model, config).eval()
    parameters = {}
    for name, pair in adapter.pairs.items():
        layer = model.get_submodule(name)
        for factor, value in (("lora_A", pair.a), ("lora_B", pair.b)):
            weight = getattr(layer, factor)["default"].weight
            weight.data.copy_(value)
            parameters[f"{name}.{factor}"] = weight
    total = 0.0
    for tokens, targets, weights in data:
        logits = tuned(input_ids=torch.tensor([tokens])).logits[0]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
        loss = (nll * torch.tensor(weights)).sum()
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad for name, weight in parameters.items()}


def _relative_deviation(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
