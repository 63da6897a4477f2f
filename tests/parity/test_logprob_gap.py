"""Logprobs that a sampler gives the tokens it draws, against the trainer's forward of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from luthier_core.config import SamplerConfig
from luthier_core.proto import wire_pb2
from luthier_model.attention import PackedAttention
from luthier_model.base import BaseModel, load_base_model
from luthier_model.logprob_gap import logprob_gap
from luthier_model.logprobs import token_logprobs
from luthier_model.lora import LoraAdapter, LoraSpec, Segment, init_adapter
from luthier_model.packed_linear import pack_linears
from luthier_model.peft_io import adapter_files
from luthier_sampler.engine import Engine
from luthier_sampler.sequence import SampleRequest

NUM_REQUESTS, NUM_NEW_TOKENS = 12, 24


@pytest.mark.parametrize(
    ("dtype", "largest", "mean"), [("float32", 1e-5, 1e-6), ("bfloat16", 0.5, 0.03)]
)
def test_sampled_logprobs_are_the_trainers_within_the_rounding_of_the_dtype(
    model_folder: Path, dtype: str, largest: float, mean: float
) -> None:
    torch.set_num_threads(1)
    trainer_model = load_base_model("tiny", model_folder, dtype=dtype)
    sampler_model = load_base_model("tiny", model_folder, dtype=dtype)
    pack_linears(sampler_model)
    adapter = random_adapter(trainer_model)

    gap_T = sampled_gap(sampler_model, trainer_model, adapter)
    measured = logprob_gap(trainer_model, adapter)

    print(f"{dtype}: largest {gap_T.max():.1e}, mean {gap_T.mean():.1e}; at a save {measured}")
    assert gap_T.max() < largest
    assert gap_T.mean() < mean
    # What a save says of it, from fewer tokens, hides nothing of what a sampler has.
    assert gap_T.mean() / 10 < measured.mean < mean


def random_adapter(model: BaseModel) -> LoraAdapter:
    adapter = init_adapter(LoraSpec(rank=8, seed=1), model.lora_shapes, "cpu")
    generator = torch.Generator().manual_seed(5)
    for pair in adapter.pairs.values():
        pair.b.normal_(std=0.02, generator=generator)
    return adapter


def sampled_gap(
    sampler_model: BaseModel, trainer_model: BaseModel, adapter: LoraAdapter
) -> np.ndarray:
    """Absolute differences of all sampled tokens, of requests that run together."""
    config = SamplerConfig(kv_block_tokens=8, num_kv_blocks=100, max_step_tokens=20, max_running=8)
    engine = Engine(sampler_model, None, config)  # type: ignore[arg-type]  # no stop strings
    engine.add_adapter("lora", adapter_files(adapter, "tiny"))
    random = np.random.default_rng(6)
    prompts = {}
    for i in range(NUM_REQUESTS):
        prompts[f"{i}"] = random.integers(0, sampler_model.facts.vocab_size, 3 * i + 1).tolist()
        engine.add(
            SampleRequest(
                request_id=f"{i}",
                prompt=prompts[f"{i}"],
                seed=i,
                max_tokens=NUM_NEW_TOKENS,
                ignore_eos=True,
                adapter="lora",
            )
        )
    gaps = []
    while engine.has_work:
        for finished in engine.step():
            assert finished.response is not None, finished.error
            [sequence] = wire_pb2.SampleResponse.FromString(finished.response).sequences
            tokens = prompts[finished.request_id] + np.frombuffer(sequence.tokens, "<i4").tolist()
            sampled = np.frombuffer(sequence.logprobs, "<f4")
            trained = forward_logprobs(trainer_model, tokens, adapter)[-len(sampled) :]
            gaps.append(np.abs(trained - sampled))
    return np.concatenate(gaps)


def forward_logprobs(model: BaseModel, tokens: list[int], adapter: LoraAdapter) -> np.ndarray:
    """Of the tokens after the first, as a trainer computes them."""
    tokens_T = torch.tensor(tokens)
    positions_T = torch.arange(len(tokens) - 1)
    segments = [Segment(0, len(positions_T), adapter)]
    attention = PackedAttention([len(positions_T)])
    with torch.no_grad():
        hidden_TD = model.hidden(tokens_T[:-1], positions_T, attention, segments)
        return token_logprobs(
            model, hidden_TD, tokens_T[1:], segments, chunk_tokens=len(tokens)
        ).numpy()
