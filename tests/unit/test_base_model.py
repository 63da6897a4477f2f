"""What loading a base model guarantees, and which folders it refuses."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from luthier_core.errors import ConfigError
from luthier_model.attention import PackedAttention
from luthier_model.base import ModelFacts, load_base_model

SHAPE = {
    "vocab_size": 53,
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
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=[3, 4])).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**SHAPE)),
        (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=4)),
    ],
    ids=["llama", "mistral-window"],
)
def test_packed_logits_without_adapter_are_those_of_transformers(
    architecture: type[PreTrainedModel], config: PretrainedConfig, tmp_path: Path
) -> None:
    reference = architecture(config).eval()
    reference.save_pretrained(tmp_path)
    model = load_base_model("tiny", tmp_path)
    tokens, lengths = torch.randint(0, 53, (14,)), [9, 5]
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        logits = model.logits(model.hidden(tokens, positions, PackedAttention(lengths), ()), ())
        expected = torch.cat([reference(part[None]).logits[0] for part in tokens.split(lengths)])
    torch.testing.assert_close(logits, expected)


def test_the_loaded_model_is_frozen_and_names_its_lora_modules(folder: Path) -> None:
    model = load_base_model("tiny", folder)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert len(model.lora_shapes) == 2 * 7 + 1
    assert model.lora_shapes["model.layers.1.self_attn.k_proj"] == (32, 16)
    assert model.lora_shapes["lm_head"] == (32, 53)


def test_facts_survive_json(folder: Path) -> None:
    facts = load_base_model("tiny", folder).facts
    assert facts.max_context_tokens == 64
    assert facts.head_dim == 8
    assert facts.eos_token_ids == (3, 4)
    assert ModelFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts


def test_a_folder_that_brings_its_own_code_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="auto_map"):
        load_base_model("tiny", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_with_the_setting_to_change(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no CUDA device here; set models\.device to cpu"):
        load_base_model("tiny", folder, device="cuda")


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a model folder: config\.json") as caught:
        load_base_model("tiny", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_safetensors_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        load_base_model("tiny", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_whose_weights_are_incomplete_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base_model("tiny", tmp_path)


def test_truncated_weights_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        load_base_model("tiny", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "config", "reason"),
    [
        (GptOssForCausalLM, GptOssConfig(**SHAPE, num_local_experts=2), "attention with s_aux"),
        (CohereForCausalLM, CohereConfig(**SHAPE, logit_scale=0.5), "changes its logits"),
    ],
    ids=["gpt-oss", "cohere"],
)
def test_a_model_that_does_more_than_we_compute_is_refused(
    architecture: type[PreTrainedModel], config: PretrainedConfig, reason: str, tmp_path: Path
) -> None:
    architecture(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        load_base_model("tiny", tmp_path)
