"""Every loss, its logprobs and its adapter gradients against a loop written from the formula.

The reference is transformers + PEFT in float64, one datum at a time, and autograd. Printed, and
limited for float64: the worst of max|Δ| / max|g| over all tensors of the adapter.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.parity.peft_reference import gradients_of, peft_twin, random_adapter, relative_deviation
from torch import Tensor

from luthier_core.losses import LOSSES, loss_config
from luthier_core.proto import wire_pb2
from luthier_model.attention import PackedAttention
from luthier_model.base import BaseModel, load_base_model
from luthier_model.logprobs import token_logprobs
from luthier_model.lora import LoraAdapter, Segment
from luthier_model.peft_io import adapter_files
from luthier_trainer.engine import Engine
from luthier_trainer.packing import decode_datum, pack

# PEFT warns that merging a tied lm_head is difficult; nothing is merged here.
pytestmark = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")

VOCAB_SIZE = 211
BETA, LOW, HIGH = 0.05, 0.8, 1.2


def formula(loss_fn: str, lp: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """One datum's loss, as wire protocol 7.3 writes it."""
    if loss_fn == "cross_entropy":
        return -(inputs["weights"] * lp).sum()
    q, a = inputs["logprobs"], inputs["advantages"]
    r = (lp - q).exp()
    if loss_fn == "importance_sampling":
        return -(r * a).sum()
    if loss_fn == "ppo":
        return -torch.minimum(r * a, r.clamp(LOW, HIGH) * a).sum()
    if loss_fn == "cispo":
        return -(r.clamp(0.0, 4.0).detach() * lp * a).sum()
    if loss_fn == "dro":
        return -(lp * a - 0.5 * BETA * (lp - q) ** 2).sum()
    s = (lp - q).mean().exp()
    return -torch.minimum(s * a, s.clamp(LOW, HIGH) * a).sum()


def request(model: BaseModel, adapter: LoraAdapter, loss_fn: str) -> bytes:
    """Five ragged datums, one with two targets per position.

    Ratios lie on both sides of the clip thresholds, and far from them: one that bfloat16 moves
    across would be a difference of its own kind.
    """
    random = np.random.default_rng(4)
    data = []
    for length, width in ((1, 1), (7, 1), (24, 1), (3, 2), (13, 1)):
        shape = (length,) if width == 1 else (length, width)
        tokens = random.integers(0, VOCAB_SIZE, length)
        targets = random.integers(0, VOCAB_SIZE, shape)
        signed = random.normal(size=shape)
        moved = random.choice([-0.6, -0.05, 0.05, 0.6], shape) + random.normal(size=shape) / 100
        sampled = _logprobs(model, adapter, tokens, targets) + moved
        floats = {"weights": signed, "advantages": signed, "logprobs": sampled}
        inputs = {name: _tensor(floats[name], "<f4") for name in LOSSES[loss_fn].inputs}
        text = wire_pb2.EncodedTextChunk(tokens=tokens.astype("<i4").tobytes())
        data.append(
            wire_pb2.Datum(
                model_input=[wire_pb2.Chunk(encoded_text=text)],
                loss_fn_inputs={"target_tokens": _tensor(targets, "<i8"), **inputs},
            )
        )
    message = wire_pb2.ForwardBackwardRequest(model_id="r", seq_id=1, loss_fn=loss_fn, data=data)
    return message.SerializeToString()


def _tensor(values: np.ndarray, kind: str) -> wire_pb2.Tensor:
    dtype = wire_pb2.DTYPE_INT64 if kind == "<i8" else wire_pb2.DTYPE_FLOAT32
    return wire_pb2.Tensor(dense=values.astype(kind).tobytes(), dtype=dtype, shape=values.shape)


def _logprobs(
    model: BaseModel, adapter: LoraAdapter, tokens: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    segments = [Segment(0, len(tokens), adapter)]
    positions = torch.arange(len(tokens))
    attention = PackedAttention([len(tokens)])
    with torch.no_grad():
        hidden = model.hidden(torch.from_numpy(tokens), positions, attention, segments)
        chosen = token_logprobs(
            model, hidden, torch.from_numpy(targets), segments, chunk_tokens=1024
        )
    return chosen.double().numpy()


def our_logprobs(model: BaseModel, adapter: LoraAdapter, body: bytes) -> Tensor:
    """[T, K] of the packed request, as the engine computes them, but not cut to the wire's."""
    message = wire_pb2.ForwardBackwardRequest.FromString(body)
    spec, config = LOSSES[message.loss_fn], loss_config(message)
    batch = pack([decode_datum(d, spec, config) for d in message.data], torch.device("cpu"))
    segments = [Segment(0, len(batch.tokens_T), adapter)]
    with torch.no_grad():
        hidden = model.hidden(
            batch.tokens_T, batch.positions_T, PackedAttention(batch.lengths), segments
        )
        return token_logprobs(model, hidden, batch.targets_TK, segments, chunk_tokens=16)


def reference(tuned: torch.nn.Module, body: bytes) -> tuple[float, list[Tensor]]:
    """Loss of the request, its gradient left in the parameters; logprobs per datum."""
    message = wire_pb2.ForwardBackwardRequest.FromString(body)
    total, logprobs = 0.0, []
    for datum in message.data:
        example = decode_datum(datum, LOSSES[message.loss_fn], {})
        logits = tuned(input_ids=torch.from_numpy(example.tokens)[None]).logits[0]
        targets = torch.tensor(example.targets)
        columns = targets if targets.dim() == 2 else targets[:, None]
        lp = logits.log_softmax(-1).gather(1, columns).view_as(targets)
        inputs = {name: torch.tensor(a).to(lp) for name, a in example.loss_inputs.items()}
        loss = formula(message.loss_fn, lp, inputs)
        loss.backward()
        total += loss.item()
        logprobs.append(lp.detach())
    return total, logprobs


@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize(
    ("dtype", "limit"), [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 0.15)]
)
def test_loss_logprobs_and_gradients_are_those_of_the_formula(
    model_folder: Path, loss_fn: str, dtype: str, limit: float
) -> None:
    model = load_base_model("tiny", model_folder, dtype=dtype)
    adapter = random_adapter(model, rank=5)
    body = request(model, adapter, loss_fn)
    engine = Engine(model, logprob_chunk_tokens=16, num_threads=1, micro_batch_tokens=32)
    engine.create("run", adapter.spec)
    engine.load("run", adapter_files(adapter, "tiny"), optimizer=False)

    answer = engine.forward_backward("run", body, backward=True, clock_cycle=1)

    twin, parameters = peft_twin(model_folder, adapter, torch.float64, weights=model.dtype)
    loss, logprobs = reference(twin, body)
    ours = gradients_of(engine, "run")
    worst = max(relative_deviation(ours[name], p.grad) for name, p in parameters.items())
    packed = our_logprobs(model, adapter, body)
    rows = torch.split(packed, [len(lp) for lp in logprobs])
    lp_worst = max(
        (mine[:, : theirs.numel() // len(theirs)].reshape(theirs.shape) - theirs).abs().max().item()
        for mine, theirs in zip(rows, logprobs, strict=True)
    )
    measured = wire_pb2.ForwardBackwardOutput.FromString(answer).metrics["loss:sum"]
    print(
        f"\n{loss_fn}, {dtype}: gradients {worst:.1e}, logprobs {lp_worst:.1e}, "
        f"loss {abs(measured / loss - 1):.1e}"
    )
    assert ours.keys() == parameters.keys()
    assert worst <= limit
    assert lp_worst <= limit
    assert measured == pytest.approx(loss, rel=limit)
