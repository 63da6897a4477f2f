"""What the two files of a PEFT adapter may say, without torch: for services that only check them.

A shape of LoRA is (D, E) features of a linear module, or (X, D, E) of the experts of a layer.
"""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from luthier_core.errors import BadRequest
from luthier_core.safetensors_check import TensorInfo

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
FROZEN_COPIES = (".base_layer.weight", "embed_tokens.weight", "lm_head.weight")
"""Weights of the base model that PEFT adds to an adapter on lm_head, as they are."""
MAX_FROZEN_COPIES = 3
MAX_NAMES = 10_000
"""Of modules, in a configuration."""

PLAIN: dict[str, tuple[Any, ...]] = {
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

_MEANS_NOTHING = frozenset(
    {
        *("peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
        *("task_type", "megatron_core", "qalora_group_size", "lora_dropout"),
    }
)
"""Of no consequence for the delta, whatever is there; `auto_mapping` names code, and is dropped."""
_NAMES = ("target_modules", "target_parameters", "exclude_modules", "layers_pattern")
_KEPT = frozenset({"r", "lora_alpha", "use_rslora", "layers_to_transform", *_NAMES, *PLAIN})


def read_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """adapter_config.json, once it is sure that nothing there is unusual; BadRequest."""
    try:
        config: dict[str, Any] = json.loads(files[CONFIG_FILE])
        config["r"]
    except (KeyError, ValueError, TypeError) as error:
        raise BadRequest(f"{CONFIG_FILE} is missing or damaged: {error!r}") from error
    check_plain(config)
    return config


def check_plain(config: Mapping[str, Any]) -> None:
    """BadRequest unless this configuration means a delta of ours."""
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise BadRequest(f"{CONFIG_FILE}: r = {rank!r} is not a positive integer")
    for key, allowed in PLAIN.items():
        if (value := config.get(key, allowed[0])) not in allowed:
            raise BadRequest(
                f"{CONFIG_FILE}: {key} = {repr(value)[:200]}, only {allowed[0]!r} is supported"
            )
    alpha = config.get("lora_alpha", 1)
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise BadRequest(f"{CONFIG_FILE}: lora_alpha = {alpha!r} is not a positive number")


def portable_config(config: Mapping[str, Any], base_model: str) -> dict[str, Any]:
    """What is kept of a configuration that somebody sends: keys that are known, nothing else.

    BadRequest if it means something else than a plain LoRA, or has a key that might.
    """
    check_plain(config)
    for key, value in config.items():
        if key not in _KEPT | _MEANS_NOTHING and value not in (None, False, "", [], {}):
            raise BadRequest(f"{CONFIG_FILE}: {key[:100]!r} is not supported; leave it out")
    for key in _NAMES:
        _check_names(key, config.get(key))
    layers = config.get("layers_to_transform")
    if not (layers is None or type(layers) is int or _all_of(layers, int)):
        raise BadRequest(f"{CONFIG_FILE}: layers_to_transform must be null or integers")
    if not isinstance(config.get("use_rslora", False), bool):
        raise BadRequest(f"{CONFIG_FILE}: use_rslora must be true or false")
    kept = {key: value for key, value in config.items() if key in _KEPT}
    ours = {"task_type": "CAUSAL_LM", "inference_mode": True, "lora_dropout": 0.0}
    return {**kept, **ours, "peft_type": "LORA", "base_model_name_or_path": base_model}


def check_adapter(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, tuple[int, ...]]],
    frozen_shape: tuple[int, int],
) -> dict[str, bool]:
    """Which kinds of modules the adapter is on: switch -> whether.

    `modules`: switch -> name -> shape, of the base model; `frozen_shape`: of its embeddings.
    BadRequest if there is a tensor that does not belong there, or of another shape.
    """
    shapes = {name: shape for kind in modules.values() for name, shape in kind.items()}
    factors = {name: one for name, one in tensors.items() if not name.endswith(FROZEN_COPIES)}
    frozen = tensors.keys() - factors.keys()
    for name in frozen:
        if tensors[name].shape != frozen_shape or len(frozen) > MAX_FROZEN_COPIES:
            raise BadRequest(f"{WEIGHTS_FILE}: unexpected tensor {name[:200]}")
    names = modules_in(factors, shapes, config)
    if not names:
        raise BadRequest(f"{WEIGHTS_FILE}: it has no factors")
    left = set(factors)
    for name in names:
        for tensor, expected in file_shapes(name, names, shapes[name], config["r"]).items():
            if tensor not in factors:
                raise BadRequest(f"{WEIGHTS_FILE}: {tensor} is missing")
            check_shape(tensor, factors[tensor].shape, expected)
            left.discard(tensor)
    if left:
        raise BadRequest(f"{WEIGHTS_FILE}: unexpected tensor {min(left)[:200]}")
    return {switch: not kind.keys().isdisjoint(names) for switch, kind in modules.items()}


