"""A random Qwen3 for the suites that want a model of their own shape, in milliseconds."""

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

TWO_LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def save_tiny_qwen3(folder: Path, *, seed: int, **config: Any) -> Path:
    """The folder with the model: one layer, where `config` says nothing else."""
    torch.manual_seed(seed)
    one_layer = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "initializer_range": 0.1,
    }
    Qwen3ForCausalLM(Qwen3Config(**one_layer | config)).save_pretrained(folder)
    return folder
