"""One run's state on the device: LoRA weights, summed gradient, Adam's moments.

Weights and gradient each lie in one flat buffer, float32. The tensors that autograd sees are views,
so that a backward adds up in place and the optimizer, a copy or a digest is one pass over memory.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from luthier_core.errors import BadRequest
from luthier_model.lora import (
    LoraAdapter,
    LoraPair,
    LoraShape,
    LoraSpec,
    factor_shapes,
    init_adapter,
)
from luthier_model.peft_io import adapter_files, adapter_from_files, tensor_bytes, tensors_from
from luthier_trainer.optim import FlatAdamW

OPTIMIZER_FILE = "optimizer.safetensors"

_ALIGN = 16
"""Floats, 64 bytes: where in a cache line a matrix begins can change the bits of a product."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one factor of one module lies in the flat buffers."""

    start: int
    shape: LoraShape

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True, slots=True)
class FilesCopy:
    """A checkpoint that is yet to be encoded, which takes a while and needs no engine."""

    spec: LoraSpec
    slots: Mapping[str, _Slot]
    weights: Tensor
    moments: Mapping[str, Tensor]
    """Empty if the optimizer is not saved."""
    num_steps: int

    def to_files(self, base_model_name: str) -> dict[str, bytes]:
        """The adapter as PEFT's files and, where asked, the optimizer's state beside them."""
        factors = {name: slot.view(self.weights) for name, slot in self.slots.items()}
        modules = dict.fromkeys(name.rpartition(".")[0] for name in factors)
        pairs = {
            name: LoraPair(a=factors[f"{name}.lora_A"], b=factors[f"{name}.lora_B"])
            for name in modules
        }
        files = adapter_files(LoraAdapter(spec=self.spec, pairs=pairs), base_model_name)
        if self.moments:
            tensors = {
                f"{slot_name}.{moment}": slot.view(flat)
                for moment, flat in self.moments.items()
                for slot_name, slot in self.slots.items()
            }
            tensors["step"] = torch.tensor(self.num_steps)
            files[OPTIMIZER_FILE] = tensor_bytes(tensors)
        return files


