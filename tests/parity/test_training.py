"""Twenty steps of a run against transformers + PEFT + torch.optim.AdamW."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.parity.peft_reference import peft_twin, random_adapter, relative_deviation
from torch import nn

from luthier_model.base import load_base_model
from luthier_model.peft_io import adapter_files, adapter_from_files
from luthier_trainer.engine import Engine
from luthier_trainer.optim import AdamParams

# PEFT warns that merging a tied lm_head is difficult; nothing is merged here.
pytestmark = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")

STEPS = [
    AdamParams(
        learning_rate=1e-3 * (1 + index % 3),
        weight_decay=0.1 * (index % 2),
        grad_clip_norm=5.0 if index % 4 == 3 else 0.0,
        beta2=0.95 if index < 10 else 0.99,
    )
    for index in range(20)
]


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-9), ("float32", 1e-3)])
def test_twenty_steps_end_at_the_weights_of_peft_and_torch_adamw(
    model_folder: Path,
    ragged_data: list,
    encode_request: Callable[[list], bytes],
    dtype: str,
    limit: float,
) -> None:
    model = load_base_model("tiny", model_folder, dtype=dtype)
    initial = random_adapter(model, rank=4)
    engine = Engine(model, logprob_chunk_tokens=16, num_threads=1, micro_batch_tokens=32)
    engine.create("run", initial.spec)
    engine.load("run", adapter_files(initial, "tiny"), optimizer=False)
    tuned, parameters = peft_twin(model_folder, initial, torch.float64, weights=model.dtype)
    optimizer = torch.optim.AdamW(parameters.values())

    for params in STEPS:
        engine.forward_backward("run", encode_request(ragged_data), backward=True, clock_cycle=1)
        metrics = engine.optim_step("run", params)
        norm = _reference_step(tuned, optimizer, params, ragged_data)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=limit)

    ours = adapter_from_files(engine.save("run", optimizer=False), model.lora_shapes, "cpu")
    worst = 0.0
    for name, pair in ours.pairs.items():
        for factor, mine in (("lora_A", pair.a), ("lora_B", pair.b)):
            worst = max(worst, relative_deviation(mine, parameters[f"{name}.{factor}"].data))
    print(f"\n{dtype}: after 20 steps, worst max|Δw| / max|w| = {worst:.1e}")
    assert worst <= limit


def _reference_step(
    tuned: nn.Module, optimizer: torch.optim.Optimizer, params: AdamParams, data: list
) -> float:
    """The gradient's norm before clipping."""
    for tokens, targets, weights in data:
        logits = tuned(input_ids=torch.tensor([tokens])).logits[0]
        nll = nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
        # The weights as they travel.
        (nll * torch.tensor(weights, dtype=torch.float32)).sum().backward()
    parameters = optimizer.param_groups[0]["params"]
    limit = params.grad_clip_norm if params.grad_clip_norm > 0 else torch.inf
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    optimizer.param_groups[0].update(
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        weight_decay=params.weight_decay,
    )
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()
