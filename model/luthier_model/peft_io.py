"""One adapter as the two files that PEFT writes, and back.

PEFT itself is not imported: it costs a worker a hundred megabytes, and the format is two files.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from luthier_core.errors import BadRequest, InvalidField
from luthier_core.safetensors_check import read_header
from luthier_model.adapted_linear import widened
from luthier_model.lora import (
    LORA_ALPHA,
    TARGETS,
    LoraAdapter,
    LoraPair,
    LoraShape,
    LoraSpec,
    target_modules,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FROZEN_COPIES = (".base_layer.weight", "embed_tokens.weight", "lm_head.weight")
"""Weights of the base model that PEFT adds to an adapter on lm_head, as they are."""
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    # The others, such as pissa, change the base model's own weights too.
    "init_lora_weights": (True, False, "gaussian"),
}
"""What our delta can be, where PEFT knows variants: allowed values, the first one ours."""


def adapter_files(adapter: LoraAdapter, base_model_name: str) -> dict[str, bytes]:
    """adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained."""
    experts = [name for name, pair in adapter.pairs.items() if pair.a.dim() == 3]
    config = {
        **{key: allowed[0] for key, allowed in _PLAIN.items()},
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": adapter.spec.rank,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        # Whole names: a bare "q_proj" would also match modules that this adapter does not train.
        "target_modules": [name for name in adapter.pairs if name not in experts],
    }
    if experts:
        config["target_parameters"] = experts
    tensors: dict[str, Tensor] = {}
    for name, pair in adapter.pairs.items():
        for factor, tensor in zip("AB", _to_file(pair), strict=True):
            tensors[f"{_PREFIX}{_file_name(name, adapter.pairs)}.lora_{factor}.weight"] = tensor
    return {
        CONFIG_FILE: json.dumps(config, indent=2).encode(),
        WEIGHTS_FILE: tensor_bytes(tensors),
    }


def adapter_from_files(
    files: Mapping[str, bytes], shapes: Mapping[str, LoraShape], device: torch.device | str
) -> LoraAdapter:
    """The adapter in `files`, ours or PEFT's own, for a model whose modules have `shapes`.

    It may be on some of the modules of a kind only; one of another alpha is scaled to ours.
    BadRequest says what does not fit the model: rank, modules, shapes or a variant of LoRA. The
    files do not tell the seed of the initial weights; it is 0 in the result's spec.
    """
    config = _plain_config(files)
    rank: int = config["r"]
    tensors = {
        name: tensor
        for name, tensor in tensors_from(files, WEIGHTS_FILE).items()
        if not name.endswith(_FROZEN_COPIES)
    }
    names = _modules_in(tensors, shapes, config)
    spec = _spec_of(names, shapes, rank)
    pairs = {}
    for name in names:
        in_file = _file_name(name, names)
        a = tensors.pop(f"{_PREFIX}{in_file}.lora_A.weight", None)
        b = tensors.pop(f"{_PREFIX}{in_file}.lora_B.weight", None)
        pairs[name] = _from_file(in_file, a, b, shapes[name], rank, device)
    if tensors:
        raise BadRequest(f"{WEIGHTS_FILE}: unexpected tensor {min(tensors)}")
    rescale = _scale(config) * rank / LORA_ALPHA
    if rescale != 1:
        for pair in pairs.values():
            pair.b *= rescale
    return LoraAdapter(spec=spec, pairs=pairs)


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of `tensors`, which may be views of one buffer."""
    return safetensors.torch.save(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"}
    )