def check_shape(tensor: str, shape: Collection[int], expected: Collection[int]) -> None:
    """BadRequest that names both."""
    if tuple(shape) != tuple(expected):
        raise BadRequest(
            f"{WEIGHTS_FILE}: {tensor} has shape {list(shape)}, expected {list(expected)}"
        )


def file_name(name: str, names: Collection[str]) -> str:
    """What PEFT calls the module in its tensors' names.

    Two parameters of one module, as experts have them, it wraps in the order that they have there.
    """
    module, _, parameter = name.rpartition(".")
    if not module.endswith(".experts"):
        return name
    inner = parameter == "gate_up_proj" and f"{module}.down_proj" in names
    return f"{module}.base_layer" if inner else module


def file_shapes(
    name: str, names: Collection[str], shape: tuple[int, ...], rank: int
) -> dict[str, tuple[int, int]]:
    """Tensor -> its shape in the file, A then B: of experts [X R, D] and [E, R X]."""
    *experts, num_in, num_out = shape
    in_file = f"{PREFIX}{file_name(name, names)}"
    rows = math.prod(experts) * rank
    return {
        f"{in_file}.lora_A.weight": (rows, num_in),
        f"{in_file}.lora_B.weight": (num_out, rows),
    }


def modules_in(
    tensors: Collection[str], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> list[str]:
    """The model's modules that the file has factors for, in the model's order; BadRequest."""
    found = {_module_of(key) for key in tensors}
    targets = {*_listed(config, "target_modules"), *_listed(config, "target_parameters")}
    claimed = [name for name in shapes if not targets.isdisjoint(_endings(name))]
    # Between the two parameters of experts, a tensor's name does not tell: the configuration does.
    candidates = {file_name(name, claimed): name for name in claimed}
    candidates |= {name: name for name, shape in shapes.items() if len(shape) == 2}
    if foreign := found - candidates.keys():
        raise BadRequest(f"{WEIGHTS_FILE}: the base model has no module {min(foreign)[:200]!r}")
    present = {candidates[module] for module in found}
    if config.get("layers_to_transform") is None and (missing := set(claimed) - present):
        raise BadRequest(f"{WEIGHTS_FILE}: module {min(missing)!r} is missing")
    return [name for name in shapes if name in present]


def _endings(name: str) -> list[str]:
    """a.b.c: itself, b.c and c."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _listed(config: Mapping[str, Any], key: str) -> list[str]:
    """The names under a key of PEFT's configuration; a pattern that stands there names none."""
    value = config.get(key)
    return [str(name) for name in value] if isinstance(value, list) else []


def _module_of(tensor_name: str) -> str:
    if not tensor_name.startswith(PREFIX) or ".lora_" not in tensor_name:
        raise BadRequest(f"{WEIGHTS_FILE}: unexpected tensor {tensor_name[:200]}")
    return tensor_name.removeprefix(PREFIX).rpartition(".lora_")[0]


def _check_names(key: str, value: Any) -> None:
    if value is None or isinstance(value, str):
        return
    if not _all_of(value, str) or len(value) > MAX_NAMES:
        raise BadRequest(f"{CONFIG_FILE}: {key} must be null, a string or at most {MAX_NAMES}")


def _all_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
