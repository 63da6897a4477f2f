"""Tiny random models in Hugging Face folders, and requests for them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from luthier_core.proto import wire_pb2

VOCAB_SIZE = 211
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Five times the usual spread: attention and logits that are far from uniform.
    "initializer_range": 0.1,
}

Datum = tuple[list[int], list[int], list[float]]
"""tokens, target_tokens, weights"""


@pytest.fixture(
    scope="session", params=["qwen3-tied", "llama-untied", "qwen2-biased", "mistral-windowed"]
)
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(20)
    if request.param == "qwen3-tied":
        model = Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=True))
    elif request.param == "qwen2-biased":
        shape = {**_SHAPE, "initializer_range": 0.06}
        model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=False))
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    elif request.param == "mistral-windowed":
        model = MistralForCausalLM(MistralConfig(**_SHAPE, head_dim=16, sliding_window=20))
    else:
        model = LlamaForCausalLM(LlamaConfig(**_SHAPE, tie_word_embeddings=False))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def ragged_data() -> list[Datum]:
    """Five datums of different length with weights of both signs and zeros."""
    random = np.random.default_rng(4)
    data = []
    for length in (1, 7, 24, 3, 13):
        tokens = random.integers(0, VOCAB_SIZE, length + 1)
        weights = random.normal(size=length) * (random.random(length) > 0.3)
        data.append((tokens[:-1].tolist(), tokens[1:].tolist(), weights.tolist()))
    return data


@pytest.fixture
def encode_request() -> Callable[[list[Datum]], bytes]:
    """Encodes datums as a cross_entropy request."""

    def encode(data: list[Datum]) -> bytes:
        return wire_pb2.ForwardBackwardRequest(
            model_id="run", seq_id=1, loss_fn="cross_entropy", data=[_datum(*d) for d in data]
        ).SerializeToString()

    return encode


def _datum(tokens: list[int], targets: list[int], weights: list[float]) -> wire_pb2.Datum:
    text = wire_pb2.EncodedTextChunk(tokens=np.array(tokens, "<i4").tobytes())
    return wire_pb2.Datum(
        model_input=[wire_pb2.Chunk(encoded_text=text)],
        loss_fn_inputs={
            "target_tokens": wire_pb2.Tensor(
                dense=np.array(targets, "<i8").tobytes(), dtype=wire_pb2.DTYPE_INT64
            ),
            "weights": wire_pb2.Tensor(
                dense=np.array(weights, "<f4").tobytes(), dtype=wire_pb2.DTYPE_FLOAT32
            ),
        },
    )
