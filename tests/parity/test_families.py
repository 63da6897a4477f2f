"""Every family of models that can be trained: logits, gradients and adapter files are PEFT's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tests.parity.peft_reference import random_adapter, relative_deviation
from torch import Tensor, nn

from luthier_core.proto import wire_pb2
from luthier_model.attention import PackedAttention
from luthier_model.base import BaseModel, load_base_model
from luthier_model.logprobs import token_logprobs
from luthier_model.lora import LORA_ALPHA, LoraAdapter, LoraPair, LoraSpec, Segment
from luthier_model.peft_io import WEIGHTS_FILE, adapter_files, adapter_from_files
from luthier_trainer.engine import Engine
from luthier_trainer.optim import AdamParams

pytestmark = [
    # PEFT warns that merging a tied lm_head is difficult; nothing is merged here.
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True."),
    # And that it saves a copy of the embeddings beside an adapter on lm_head, which we skip.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 6}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", WINDOW),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {**WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {**WINDOW, "query_pre_attn_scalar": 16}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS),
}
LENGTHS = [9, 1, 13]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(11)
    family, settings = FAMILIES[request.param]
    prefix = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{prefix}Config")(**SHAPE, **settings)
    path = tmp_path_factory.mktemp(request.param)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(path)
    return path


def reference_model(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' plainest code paths."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    if "Moe" in type(model).__name__:
        model.set_experts_implementation("eager")
    return model.eval()


@pytest.fixture
def wide_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds attention weights to float32 even in a float64 model: not here."""
    softmax = nn.functional.softmax

    def wide(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim=dim, dtype=torch.promote_types(x.dtype, dtype or x.dtype))

    monkeypatch.setattr(nn.functional, "softmax", wide)


def write(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def packed_logprobs(model: BaseModel, adapter: LoraAdapter, tokens: Tensor, k: Tensor) -> Tensor:
    segments = [Segment(0, len(tokens), adapter)]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    hidden = model.hidden(tokens, positions, PackedAttention(LENGTHS), segments)
    return token_logprobs(model, hidden, k, segments, chunk_tokens=8)


def logits(model: BaseModel, adapter: LoraAdapter, tokens: Tensor) -> Tensor:
    segments = [Segment(0, len(tokens), adapter)]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    with torch.no_grad():
        hidden = model.hidden(tokens, positions, PackedAttention(LENGTHS), segments)
        return model.logits(hidden, segments)


def peft_logits(tuned: nn.Module, tokens: Tensor) -> Tensor:
    return torch.cat([tuned(input_ids=part[None]).logits[0] for part in tokens.split(LENGTHS)])


def some_tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))


def test_peft_computes_our_logits_from_the_files_we_export(folder: Path, tmp_path: Path) -> None:
    model = load_base_model("tiny", folder)
    adapter = random_adapter(model, rank=3)
    base = reference_model(folder, torch.float32)
    with torch.no_grad():
        untuned = peft_logits(base, some_tokens())
        tuned = PeftModel.from_pretrained(base, write(adapter_files(adapter, "tiny"), tmp_path))
        theirs = peft_logits(tuned, some_tokens())
    worst = (logits(model, adapter, some_tokens()) - theirs).abs().max().item()
    moved = (theirs - untuned).abs().max().item()
    print(f"\nlogits max|Δ| = {worst:.1e}; the adapter moves them {moved:.1f}")
    assert worst <= 1e-5
    assert moved > 0.1


@pytest.mark.usefixtures("wide_softmax")
def test_gradients_are_those_of_peft_in_float64(folder: Path, tmp_path: Path) -> None:
    model = load_base_model("tiny", folder, dtype="float64")
    adapter = random_adapter(model, rank=3)
    tokens, targets = some_tokens(), some_tokens(1)
    leaves = [leaf for pair in adapter.pairs.values() for leaf in (pair.a, pair.b)]
    for leaf in leaves:
        leaf.requires_grad_()
    logprobs = packed_logprobs(model, adapter, tokens, targets)
    flat = iter(torch.autograd.grad(logprobs.square().sum(), leaves))
    pairs = {name: LoraPair(a=next(flat), b=next(flat)) for name in adapter.pairs}
    ours = safetensors.torch.load(
        adapter_files(LoraAdapter(adapter.spec, pairs), "tiny")[WEIGHTS_FILE]
    )

    tuned = PeftModel.from_pretrained(
        reference_model(folder, torch.float64),
        write(adapter_files(adapter, "tiny"), tmp_path),
        is_trainable=True,
        autocast_adapter_dtype=False,
    )
    expected = peft_logits(tuned, tokens).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected.square().sum().backward()
    theirs = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in tuned.named_parameters()
        if ".lora_" in name
    }
    assert ours.keys() == theirs.keys()
    worst = max(relative_deviation(ours[name], theirs[name]) for name in ours)
    lp_worst = (logprobs - expected).abs().max().item()
    print(f"\n{len(ours)} tensors: max|Δ|/max|g| = {worst:.1e}, logprobs max|Δ| = {lp_worst:.1e}")
    assert worst <= 1e-9
    assert lp_worst <= 1e-9


