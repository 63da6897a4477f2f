"""One adapter as the two files that PEFT writes, and back.

PEFT itself is not imported: it costs a worker a hundred megabytes, and the format is two files.
"""

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from luthier_core.errors import BadRequest
from luthier_model.lora import (
    LORA_ALPHA,
    TARGETS,
    LoraAdapter,
    LoraPair,
    LoraSpec,
    target_modules,
    widened,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_PLAIN: dict[str, Any] = {
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Variants of LoRA that PEFT can write: our delta has none of them."""


def adapter_files(adapter: LoraAdapter, base_model_name: str) -> dict[str, bytes]:
    """adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": adapter.spec.rank,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        # Whole names: a bare "q_proj" would also match modules that this adapter does not train.
        "target_modules": list(adapter.pairs),
        **_PLAIN,
    }
    tensors: dict[str, Tensor] = {}
    for name, pair in adapter.pairs.items():
        tensors[_tensor_name(name, "A")] = pair.a.detach()
        tensors[_tensor_name(name, "B")] = pair.b.detach()
    return {
        CONFIG_FILE: json.dumps(config, indent=2).encode(),
        WEIGHTS_FILE: tensor_bytes(tensors),
    }


def adapter_from_files(
    files: Mapping[str, bytes], shapes: Mapping[str, tuple[int, int]], device: torch.device | str
) -> LoraAdapter:
    """The adapter in `files` for a model whose linear modules have `shapes` (features in, out).

    BadRequest says what does not fit the model: rank, modules, shapes or a variant of LoRA. The
    files do not tell the seed of the initial weights; it is 0 in the result's spec.
    """
    rank = _plain_rank(files)
    tensors = tensors_from(files, WEIGHTS_FILE)
    spec, names = _spec_of(tensors, shapes, rank)
    pairs = {}
    for name in names:
        num_in, num_out = shapes[name]
        a = _take(tensors, _tensor_name(name, "A"), (rank, num_in))
        b = _take(tensors, _tensor_name(name, "B"), (num_out, rank))
        pairs[name] = LoraPair(a=a.to(device), b=b.to(device))
    if tensors:
        raise BadRequest(f"{WEIGHTS_FILE}: unexpected tensor {min(tensors)}")
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
        return safetensors.torch.load(files[file])
    except SafetensorError as error:
        raise BadRequest(f"{file}: {error}") from error


def _tensor_name(module: str, factor: str) -> str:
    return f"{_PREFIX}{module}.lora_{factor}.weight"


def _module_of(tensor_name: str) -> str:
    if not tensor_name.startswith(_PREFIX) or ".lora_" not in tensor_name:
        raise BadRequest(f"{WEIGHTS_FILE}: unexpected tensor {tensor_name}")
    return tensor_name.removeprefix(_PREFIX).rpartition(".lora_")[0]


def _plain_rank(files: Mapping[str, bytes]) -> int:
    """The rank in adapter_config.json, once it is sure that nothing else there is unusual."""
    try:
        config = json.loads(files[CONFIG_FILE])
        rank = config["r"]
    except (KeyError, ValueError, TypeError) as error:
        raise BadRequest(f"{CONFIG_FILE} is missing or damaged: {error!r}") from error
    if not isinstance(rank, int) or rank < 1:
        raise BadRequest(f"{CONFIG_FILE}: r = {rank!r} is not a positive integer")
    for key, value in {"lora_alpha": LORA_ALPHA, **_PLAIN}.items():
        if config.get(key, value) != value:
            raise BadRequest(f"{CONFIG_FILE}: {key} = {config[key]!r}, only {value!r} is supported")
    return rank


def _spec_of(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], rank: int
) -> tuple[LoraSpec, list[str]]:
    """The spec whose target modules are exactly the modules in the file, and these."""
    found = {_module_of(key) for key in tensors}
    if foreign := found - shapes.keys():
        raise BadRequest(f"{WEIGHTS_FILE}: the base model has no module {min(foreign)!r}")
    last_parts = {name.rpartition(".")[2] for name in found}
    switches = {switch: not last_parts.isdisjoint(ends) for switch, ends in TARGETS.items()}
    spec = LoraSpec(rank=rank, seed=0, **switches)
    names = target_modules(shapes, spec)
    if missing := set(names) - found:
        raise BadRequest(
            f"{WEIGHTS_FILE}: module {min(missing)!r} is missing beside {min(found)!r}"
        )
    return spec, names


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise BadRequest(f"{WEIGHTS_FILE}: tensor {name} is missing")
    if tuple(tensor.shape) != shape:
        raise BadRequest(
            f"{WEIGHTS_FILE}: {name} has shape {list(tensor.shape)}, expected {list(shape)}"
        )
    return widened(tensor)
