"""Adapter files: what goes in comes out, and what does not fit is refused by name."""

import json

import pytest
import safetensors.torch
import torch

from luthier_core.errors import BadRequest
from luthier_model.lora import LoraAdapter, LoraSpec, init_adapter
from luthier_model.peft_io import CONFIG_FILE, WEIGHTS_FILE, adapter_files, adapter_from_files

Q_PROJ = "model.layers.0.self_attn.q_proj"
O_PROJ = "model.layers.0.self_attn.o_proj"
SHAPES = {Q_PROJ: (6, 8), O_PROJ: (8, 6), "lm_head": (6, 11)}
Files = dict[str, bytes]


@pytest.fixture
def adapter() -> LoraAdapter:
    adapter = init_adapter(LoraSpec(rank=3, seed=0, train_mlp=False), SHAPES, "cpu")
    for pair in adapter.pairs.values():
        pair.b.normal_()
    return adapter


@pytest.fixture
def files(adapter: LoraAdapter) -> Files:
    return adapter_files(adapter, "tiny")


def test_an_adapter_survives_its_files_bit_for_bit(adapter: LoraAdapter, files: Files) -> None:
    loaded = adapter_from_files(files, SHAPES, "cpu")
    assert loaded.spec == adapter.spec
    assert loaded.pairs.keys() == adapter.pairs.keys()
    for name, pair in adapter.pairs.items():
        assert torch.equal(loaded.pairs[name].a, pair.a)
        assert torch.equal(loaded.pairs[name].b, pair.b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 0}, "lora_alpha = 0 is not a positive number"),
        ({"lora_alpha": "16"}, "lora_alpha = '16' is not a positive number"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA', only 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa', only True"),
        ({"use_dora": True}, "use_dora = True, only False"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": 0}, "r = 0 is not a positive integer"),
        ({"r": 4}, r"lora_A.weight has shape \[3, 6\], expected \[4, 6\]"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(
    files: Files, change: dict[str, object], message: str
) -> None:
    files[CONFIG_FILE] = json.dumps({**json.loads(files[CONFIG_FILE]), **change}).encode()
    with pytest.raises(BadRequest, match=message):
        adapter_from_files(files, SHAPES, "cpu")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff"])
def test_a_damaged_configuration_is_refused(files: Files, content: bytes) -> None:
    with pytest.raises(BadRequest, match=r"adapter_config\.json is missing or damaged"):
        adapter_from_files({**files, CONFIG_FILE: content}, SHAPES, "cpu")


def test_a_model_of_other_shapes_is_refused_with_both_shapes(files: Files) -> None:
    with pytest.raises(BadRequest, match=r"lm_head.lora_B.weight has shape \[11, 3\].*\[12, 3\]"):
        adapter_from_files(files, {**SHAPES, "lm_head": (6, 12)}, "cpu")


def test_a_module_that_the_model_lacks_is_named(files: Files) -> None:
    shapes = {Q_PROJ: SHAPES[Q_PROJ], "lm_head": SHAPES["lm_head"]}
    with pytest.raises(BadRequest, match=f"no module '{O_PROJ}'"):
        adapter_from_files(files, shapes, "cpu")


def test_a_module_that_the_files_lack_is_named(files: Files) -> None:
    files[WEIGHTS_FILE] = without(files[WEIGHTS_FILE], O_PROJ)
    with pytest.raises(BadRequest, match=f"module '{O_PROJ}' is missing"):
        adapter_from_files(files, SHAPES, "cpu")


def test_a_factor_that_the_files_lack_is_named(files: Files) -> None:
    files[WEIGHTS_FILE] = without(files[WEIGHTS_FILE], "lm_head.lora_B")
    with pytest.raises(BadRequest, match=r"lm_head\.lora_B\.weight is missing"):
        adapter_from_files(files, SHAPES, "cpu")


@pytest.mark.parametrize("name", ["base_model.model.lm_head.lora_magnitude_vector", "lm_head.bias"])
def test_a_tensor_that_is_no_lora_factor_is_refused(files: Files, name: str) -> None:
    tensors = safetensors.torch.load(files[WEIGHTS_FILE])
    files[WEIGHTS_FILE] = safetensors.torch.save({**tensors, name: torch.ones(11)})
    with pytest.raises(BadRequest, match=f"unexpected tensor {name}"):
        adapter_from_files(files, SHAPES, "cpu")


@pytest.mark.parametrize("length", [0, 7, 300])
def test_truncated_weights_are_refused(files: Files, length: int) -> None:
    files[WEIGHTS_FILE] = files[WEIGHTS_FILE][:length]
    with pytest.raises(BadRequest, match=WEIGHTS_FILE):
        adapter_from_files(files, SHAPES, "cpu")


def without(content: bytes, part: str) -> bytes:
    tensors = safetensors.torch.load(content)
    return safetensors.torch.save({n: t for n, t in tensors.items() if part not in n})
