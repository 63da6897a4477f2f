"""What every part of the benchmark trains: a random model, batches, and the plain loop."""

import os
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from luthier_core.proto import wire_pb2
from luthier_model.base import BaseModel
from luthier_model.lora import LORA_ALPHA, LoraSpec, init_adapter

VOCAB_SIZE = 16384
HIDDEN_SIZE, INTERMEDIATE_SIZE, KV_SIZE = 768, 2048, 256
LEARNING_RATE = 1e-4

Batch = list[np.ndarray]
"""Sequences of int64 tokens; each token but the last has the next one as its target."""


def make_model(folder: str, num_layers: int) -> None:
    """A Qwen3 with random weights: 63 M parameters with 8 layers."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=num_layers,
        num_attention_heads=HIDDEN_SIZE // 64,
        num_key_value_heads=KV_SIZE // 64,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    transformers.utils.logging.disable_progress_bar()
    Qwen3ForCausalLM(config).save_pretrained(folder)


def random_batch(lengths: Sequence[int], seed: int) -> Batch:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB_SIZE, length + 1) for length in lengths]


def ragged_lengths(num: int, longest: int) -> list[int]:
    """From a quarter of `longest` up to it, evenly."""
    return [int(length) for length in np.linspace(longest / 4, longest, num)]


def num_tokens(batch: Batch) -> int:
    return sum(len(tokens) - 1 for tokens in batch)


def request_of(batch: Batch) -> bytes:
    """A ForwardBackwardRequest with cross_entropy."""
    data = []
    for tokens in batch:
        weights = np.ones(len(tokens) - 1, "<f4").tobytes()
        inputs = {
            "target_tokens": wire_pb2.Tensor(
                dense=tokens[1:].astype("<i8").tobytes(), dtype=wire_pb2.DTYPE_INT64
            ),
            "weights": wire_pb2.Tensor(dense=weights, dtype=wire_pb2.DTYPE_FLOAT32),
        }
        text = wire_pb2.EncodedTextChunk(tokens=tokens[:-1].astype("<i4").tobytes())
        data.append(
            wire_pb2.Datum(model_input=[wire_pb2.Chunk(encoded_text=text)], loss_fn_inputs=inputs)
        )
    message = wire_pb2.ForwardBackwardRequest(seq_id=1, loss_fn="cross_entropy", data=data)
    encoded: bytes = message.SerializeToString()
    return encoded


class PlainLoop:
    """What one writes without us: transformers, PEFT, a padded batch, torch's AdamW."""

    def __init__(self, folder: str, base: BaseModel, spec: LoraSpec) -> None:
        """With the initial weights that `spec` has in `base`."""
        initial = init_adapter(spec, base.lora_shapes, "cpu")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(r=spec.rank, lora_alpha=LORA_ALPHA, target_modules=list(initial.pairs))
        self.model = get_peft_model(model, config)
        with torch.no_grad():
            for name, pair in initial.pairs.items():
                layer = model.get_submodule(name)
                layer.lora_A["default"].weight.copy_(pair.a)
                layer.lora_B["default"].weight.copy_(pair.b)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            trained, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0
        )

    def step(self, batch: Batch) -> float:
        """The summed loss of the batch, before the update."""
        longest = max(len(tokens) for tokens in batch) - 1
        tokens_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
        targets_BT = torch.full_like(tokens_BT, -100)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, tokens in enumerate(batch):
            length = len(tokens) - 1
            tokens_BT[row, :length] = torch.from_numpy(tokens[:-1])
            targets_BT[row, :length] = torch.from_numpy(tokens[1:])
            mask_BT[row, :length] = 1
        # Without padding no mask: transformers then takes torch's causal kernel.
        padded = bool((mask_BT == 0).any())
        logits: Tensor = self.model(
            input_ids=tokens_BT, attention_mask=mask_BT if padded else None, use_cache=False
        ).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="sum")
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


def product_rate(num_rows: int) -> float:
    """GFLOP/s of matrix products of that many rows with a weight of the model, the best library."""
    from luthier_model.products import product

    x, weight = torch.randn(num_rows, HIDDEN_SIZE), torch.randn(INTERMEDIATE_SIZE, HIDDEN_SIZE)
    flop = 2 * x.numel() * INTERMEDIATE_SIZE
    best_s = min(
        best_time(lambda: F.linear(x, weight), 10), best_time(lambda: product(x, weight), 10)
    )
    return flop / best_s / 1e9


def flop_per_token(base: BaseModel, rank: int) -> float:
    """Of a forward and a backward: frozen weights have no gradient, so two products; LoRA three.

    Attention and all that is not a product are left out: it is for a ceiling.
    """
    frozen = sum(parameter.numel() for parameter in base.module.parameters())
    lora = sum(rank * sum(shape) for shape in base.lora_shapes.values())
    return 4.0 * frozen + 6.0 * lora


def best_time(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)