def test_an_adapter_made_elsewhere_on_some_modules_is_loaded_and_trained_on(
    folder: Path, tmp_path: Path
) -> None:
    base = reference_model(folder, torch.float32)
    torch.manual_seed(6)
    has_experts = any(name.endswith(".experts") for name, _ in base.named_modules())
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "lm_head"],
        target_parameters=["mlp.experts.down_proj"] if has_experts else None,
        init_lora_weights=False,
    )
    tuned = get_peft_model(base, config).eval()
    tuned.save_pretrained(tmp_path)
    model = load_base_model("tiny", folder)

    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    adapter = adapter_from_files(files, model.lora_shapes, "cpu")

    with torch.no_grad():
        theirs = peft_logits(tuned, some_tokens())
    worst = (logits(model, adapter, some_tokens()) - theirs).abs().max().item()
    print(f"\nlogits max|Δ| = {worst:.1e}, of {theirs.abs().max():.1f}")
    assert worst <= 2e-5
    assert len(adapter.pairs) == 2 * (3 if has_experts else 2) + 1

    engine = Engine(model, logprob_chunk_tokens=8, num_threads=1)
    engine.create("run", adapter.spec)
    engine.load("run", files, optimizer=False)
    tokens = some_tokens()[: LENGTHS[0]]
    request = cross_entropy_request(tokens.tolist())
    losses = [train_step(engine, "run", request) for _ in range(8)]
    expected = nn.functional.cross_entropy(theirs[: len(tokens) - 1], tokens[1:], reduction="sum")
    assert losses[0] == pytest.approx(expected.item(), rel=1e-4)
    assert losses[-1] < losses[0]


def test_what_we_export_we_load_bit_for_bit(folder: Path) -> None:
    model = load_base_model("tiny", folder)
    adapter = random_adapter(model, rank=3)
    files = adapter_files(adapter, "tiny")
    loaded = adapter_from_files(files, model.lora_shapes, "cpu")
    assert list(loaded.pairs) == list(adapter.pairs) == list(model.lora_shapes)
    for name, pair in adapter.pairs.items():
        assert torch.equal(loaded.pairs[name].a, pair.a)
        assert torch.equal(loaded.pairs[name].b, pair.b)
    assert json.loads(files["adapter_config.json"])["lora_alpha"] == LORA_ALPHA


def test_a_run_trains_and_its_checkpoint_continues_bit_for_bit(folder: Path) -> None:
    engine = Engine(load_base_model("tiny", folder), logprob_chunk_tokens=8, num_threads=1)
    request = cross_entropy_request(some_tokens().tolist())
    engine.create("run", LoraSpec(rank=2, seed=1))
    engine.create("copy", LoraSpec(rank=2, seed=2))
    losses = [train_step(engine, "run", request) for _ in range(8)]
    engine.load("copy", engine.save("run", optimizer=True), optimizer=True)
    assert train_step(engine, "copy", request) == train_step(engine, "run", request)
    assert engine.run_digest("copy") == engine.run_digest("run")
    assert losses[-1] < losses[0] / 2


def train_step(engine: Engine, run_id: str, request: bytes) -> float:
    answer = engine.forward_backward(run_id, request, backward=True, clock_cycle=0)
    engine.optim_step(run_id, AdamParams(learning_rate=1e-2))
    return wire_pb2.ForwardBackwardOutput.FromString(answer).metrics["loss:sum"]


def cross_entropy_request(tokens: list[int]) -> bytes:
    inputs, targets = np.array(tokens[:-1], "<i4"), np.array(tokens[1:], "<i8")
    weights = np.ones(len(targets), "<f4")
    text = wire_pb2.EncodedTextChunk(tokens=inputs.tobytes())
    datum = wire_pb2.Datum(
        model_input=[wire_pb2.Chunk(encoded_text=text)],
        loss_fn_inputs={
            "target_tokens": wire_pb2.Tensor(dense=targets.tobytes(), dtype=wire_pb2.DTYPE_INT64),
            "weights": wire_pb2.Tensor(dense=weights.tobytes(), dtype=wire_pb2.DTYPE_FLOAT32),
        },
    )
    message = wire_pb2.ForwardBackwardRequest(
        model_id="run", seq_id=1, loss_fn="cross_entropy", data=[datum]
    )
    return message.SerializeToString()
