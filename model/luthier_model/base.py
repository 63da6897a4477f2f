"""Load a transformers causal LM once, freeze it, and put MultiLoRALinear into it.

Trainer and sampler load through here, so both compute the same numbers.

Dimensions: T packed tokens, D hidden size, M rows whose logits are wanted, V vocabulary.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from luthier_core.errors import ConfigError, Unsupported
from luthier_model.adapted_linear import StackedDeltas, widened
from luthier_model.adapter_stacks import AdapterStacks
from luthier_model.attention import ATTENTION_NAME, AttentionContext, PackedAttention
from luthier_model.experts import MultiLoRAExperts, is_fused_experts
from luthier_model.lora import TARGETS, LoraShape, MultiLoRALinear, Routing, Segment

_CODE = {".py", ".pyc", ".so"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What other services need to know about a base model; travels as JSON."""

    name: str
    """What clients ask for, such as Qwen/Qwen3-8B."""
    path: str
    architecture: str
    vocab_size: int
    max_context_tokens: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Self:
        return cls(**{**facts, "eos_token_ids": tuple(facts["eos_token_ids"])})


class BaseModel:
    """A frozen causal LM whose linear modules take an adapter per row.

    Not for two threads at once: `routing` is the model's own. In torch's inference mode it moves
    the adapters' factors into stacks of its own, and has no gradient.
    """

    def __init__(self, facts: ModelFacts, module: Any, routing: Routing) -> None:
        self.facts = facts
        self.module = module
        self.routing = routing
        self._stacks = AdapterStacks()
        config = module.config.get_text_config()
        self._logit_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.lora_shapes: dict[str, LoraShape] = {}
        """What an adapter can be on, in the model's order, by name as in named_parameters()."""
        for part in module.modules():
            if isinstance(part, MultiLoRALinear):
                self.lora_shapes[part.name] = (part.linear.in_features, part.linear.out_features)
            elif isinstance(part, MultiLoRAExperts):
                self.lora_shapes |= part.shapes

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.module.dtype
        return dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of adapters, logits, losses and gradients: float32, but float64 on a float64 model."""
        return torch.promote_types(self.dtype, torch.float32)

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attention: AttentionContext,
        segments: Sequence[Segment],
        *,
        recompute: bool = False,
    ) -> Tensor:
        """Hidden states [T, D] after the final norm, of int64 tokens[T] at positions[T].

        With `recompute`, what a backward holds on to is one [T, D] per layer; the numbers are the
        same bit for bit, and it costs a second forward.
        """
        with self.routing.use(segments, stacked=self._stacked(segments), recompute=recompute):
            out: Tensor = self.module.base_model(
                input_ids=tokens_T[None],
                position_ids=positions_T[None],
                use_cache=False,
                attention=attention,
            ).last_hidden_state
        return out[0]

    def logits(self, hidden_MD: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Logits [M, V] in `compute_dtype`; `segments` count the rows of hidden_MD."""
        with self.routing.use(segments, stacked=self._stacked(segments)):
            out: Tensor = self.module.get_output_embeddings()(hidden_MD)
        if (cap := self._logit_cap) is not None:
            out = cap * torch.tanh(out / cap)
        return widened(out)

    def _stacked(self, segments: Sequence[Segment]) -> Sequence[StackedDeltas]:
        """In inference mode an adapter is a sampler's, which may be moved into a stack."""
        return self._stacks.deltas(segments) if torch.is_inference_mode_enabled() else ()


def load_base_model(
    name: str, path: str | Path, *, device: str = "auto", dtype: str = "auto"
) -> BaseModel:
    """The model in the Hugging Face folder `path`, frozen, served to clients as `name`.

    device is cpu, cuda or auto: cuda where there is one. dtype is float32, bfloat16, auto (bfloat16
    on CUDA, float32 elsewhere) or, to measure the others against, float64. Only safetensors are
    read and no code of the folder is run. ConfigError says in one line what is wrong with it.
    """
    _check_folder(Path(path))
    _check_shards(Path(path))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model {name}: there is no CUDA device here; set models.device to cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    transformers_logging.disable_progress_bar()
    try:
        module, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=DTYPES[dtype],
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(f"model {name}: {path} cannot be loaded: {first_line}") from error
    # transformers would only warn, and go on with random numbers in their place.
    if missing := info["missing_keys"]:
        raise ConfigError(f"model {name}: {path} has no weights for {min(missing)}")
    module.eval().requires_grad_(False).to(device)
    routing = Routing()
    _wrap_linears(module, routing)
    _make_recomputable(module, routing)
    model = BaseModel(_facts(name, str(path), module), module, routing)
    _check_logits(model)
    return model


