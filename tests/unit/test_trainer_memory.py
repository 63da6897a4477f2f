"""What a forward_backward holds in memory at once, counted tensor by tensor."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_qwen3 import save_tiny_qwen3
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from luthier_core.proto import wire_pb2
from luthier_model.base import BaseModel, load_base_model
from luthier_model.lora import LoraSpec
from luthier_trainer.engine import Engine

VOCAB_SIZE, NUM_TOKENS = 997, 256


class LiveBytes(TorchDispatchMode):
    """Most bytes alive at once of the new tensors that `counts` picks."""

    def __init__(self, counts: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self.counts = counts
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_flatten(out)[0]:
            if isinstance(value, torch.Tensor) and self.counts(value):
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address in self._seen:
            return
        self._seen.add(address)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, address, storage.nbytes())

    def _remove(self, address: int, num_bytes: int) -> None:
        self._seen.discard(address)
        self.now -= num_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = save_tiny_qwen3(
        tmp_path_factory.mktemp("model"),
        seed=0,
        vocab_size=VOCAB_SIZE,
        intermediate_size=32,
        num_hidden_layers=6,
        max_position_embeddings=NUM_TOKENS,
    )
    return load_base_model("tiny", folder)


def make_engine(model: BaseModel, *, chunk_tokens: int = 64, **options: Any) -> Engine:
    engine = Engine(model, logprob_chunk_tokens=chunk_tokens, num_threads=1, **options)
    engine.create("run", LoraSpec(rank=2, seed=0))
    return engine


def one_long_datum() -> bytes:
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, NUM_TOKENS + 1)
    text = wire_pb2.EncodedTextChunk(tokens=tokens[:-1].astype("<i4").tobytes())
    targets, weights = tokens[1:].astype("<i8"), np.ones(NUM_TOKENS, "<f4")
    datum = wire_pb2.Datum(
        model_input=[wire_pb2.Chunk(encoded_text=text)],
        loss_fn_inputs={
            "target_tokens": wire_pb2.Tensor(dense=targets.tobytes(), dtype=wire_pb2.DTYPE_INT64),
            "weights": wire_pb2.Tensor(dense=weights.tobytes(), dtype=wire_pb2.DTYPE_FLOAT32),
        },
    )
    return wire_pb2.ForwardBackwardRequest(
        model_id="run", seq_id=1, loss_fn="cross_entropy", data=[datum]
    ).SerializeToString()


def most_bytes(engine: Engine, counts: Callable[[torch.Tensor], bool], *, backward: bool) -> int:
    with LiveBytes(counts) as live:
        engine.forward_backward("run", one_long_datum(), backward=backward, clock_cycle=0)
    return live.most


def is_logits(tensor: torch.Tensor) -> bool:
    """[rows, vocabulary]: a gradient of lm_head's B is [vocabulary, rank]."""
    return tensor.dim() >= 2 and tensor.shape[-1] == VOCAB_SIZE and tensor.shape[-2] > 16


def is_activation(tensor: torch.Tensor) -> bool:
    return NUM_TOKENS in tensor.shape and VOCAB_SIZE not in tensor.shape


@pytest.mark.parametrize("backward", [True, False])
def test_logits_of_more_than_one_chunk_never_exist(model: BaseModel, backward: bool) -> None:
    whole, num_chunks = 4 * NUM_TOKENS * VOCAB_SIZE, 8
    engine = make_engine(model, chunk_tokens=NUM_TOKENS // num_chunks)
    most = most_bytes(engine, is_logits, backward=backward)
    print(f"\nlogits: {most / whole:.2f} of [tokens, vocab] in {num_chunks} chunks")
    # A chunk's logits, their log-softmax and the gradients of both.
    assert 0 < most <= 5 * whole / num_chunks


def test_recomputed_layers_hold_a_fraction_of_the_activations(model: BaseModel) -> None:
    held = [
        most_bytes(make_engine(model, recompute=recompute), is_activation, backward=True)
        for recompute in (False, True)
    ]
    print(f"\nactivations: {held[0] / 2**10:.0f} KiB kept, {held[1] / 2**10:.0f} KiB recomputed")
    assert held[1] < held[0] / 2


def test_recomputing_changes_no_bit(model: BaseModel) -> None:
    digests = set()
    for recompute in (False, True):
        engine = make_engine(model, recompute=recompute)
        answer = engine.forward_backward("run", one_long_datum(), backward=True, clock_cycle=0)
        digests.add((answer, engine.run_digest("run")))
    assert len(digests) == 1
