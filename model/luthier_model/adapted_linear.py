"""A frozen linear layer plus LoRA deltas of several adapters, with a gradient of its own.

One autograd function instead of torch's operators one by one: what it keeps for the backward is x
in the base model's dtype and the [T, R] between the factors. The deltas are computed one adapter
after the other, or all in one batched product: twins, beside lora.add_deltas_loop, their reference.

Dimensions: T packed tokens, D features in, E features out, R rank; N adapters, L rows of the one
with most, R their largest rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from luthier_model.products import product


@dataclass(frozen=True, slots=True)
class Delta:
    """Rows [start, stop) get scale B A x; a [R, D] and b [E, R], float32 or float64."""

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scale: float

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedDeltas:
    """Deltas of a sampler's rows in two batched products, without a gradient: see adapter_stacks.

    The rows of each adapter stand at L places of their own, of which some may be filled up.
    """

    rows: slice
    """Of the packed rows; each of them has a delta."""
    factors: Mapping[str, tuple[Tensor, Tensor]]
    """By module: A transposed [S, D, R] and B transposed [S, R, E]."""
    slots: slice
    """N of the S."""
    scale: float
    gathered: Tensor | None
    """int64[N * L]: the packed row at each place; None: they are `rows` as they stand."""
    places: Tensor | None
    """int64[rows]: the place of each row."""

    def add_to(self, out_TE: Tensor, x_TD: Tensor, name: str) -> None:
        """Add to `out` what the adapters add to the module of that name; both are wide."""
        if name not in self.factors:
            return
        a_NDR, b_NRE = (factor[self.slots] for factor in self.factors[name])
        out, num_slots = out_TE[self.rows], len(a_NDR)
        x = x_TD[self.rows] if self.gathered is None else x_TD.index_select(0, self.gathered)
        inner_NLR = torch.bmm(x.view(num_slots, -1, x.shape[-1]), a_NDR).mul_(self.scale)
        if self.places is None:
            out.view(num_slots, -1, out.shape[-1]).baddbmm_(inner_NLR, b_NRE)
        else:
            delta = torch.bmm(inner_NLR, b_NRE).flatten(0, 1)
            out.add_(delta.index_select(0, self.places))


def adapted_linear(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    deltas: Sequence[Delta],
    *,
    grouped: bool | None = None,
) -> Tensor:
    """x W^T + bias + the deltas of each row: [T, E] in the dtype of x.

    Gradients flow to x and to the factors, not to the weight and the bias. `grouped` computes all
    deltas in one batched product; None is where that pays: for several on a GPU, whose kernels are
    short beside their launches. On a CPU the products one by one took a third of the time.
    """
    if grouped is None:
        grouped = len(deltas) > 1 and x_TD.device.type != "cpu"
    factors = [factor for delta in deltas for factor in (delta.a, delta.b)]
    places = [(delta.rows, delta.scale) for delta in deltas]
    function = _Grouped if grouped and deltas else _OneByOne
    out: Tensor = function.apply(  # type: ignore[no-untyped-call]
        x_TD, weight_ED, bias_E, places, *factors
    )
    return out


def widened(x: Tensor) -> Tensor:
    """x in the dtype that deltas and logits are computed in: float32, or float64 if x has it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


Places = Sequence[tuple[slice, float]]
"""Rows and scale of each delta."""


class _OneByOne(torch.autograd.Function):
    """One delta after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        places: Places,
        *factors: Tensor,
    ) -> Tensor:
        wide_TD, out_TE = widened(x_TD), widened(product(x_TD, weight_ED, bias_E))
        inner = []
        for (rows, scale), a, b in zip(places, factors[::2], factors[1::2], strict=True):
            inner_TR = product(wide_TD[rows], a).mul_(scale)
            out_TE[rows].add_(product(inner_TR, b))  # += would also copy the rows onto themselves
            inner.append(inner_TR)
        ctx.places = places
        ctx.save_for_backward(x_TD, weight_ED, *factors, *inner)
        return out_TE.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED, *saved = ctx.saved_tensors
        num_factors = 2 * len(ctx.places)
        factors, inner = saved[:num_factors], saved[num_factors:]
        wide_TD, wide_TE = widened(x_TD), widened(grad_TE)
        grad_TD = _grad_of_base(ctx, grad_TE, weight_ED)
        grads: list[Tensor | None] = []
        for (rows, scale), a, b, inner_TR in zip(
            ctx.places, factors[::2], factors[1::2], inner, strict=True
        ):
            grad_TR = product(wide_TE[rows], b.T).mul_(scale)
            grads.append(product(grad_TR.T, wide_TD[rows].T))
            grads.append(product(wide_TE[rows].T, inner_TR.T))
            if grad_TD is not None:
                grad_TD[rows].add_(product(grad_TR, a.T))
        return (_narrowed(grad_TD, x_TD.dtype), None, None, None, *grads)


class _Grouped(torch.autograd.Function):
    """All deltas in one batched product, rows and ranks filled up with zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        places: Places,
        *factors: Tensor,
    ) -> Tensor:
        out_TE = widened(product(x_TD, weight_ED, bias_E))
        a_NRD, b_NRE = _stacked(factors)
        scales_N = torch.tensor([scale for _, scale in places], dtype=out_TE.dtype)
        scales_N11 = scales_N.to(out_TE.device)[:, None, None]
        inner_NLR = _padded(widened(x_TD), places) @ a_NRD.mT * scales_N11
        _add_rows(out_TE, inner_NLR @ b_NRE, places)
        ctx.places = places
        ctx.save_for_backward(x_TD, weight_ED, inner_NLR, scales_N11, *factors)
        return out_TE.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED, inner_NLR, scales_N11, *factors = ctx.saved_tensors
        a_NRD, b_NRE = _stacked(factors)
        grad_NLE = _padded(widened(grad_TE), ctx.places)
        grad_NLR = grad_NLE @ b_NRE.mT * scales_N11
        grad_a_NRD = grad_NLR.mT @ _padded(widened(x_TD), ctx.places)
        grad_b_NER = grad_NLE.mT @ inner_NLR
        grad_TD = _grad_of_base(ctx, grad_TE, weight_ED)
        if grad_TD is not None:
            _add_rows(grad_TD, grad_NLR @ a_NRD, ctx.places)
        grads: list[Tensor | None] = []
        for index, a in enumerate(factors[::2]):
            grads += [grad_a_NRD[index, : len(a)], grad_b_NER[index, :, : len(a)]]
        return (_narrowed(grad_TD, x_TD.dtype), None, None, None, *grads)


def _grad_of_base(ctx: Any, grad_TE: Tensor, weight_ED: Tensor) -> Tensor | None:
    """What the frozen layer sends back to x, if anybody wants it."""
    return widened(product(grad_TE, weight_ED.T)) if ctx.needs_input_grad[0] else None


def _narrowed(grad_TD: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if grad_TD is None else grad_TD.to(dtype)


def _stacked(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All A as [N, R, D] and all B, transposed, as [N, R, E]."""
    a_NRD = pad_sequence(list(factors[::2]), batch_first=True)
    return a_NRD, pad_sequence([b.T for b in factors[1::2]], batch_first=True)


def _padded(x_TD: Tensor, places: Places) -> Tensor:
    """[T, D] -> [N, L, D]"""
    return pad_sequence([x_TD[rows] for rows, _ in places], batch_first=True)


def _add_rows(out_TE: Tensor, delta_NLE: Tensor, places: Places) -> None:
    for (rows, _), delta_LE in zip(places, delta_NLE, strict=True):
        out_TE[rows].add_(delta_LE[: rows.stop - rows.start])