def tensors_from(files: Mapping[str, bytes], file: str) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the CPU; BadRequest if it is missing or damaged."""
    if file not in files:
        raise BadRequest(f"the checkpoint has no {file}; it has {sorted(files)}")
    try:
        read_header(files[file], file)
        return safetensors.torch.load(files[file])
    except (InvalidField, SafetensorError) as error:
        raise BadRequest(f"{file}: {error}") from error


def _file_name(name: str, names: Collection[str]) -> str:
    """What PEFT calls the module in its tensors' names.

    Two parameters of one module, as experts have them, it wraps in the order that they have there.
    """
    module, _, parameter = name.rpartition(".")
    if not module.endswith(".experts"):
        return name
    inner = parameter == "gate_up_proj" and f"{module}.down_proj" in names
    return f"{module}.base_layer" if inner else module


def _modules_in(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, LoraShape], config: Mapping[str, Any]
) -> list[str]:
    """The model's modules that the file has factors for, in the model's order."""
    found = {_module_of(key) for key in tensors}
    targets = [*_listed(config, "target_modules"), *_listed(config, "target_parameters")]
    claimed = [
        name for name in shapes if any(f".{name}".endswith(f".{target}") for target in targets)
    ]
    # Between the two parameters of experts, a tensor's name does not tell: the configuration does.
    candidates = {_file_name(name, claimed): name for name in claimed}
    candidates |= {name: name for name, shape in shapes.items() if len(shape) == 2}
    if foreign := found - candidates.keys():
        raise BadRequest(f"{WEIGHTS_FILE}: the base model has no module {min(foreign)!r}")
    present = {candidates[module] for module in found}
    if config.get("layers_to_transform") is None and (missing := set(claimed) - present):
        raise BadRequest(f"{WEIGHTS_FILE}: module {min(missing)!r} is missing")
    return [name for name in shapes if name in present]


def _listed(config: Mapping[str, Any], key: str) -> list[str]:
    """The names under a key of PEFT's configuration; a pattern that stands there names none."""
    value = config.get(key)
    return [str(name) for name in value] if isinstance(value, list) else []


def _module_of(tensor_name: str) -> str:
    if not tensor_name.startswith(_PREFIX) or ".lora_" not in tensor_name:
        raise BadRequest(f"{WEIGHTS_FILE}: unexpected tensor {tensor_name}")
    return tensor_name.removeprefix(_PREFIX).rpartition(".lora_")[0]


def _plain_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """adapter_config.json, once it is sure that nothing there is unusual."""
    try:
        config: dict[str, Any] = json.loads(files[CONFIG_FILE])
        rank = config["r"]
    except (KeyError, ValueError, TypeError) as error:
        raise BadRequest(f"{CONFIG_FILE} is missing or damaged: {error!r}") from error
    if not isinstance(rank, int) or rank < 1:
        raise BadRequest(f"{CONFIG_FILE}: r = {rank!r} is not a positive integer")
    for key, allowed in _PLAIN.items():
        if config.get(key, allowed[0]) not in allowed:
            raise BadRequest(
                f"{CONFIG_FILE}: {key} = {config[key]!r}, only {allowed[0]!r} is supported"
            )
    alpha = config.get("lora_alpha", LORA_ALPHA)
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise BadRequest(f"{CONFIG_FILE}: lora_alpha = {alpha!r} is not a positive number")
    return config


def _scale(config: Mapping[str, Any]) -> float:
    """What PEFT multiplies B A x with."""
    rank = float(config["r"])
    alpha = float(config.get("lora_alpha", LORA_ALPHA))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _spec_of(names: Sequence[str], shapes: Mapping[str, LoraShape], rank: int) -> LoraSpec:
    """The spec whose kinds of modules are those in the file."""
    last_parts = {name.rpartition(".")[2] for name in names}
    switches = {switch: not last_parts.isdisjoint(ends) for switch, ends in TARGETS.items()}
    spec = LoraSpec(rank=rank, seed=0, **switches)
    target_modules(shapes, spec)
    return spec


def _to_file(pair: LoraPair) -> tuple[Tensor, Tensor]:
    """A and B as PEFT stores them: of experts [X R, D] and [E, R X]."""
    a, b = pair.a.detach(), pair.b.detach()
    if a.dim() == 2:
        return a, b
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _from_file(
    name: str,
    a: Tensor | None,
    b: Tensor | None,
    shape: LoraShape,
    rank: int,
    device: torch.device | str,
) -> LoraPair:
    *experts, num_in, num_out = shape
    in_a, in_b = (math.prod(experts) * rank, num_in), (num_out, rank * math.prod(experts))
    for factor, tensor, expected in (("A", a, in_a), ("B", b, in_b)):
        where = f"{WEIGHTS_FILE}: {_PREFIX}{name}.lora_{factor}.weight"
        if tensor is None:
            raise BadRequest(f"{where} is missing")
        if tuple(tensor.shape) != expected:
            raise BadRequest(f"{where} has shape {list(tensor.shape)}, expected {list(expected)}")
    assert a is not None
    assert b is not None
    a, b = widened(a).to(device), widened(b).to(device)
    if experts:
        a, b = a.view(*experts, rank, num_in), b.view(num_out, rank, *experts).permute(2, 0, 1)
    return LoraPair(a=a, b=b.contiguous())
