"""One adapter as the two files that PEFT writes, and back.

PEFT itself is not imported: it costs a worker a hundred megabytes, and the format is two files.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from luthier_core.errors import BadRequest, InvalidField
from luthier_core.peft_files import (
    CONFIG_FILE,
    FROZEN_COPIES,
    PLAIN,
    PREFIX,
    WEIGHTS_FILE,
    check_shape,
    file_name,
    file_shapes,
    modules_in,
    read_config,
)
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


def adapter_files(adapter: LoraAdapter, base_model_name: str) -> dict[str, bytes]:
    """adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained."""
    experts = [name for name, pair in adapter.pairs.items() if pair.a.dim() == 3]
    config = {
        **{key: allowed[0] for key, allowed in PLAIN.items()},
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
        in_file = f"{PREFIX}{file_name(name, adapter.pairs)}"
        for factor, tensor in zip("AB", _to_file(pair), strict=True):
            tensors[f"{in_file}.lora_{factor}.weight"] = tensor
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
    config = read_config(files)
    rank: int = config["r"]
    tensors = {
        name: tensor
        for name, tensor in tensors_from(files, WEIGHTS_FILE).items()
        if not name.endswith(FROZEN_COPIES)
    }
    names = modules_in(tensors, shapes, config)
    spec = _spec_of(names, shapes, rank)
    pairs = {}
    for name in names:
        factors = []
        for tensor, expected in file_shapes(name, names, shapes[name], rank).items():
            if tensor not in tensors:
                raise BadRequest(f"{WEIGHTS_FILE}: {tensor} is missing")
            check_shape(tensor, tensors[tensor].shape, expected)
            factors.append(widened(tensors.pop(tensor)).to(device))
        pairs[name] = _from_file(factors[0], factors[1], shapes[name], rank)
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


def _from_file(a: Tensor, b: Tensor, shape: LoraShape, rank: int) -> LoraPair:
    *experts, num_in, num_out = shape
    if experts:
        a, b = a.view(*experts, rank, num_in), b.view(num_out, rank, *experts).permute(2, 0, 1)
    return LoraPair(a=a, b=b.contiguous())