def describe_base_model(name: str, path: Path | str) -> tuple[ModelFacts, dict[str, LoraShape]]:
    """The model's facts, and what adapters can be on, from its configuration: no weights are read.

    ConfigError says in one line what is wrong with the folder.
    """
    _check_folder(Path(path))
    _check_shards(Path(path))
    try:
        config = AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(
                config, attn_implementation=ATTENTION_NAME, trust_remote_code=False
            )
        if (Path(path) / "generation_config.json").is_file():
            module.generation_config = GenerationConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(f"model {name}: {path} cannot be read: {first_line}") from error
    routing = Routing()
    _wrap_linears(module, routing)
    model = BaseModel(_facts(name, str(path), module), module, routing)
    return model.facts, model.lora_shapes


def _check_folder(path: Path) -> None:
    """Refuse code: transformers has run some even when it was told not to (reliability S8)."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is not a model folder: config.json is missing")
    if (path / "adapter_config.json").exists():  # it names the folder that would be loaded instead
        raise ConfigError(f"{path} is an adapter, not a model: adapter_config.json is there")
    for file in path.glob("*config.json"):
        try:
            config = json.loads(file.read_text(), object_hook=_without_code)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not a model folder: {file.name}: {error}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{path} is not a model folder: {file.name} is no object")
    if code := next((file for file in path.rglob("*") if file.suffix in _CODE), None):
        raise ConfigError(f"{path}: {code.relative_to(path)} is code of its own: refused")


def _check_shards(path: Path) -> None:
    """Of several files each is read by its ending: another than this one is unpickled (S6)."""
    for index in path.glob("*.index.json"):
        try:
            shards = json.loads(index.read_text())["weight_map"].values()
            wrong = next((s for s in shards if not re.fullmatch(r"[\w.-]+\.safetensors", s)), None)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a model folder: {index.name}: {error!r}") from error
        if wrong is not None:
            raise ConfigError(f"{path}: {index.name}: {wrong!r} is no safetensors file beside it")


def _without_code(part: dict[str, Any]) -> dict[str, Any]:
    if "auto_map" in part:
        raise ValueError("asks to run code of its own (auto_map): refused")
    return part


def _wrap_linears(module: nn.Module, routing: Routing) -> None:
    wanted = {end for ends in TARGETS.values() for end in ends}
    for name, part in list(module.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(part, nn.Linear) and last in wanted:
            setattr(module.get_submodule(parent), last, MultiLoRALinear(part, name, routing))
        elif is_fused_experts(part):
            setattr(module.get_submodule(parent), last, MultiLoRAExperts(part, name, routing))


def _make_recomputable(module: Any, routing: Routing) -> None:
    for layer in module.base_model.layers:
        layer.forward = _recomputable(layer.forward, routing)


def _recomputable(forward: Callable[..., Any], routing: Routing) -> Callable[..., Any]:
    """A layer's forward that is a checkpoint while `routing` says so.

    transformers' own checkpointing would compute again outside the routing: without adapters.
    """

    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not (routing.recompute and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        segments = routing.segments

        def again(*args: Any, **kwargs: Any) -> Any:
            with routing.use(segments):
                return forward(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputing


@torch.no_grad()
def _check_logits(model: BaseModel) -> None:
    """Refuses a model that does more than we do between its layers and its logits.

    Some scale or cap their logits or attention scores; leaving that out would go unnoticed.
    """
    tokens_T = torch.arange(4, device=model.device)
    attention = PackedAttention([len(tokens_T)])
    try:
        ours = model.logits(model.hidden(tokens_T, tokens_T, attention, ()), ())
    except Unsupported as error:
        raise ConfigError(f"model {model.facts.name}: {error.detail}") from error
    theirs = model.module(input_ids=tokens_T[None], use_cache=False, attention=attention).logits[0]
    if not torch.allclose(ours, widened(theirs), rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"model {model.facts.name}: {model.facts.architecture} changes its logits after lm_head"
        )


def _facts(name: str, path: str, module: Any) -> ModelFacts:
    config = module.config.get_text_config()
    num_heads = config.num_attention_heads
    return ModelFacts(
        name=name,
        path=path,
        architecture=type(module).__name__,
        vocab_size=config.vocab_size,
        max_context_tokens=config.max_position_embeddings,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        hidden_size=config.hidden_size,
        eos_token_ids=_eos_token_ids(module),
    )


def _eos_token_ids(module: Any) -> tuple[int, ...]:
    """generation_config names every token that ends a turn; config often only one of them."""
    found = module.generation_config.eos_token_id
    if found is None:
        found = module.config.get_text_config().eos_token_id
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)