class RunState:
    """What a training op reads and changes, for one run."""

    def __init__(
        self,
        spec: LoraSpec,
        modules: Mapping[str, LoraShape],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        *,
        applies_nonfinite: bool = False,
    ) -> None:
        """All zero: weights come with `set_weights` or `take`."""
        self.spec = spec
        self._slots = _layout(spec, modules)
        size = max(slot.start + math.prod(slot.shape) for slot in self._slots.values())
        self.weights = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
        self.gradient = torch.zeros_like(self.weights.detach())
        self.weights.grad = self.gradient
        self.optimizer = FlatAdamW(self.weights, applies_nonfinite=applies_nonfinite)
        self.adapter = LoraAdapter(
            spec=spec,
            pairs={
                name: LoraPair(a=self._leaf(f"{name}.lora_A"), b=self._leaf(f"{name}.lora_B"))
                for name in modules
            },
        )

    def set_weights(self, source: LoraAdapter) -> None:
        """Copy the weights of the modules that `source` has."""
        with torch.no_grad():
            for name, pair in source.pairs.items():
                self.adapter.pairs[name].a.copy_(pair.a)
                self.adapter.pairs[name].b.copy_(pair.b)

    @contextmanager
    def atomic_gradient(self) -> Iterator[None]:
        """The summed gradient is as before if the body raises."""
        before = self.gradient.clone()
        try:
            yield
        except BaseException:
            self.gradient.copy_(before)
            raise

    def clear_gradient(self) -> None:
        self.gradient.zero_()

    def copy_files(self, *, optimizer: bool) -> FilesCopy:
        """What a checkpoint is made of, in host memory: later ops do not change it."""
        flats = self.optimizer.moments if optimizer else {}
        return FilesCopy(
            spec=self.spec,
            slots=self._slots,
            weights=self.weights.detach().to("cpu", copy=True),
            moments={name: flat.to("cpu", copy=True) for name, flat in flats.items()},
            num_steps=self.optimizer.num_steps,
        )

    def restore(
        self,
        files: Mapping[str, bytes],
        shapes: Mapping[str, LoraShape],
        *,
        optimizer: bool,
    ) -> None:
        """Take over the weights in `files`, and moments and step, or else start these afresh.

        A module of a kind that the files train, but not this one, gets its initial weights: so an
        adapter that others made on some modules can be trained on. Clears the gradient. BadRequest,
        with nothing changed, if rank, targets or files do not fit.
        """
        loaded = adapter_from_files(files, shapes, self.weights.device)
        if replace(loaded.spec, seed=self.spec.seed) != self.spec:
            raise BadRequest(
                f"the checkpoint has {loaded.spec.describe()}; this run has {self.spec.describe()}"
            )
        saved = self._checked_moments(files) if optimizer else None
        missing = {name: shapes[name] for name in self.adapter.pairs.keys() - loaded.pairs.keys()}
        self.set_weights(init_adapter(self.spec, missing, self.weights.device))
        self.set_weights(loaded)
        self.clear_gradient()
        self.optimizer.reset(0 if saved is None else int(saved["step"]))
        if saved is not None:
            for moment, flat in self.optimizer.moments.items():
                for slot_name, slot in self._slots.items():
                    slot.view(flat).copy_(saved[f"{slot_name}.{moment}"])

    def copy(self) -> dict[str, Tensor]:
        """All that a training op reads and changes, in host memory; a gradient of 0 is left out."""
        tensors = {"weights": self.weights.detach(), **self.optimizer.moments}
        if bool(self.gradient.any()):
            tensors["gradient"] = self.gradient
        copied = {name: flat.to("cpu", copy=True) for name, flat in tensors.items()}
        return copied | {"step": torch.tensor(self.optimizer.num_steps)}

    def take(self, copied: Mapping[str, Tensor]) -> None:
        """Become what `copy` gave; ValueError, with nothing changed, if that does not fit."""
        names = {"weights", "step", *self.optimizer.moments}
        if missing := names - copied.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
        zero = torch.zeros_like(self.weights.detach())
        flats = {**copied, "gradient": copied.get("gradient", zero)}
        for name in ("weights", "gradient", *self.optimizer.moments):
            if flats[name].shape != zero.shape:
                raise ValueError(f"{name} has {flats[name].numel()} numbers, not {zero.numel()}")
        with torch.no_grad():
            self.weights.copy_(flats["weights"])
        self.gradient.copy_(flats["gradient"])
        self.optimizer.reset(int(flats["step"]))
        for moment, flat in self.optimizer.moments.items():
            flat.copy_(flats[moment])

    def checksum(self) -> str:
        """Over the bits of weights, gradient and moments, at memory speed; and the step.

        Equal states have equal checksums; a flipped bit or another rounding anywhere changes it.
        """
        flats = (self.weights.detach(), self.gradient, *self.optimizer.moments.values())
        sums = [_sum_of_bits(flat) for flat in flats]
        return "-".join(
            f"{value & 0xFFFFFFFFFFFFFFFF:x}" for value in (*sums, self.optimizer.num_steps)
        )

    def digest(self) -> str:
        """sha256 over weights, moments, gradient and step: equal digests are equal states."""
        moments = self.optimizer.moments.values()
        state = hashlib.sha256(str(self.optimizer.num_steps).encode())
        for flat in (self.weights.detach(), *moments, self.gradient):
            state.update(flat.cpu().numpy().data)
        return state.hexdigest()

    def _leaf(self, slot_name: str) -> Tensor:
        """An autograd leaf on the flat weights whose gradient is added up in the flat gradient."""
        slot = self._slots[slot_name]
        leaf = slot.view(self.weights.detach()).requires_grad_()
        leaf.grad = slot.view(self.gradient)
        return leaf

    def _checked_moments(self, files: Mapping[str, bytes]) -> dict[str, Tensor]:
        saved = tensors_from(files, OPTIMIZER_FILE)
        expected = {
            f"{slot_name}.{moment}": slot.shape
            for moment in self.optimizer.moments
            for slot_name, slot in self._slots.items()
        }
        for name, shape in {**expected, "step": ()}.items():
            if name not in saved or tuple(saved[name].shape) != shape:
                raise BadRequest(f"{OPTIMIZER_FILE}: {name} of shape {list(shape)} is missing")
        return saved


_CHUNK = 1 << 20


def _sum_of_bits(flat: Tensor) -> int:
    """Sum of the 32-bit words of each chunk, and of the chunks in their order, modulo 2^64."""
    total = 0
    for words in torch.split(flat.view(torch.int32), _CHUNK):
        total = (total * 0x9E3779B97F4A7C15 + int(words.sum(dtype=torch.int64).item())) % (1 << 64)
    return total


def _layout(spec: LoraSpec, modules: Mapping[str, LoraShape]) -> dict[str, _Slot]:
    """Slots of all factors, in the order of the modules."""
    slots: dict[str, _Slot] = {}
    start = 0
    for name, shape in modules.items():
        factors = zip(("lora_A", "lora_B"), factor_shapes(shape, spec.rank), strict=True)
        for factor, factor_shape in factors:
            slots[f"{name}.{factor}"] = _Slot(start, factor_shape)
            start += -(-math.prod(factor_shape) // _ALIGN) * _ALIGN
    return slots
