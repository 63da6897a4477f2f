"""LoRA on the experts of a layer, whose weights transformers keeps in one tensor.

Every expert has its own A and B; the router is not adapted. Up to rounding this is what PEFT
computes with target_parameters, which adds each delta to the expert's weight.

Dimensions: T packed tokens, X experts, K experts per token, M tokens of one expert, D hidden size,
F features of an expert's inside.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luthier_model.adapted_linear import adapted_linear
from luthier_model.lora import LoraAdapter, LoraPair, LoraShape, Routing, Segment, deltas_of


def is_fused_experts(module: nn.Module) -> bool:
    """Whether the module is laid out as Qwen3MoeExperts: [X, 2 F, D] and [X, D, F], no biases."""
    gate_up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter)):
        return False
    layout = [getattr(module, name, None) for name in ("is_transposed", "has_bias", "has_gate")]
    return gate_up.dim() == down.dim() == 3 and layout == [False, False, True]


class MultiLoRAExperts(nn.Module):
    """Frozen experts that add to each row the deltas of the adapter that `routing` names."""

    def __init__(self, experts: Any, name: str, routing: Routing) -> None:
        super().__init__()
        self.experts = experts
        self.routing = routing
        self.gate_up, self.down = f"{name}.gate_up_proj", f"{name}.down_proj"

    @property
    def shapes(self) -> dict[str, LoraShape]:
        shapes: dict[str, LoraShape] = {}
        for name, weight in self._weights().items():
            num_experts, num_out, num_in = weight.shape
            shapes[name] = (num_experts, num_in, num_out)
        return shapes

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """x [T, D], the experts of each token and their weights, both [T, K] -> [T, D]."""
        segments, names = self.routing.segments, (self.gate_up, self.down)
        adapters = [s.adapter for s in segments if s.adapter is not None]
        adapted = any(name in adapter.pairs for adapter in adapters for name in names)
        # transformers' own way may be a grouped matmul, which knows no float64.
        if not adapted and x_TD.dtype != torch.float64:
            untouched: Tensor = self.experts(x_TD, chosen_TK, gates_TK)
            return untouched
        weights = {name: weight.unbind() for name, weight in self._weights().items()}
        per_expert = {id(adapter): _by_expert(adapter, names) for adapter in adapters}
        out_TD = torch.zeros_like(x_TD)
        for expert in torch.unique(chosen_TK).tolist():
            is_chosen_TK = chosen_TK == expert
            token_M = is_chosen_TK.any(-1).nonzero()[:, 0]
            rows = _rows_of(segments, token_M, per_expert, expert)
            x_MD = x_TD.index_select(0, token_M)
            gate_up_MF = adapted_linear(
                x_MD, weights[self.gate_up][expert], None, deltas_of(rows, self.gate_up)
            )
            inner_MF = self.experts._apply_gate(gate_up_MF)
            y_MD = adapted_linear(
                inner_MF, weights[self.down][expert], None, deltas_of(rows, self.down)
            )
            gate_M = (gates_TK * is_chosen_TK).sum(-1).index_select(0, token_M)
            out_TD = out_TD.index_add(0, token_M, (y_MD * gate_M[:, None]).to(out_TD.dtype))
        return out_TD

    def _weights(self) -> dict[str, Tensor]:
        return {self.gate_up: self.experts.gate_up_proj, self.down: self.experts.down_proj}


def _by_expert(adapter: LoraAdapter, names: Sequence[str]) -> list[LoraAdapter]:
    """One adapter for each expert, with that expert's factors under the same names."""
    # unbind, not an index per expert: the gradient of an index is a zero-filled tensor of them all.
    factors = {
        name: zip(adapter.pairs[name].a.unbind(), adapter.pairs[name].b.unbind(), strict=True)
        for name in names
        if name in adapter.pairs
    }
    experts = zip(*factors.values(), strict=True)
    return [
        LoraAdapter(
            spec=adapter.spec,
            pairs={n: LoraPair(a=a, b=b) for n, (a, b) in zip(factors, pairs, strict=True)},
        )
        for pairs in experts
    ]


def _rows_of(
    segments: Sequence[Segment],
    token_M: Tensor,
    per_expert: dict[int, list[LoraAdapter]],
    expert: int,
) -> list[Segment]:
    """The segments as they lie over the ascending tokens of one expert, without empty ones."""
    ends = torch.tensor([s.stop for s in segments], device=token_M.device)
    stops = torch.searchsorted(token_M, ends).tolist()
    rows = []
    for segment, start, stop in zip(segments, [0, *stops], stops, strict=False):
        if start == stop:
            continue
        of_expert = per_expert[id(segment.adapter)] if segment.adapter is not None else []
        rows.append(Segment(start, stop, of_expert[expert] if of_expert else None))
    return rows
