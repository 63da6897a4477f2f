"""LoRA for many tenants on one frozen model: each packed row gets its own adapter's delta.

delta = (LORA_ALPHA / rank) B A x, computed in float32 even on a bfloat16 model.

Dimensions: T packed tokens, D features in, E features out, R rank, X experts of a layer.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luthier_core.errors import BadRequest
from luthier_model.adapted_linear import Delta, StackedDeltas, adapted_linear, widened

LORA_ALPHA = 32.0
"""The same for every rank, so that a learning rate carries over from one rank to another."""

TARGETS: dict[str, tuple[str, ...]] = {
    "train_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "train_mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    "train_unembed": ("lm_head",),
}
"""Last part of the module names that each switch of a LoraSpec trains. gate_up_proj is how
transformers stores what gate and up of all experts of a layer have in common: one tensor."""

LoraShape = tuple[int, ...]
"""Features (D, E) of a linear module, or (X, D, E) of the experts of a layer."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What a run trains; `seed` decides the initial A and nothing else."""

    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    def describe(self) -> str:
        """Rank and targets, for a message that compares two adapters."""
        return f"rank {self.rank}, {' + '.join(s for s in TARGETS if getattr(self, s))}"


@dataclass(slots=True)
class LoraPair:
    """The two factors of one module's delta, float32 (float64 on a float64 model)."""

    a: Tensor
    """[R, D], or [X, R, D] for experts: a delta for each, all of the spec's rank."""
    b: Tensor
    """[E, R], or [X, E, R]"""


@dataclass(slots=True)
class LoraAdapter:
    """One tenant's LoRA weights, keyed by module name as in named_modules()."""

    spec: LoraSpec
    pairs: dict[str, LoraPair]

    @property
    def scale(self) -> float:
        return LORA_ALPHA / self.spec.rank


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of the packed tokens use this adapter; None is the base model."""

    start: int
    stop: int
    adapter: LoraAdapter | None


class Routing:
    """Which rows use which adapter during the current forward; one object per model.

    Segments lie end to end from row 0 to the last row. With none, every row is the base model's.
    """

    def __init__(self) -> None:
        self.segments: Sequence[Segment] = ()
        self.stacked: Sequence[StackedDeltas] = ()
        """What the segments add in inference mode."""
        self.recompute = False
        """Whether each layer drops its activations and computes them again in the backward."""

    @contextmanager
    def use(
        self,
        segments: Sequence[Segment],
        *,
        stacked: Sequence[StackedDeltas] = (),
        recompute: bool = False,
    ) -> Iterator[None]:
        before = self.segments, self.stacked, self.recompute
        self.segments, self.stacked, self.recompute = segments, stacked, recompute
        try:
            yield
        finally:
            self.segments, self.stacked, self.recompute = before


class MultiLoRALinear(nn.Module):
    """A frozen nn.Linear that adds to each row the delta of the adapter that `routing` names."""

    def __init__(self, linear: nn.Linear, name: str, routing: Routing) -> None:
        super().__init__()
        self.linear = linear
        self.name = name
        self.routing = routing

    @property
    def weight(self) -> Tensor:
        """The frozen weight: transformers looks for it when it ties embeddings."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [1, T, D] or [T, D] -> the same with E; in the dtype of the base model's output."""
        if not torch.is_inference_mode_enabled():
            deltas = deltas_of(self.routing.segments, self.name)
            x_TD = x.reshape(-1, x.shape[-1])
            out_TE = adapted_linear(x_TD, self.linear.weight, self.linear.bias, deltas)
            return out_TE.view(*x.shape[:-1], -1)
        base: Tensor = self.linear(x)
        if not self.routing.stacked:
            return base
        x_TD = widened(x.reshape(-1, x.shape[-1]))
        out_TE = widened(base.reshape(-1, base.shape[-1]))
        for stacked in self.routing.stacked:
            stacked.add_to(out_TE, x_TD, self.name)
        return out_TE.to(base.dtype).view_as(base)


