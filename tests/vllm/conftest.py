"""A tiny model with a tokenizer, and adapters: what vLLM and our engine are compared on."""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from luthier_model.base import BaseModel, load_base_model
from luthier_model.lora import LoraSpec, init_adapter, target_modules
from luthier_model.peft_io import adapter_files

EOS = 0


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM; `make test-vllm` names it."""
    python = os.environ.get("LUTHIER_TEST_VLLM_PYTHON", "")
    if not python:
        pytest.skip("LUTHIER_TEST_VLLM_PYTHON is not set: make test-vllm")
    return python


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with tied embeddings and random weights; a token is a byte, but for EOS."""
    torch.set_num_threads(1)
    torch.manual_seed(4)
    config = Qwen3Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's attention on a CPU has no smaller one
        max_position_embeddings=512,
        initializer_range=0.08,
        eos_token_id=EOS,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    vocab = {"<eos>": EOS}
    vocab |= {byte: i + 1 for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(folder: Path) -> BaseModel:
    return load_base_model("tiny", folder)


def adapter_of(model: BaseModel, *, rank: int, lm_head: bool) -> dict[str, bytes]:
    """A random adapter large enough to change every answer."""
    spec = LoraSpec(rank=rank, seed=1, train_unembed=lm_head)
    shapes = {name: model.lora_shapes[name] for name in target_modules(model.lora_shapes, spec)}
    adapter = init_adapter(spec, shapes, "cpu")
    generator = torch.Generator().manual_seed(rank)
    for pair in adapter.pairs.values():
        pair.b.normal_(std=0.05, generator=generator)
    return adapter_files(adapter, "tiny")


@pytest.fixture(scope="session")
def adapters(model: BaseModel) -> dict[str, dict[str, bytes]]:
    """Files by key."""
    return {
        "rank 8": adapter_of(model, rank=8, lm_head=False),
        "rank 64": adapter_of(model, rank=64, lm_head=False),
        "rank 128": adapter_of(model, rank=128, lm_head=False),
        "rank 16 with lm_head": adapter_of(model, rank=16, lm_head=True),
    }
