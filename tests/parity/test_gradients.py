"""Our gradients and losses against a plain transformers + PEFT loop in float32."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.parity.peft_reference import (
    gradients_of,
    peft_twin,
    random_adapter,
    relative_deviation,
)
from torch import Tensor

from luthier_core.proto import wire_pb2
from luthier_model.base import load_base_model
from luthier_model.lora import LoraAdapter
from luthier_model.peft_io import adapter_files
from luthier_trainer.engine import Engine

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
    adapter = random_adapter(model, rank=RANK)
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

    ours = gradients_of(engine, "run")
    loss, theirs = _peft_gradients(model_folder, adapter, ragged_data)
    worst = max(
        (relative_deviation(ours[name], gradient), name) for name, gradient in theirs.items()
    )
    measured = wire_pb2.ForwardBackwardOutput.FromString(answer).metrics["loss:sum"]
    print(f"\ngradients: worst max|Δ|/max|g| = {worst[0]:.2e} at {worst[1]}, {len(theirs)} tensors")
    print(f"loss: ours {measured:.6f}, PEFT {loss:.6f}")
    assert ours.keys() == theirs.keys()
    assert worst[0] <= 1e-4
    assert measured == pytest.approx(loss, rel=1e-5)


def _peft_gradients(
    folder: Path, adapter: LoraAdapter, data: list
) -> tuple[float, dict[str, Tensor | None]]:
    """Loss and gradients of the obvious loop: one datum at a time, summed."""
    tuned, parameters = peft_twin(folder, adapter, torch.float32)
    total = 0.0
    for tokens, targets, weights in data:
        logits = tuned(input_ids=torch.tensor([tokens])).logits[0]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
        loss = (nll * torch.tensor(weights)).sum()
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad for name, weight in parameters.items()}