def deltas_of(segments: Sequence[Segment], name: str) -> list[Delta]:
    """What the segments' adapters add to the module of that name."""
    return [
        Delta(s.start, s.stop, pair.a, pair.b, s.adapter.scale)
        for s in segments
        if s.adapter is not None and (pair := s.adapter.pairs.get(name)) is not None
    ]


def add_deltas_loop(
    base_TE: Tensor, x_TD: Tensor, segments: Sequence[Segment], name: str
) -> Tensor:
    """base[T, E] + each row's delta, one segment at a time: the reference for faster twins."""
    assert segments[0].start == 0
    assert segments[-1].stop == len(x_TD)
    if len(segments) == 1:
        return _add_delta(base_TE, x_TD, segments[0].adapter, name)
    lengths = [segment.stop - segment.start for segment in segments]
    # split, not slices: the gradient of n slices is n zero-filled tensors of the full size.
    rows = zip(segments, torch.split(base_TE, lengths), torch.split(x_TD, lengths), strict=True)
    return torch.cat([_add_delta(base, x, segment.adapter, name) for segment, base, x in rows])


def _add_delta(base_TE: Tensor, x_TD: Tensor, adapter: LoraAdapter | None, name: str) -> Tensor:
    pair = None if adapter is None else adapter.pairs.get(name)
    if adapter is None or pair is None:
        return base_TE
    return torch.addmm(base_TE, x_TD @ pair.a.T, pair.b.T, alpha=adapter.scale)


def target_modules(names: Iterable[str], spec: LoraSpec) -> list[str]:
    """Those of the model's linear modules that `spec` trains, in the model's order.

    BadRequest if nothing is to be trained, or if the model has no module of a kind that is.
    """
    kinds = {switch: ends for switch, ends in TARGETS.items() if getattr(spec, switch)}
    if not kinds:
        raise BadRequest(f"lora_config: at least one of {', '.join(TARGETS)} must be true")
    last_parts = {name: name.rpartition(".")[2] for name in names}
    for switch, ends in kinds.items():
        if not any(last in ends for last in last_parts.values()):
            raise BadRequest(f"lora_config.{switch}: this base model has no {', '.join(ends)}")
    wanted = {end for ends in kinds.values() for end in ends}
    return [name for name, last in last_parts.items() if last in wanted]


def shapes_by_switch(shapes: Mapping[str, LoraShape]) -> dict[str, dict[str, LoraShape]]:
    """The modules that each switch of a LoraSpec trains, for services without torch."""
    return {
        switch: {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in ends}
        for switch, ends in TARGETS.items()
    }


def factor_shapes(shape: LoraShape, rank: int) -> tuple[LoraShape, LoraShape]:
    """Shapes of A and B for a module of that shape."""
    *experts, num_in, num_out = shape
    return (*experts, rank, num_in), (*experts, num_out, rank)


def init_adapter(
    spec: LoraSpec, modules: Mapping[str, LoraShape], device: torch.device | str
) -> LoraAdapter:
    """A new adapter on `modules`: A uniform as PEFT's, B zero."""
    pairs = {}
    for name, shape in modules.items():
        a_shape, b_shape = factor_shapes(shape, spec.rank)
        a = _initial_a(spec, name, a_shape).to(device)
        pairs[name] = LoraPair(a=a, b=torch.zeros(b_shape, device=device))
    return LoraAdapter(spec=spec, pairs=pairs)


def _initial_a(spec: LoraSpec, name: str, shape: LoraShape) -> Tensor:
    """Drawn on the CPU by a generator of its own: device, order and neighbours do not matter."""
    digest = hashlib.sha256(f"{spec.seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    # Experts under one another: the bound depends on the number of features in alone.
    a_RD = torch.empty(math.prod(shape[:-1]), shape[-1], dtype=torch.float32)
    return nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5), generator=generator).view(shape)
