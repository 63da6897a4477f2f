"""Runs uploaded losses: an interpreter of loss graphs over a fixed table of torch's functions.

Nothing of a graph is looked up by name but in that table, and before it computes, it is run on
tensors without memory, which gives every shape: so none is larger than the limit (reliability S12).

Dimensions: T tokens of one datum, K targets per position.
"""

import math
import operator
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier_core.errors import BadRequest
from luthier_core.loss_graph import ATTRIBUTES, DTYPES, FUNCTIONS, METHODS, LossGraph, Node
from luthier_trainer.packing import Array, Example

MAX_BYTES = 256 * 1024 * 1024
"""Of all values of one datum together."""
DEADLINE_S = 10.0
"""For one request."""
_USER_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
"""What torch raises for arguments that do not fit."""
MAX_INTEGER = 2**31


class GraphLoss:
    """One request's loss; sums over datums. BadRequest names the step that cannot be computed."""

    def __init__(self, graph: LossGraph, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.graph = graph
        self._clock = clock
        self._until = clock() + DEADLINE_S
        self._checked: set[tuple[Any, ...]] = set()
        """Shapes and dtypes of inputs that fit."""

    def total(self, logprobs: Sequence[Tensor], examples: Sequence[Example]) -> Tensor:
        """The summed loss, a scalar; logprobs in the shape of each datum's targets.

        Each datum's gradient is taken here, where it may fail: a graph works on copies of its own.
        """
        losses = []
        for given, example in zip(logprobs, examples, strict=True):
            leaf = given.detach().clone().requires_grad_(torch.is_grad_enabled())
            loss = self._run(leaf, example)[0]
            if torch.is_grad_enabled():
                try:
                    (gradient,) = torch.autograd.grad(loss, leaf)
                except RuntimeError as error:
                    raise _failed(self.graph.loss, error) from None
                loss = _WithGradient.apply(given, loss.detach(), gradient)  # type: ignore[no-untyped-call]
            losses.append(loss)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def metrics(self, logprobs: Sequence[Array], examples: Sequence[Example]) -> dict[str, float]:
        """The loss's own metrics of the whole request: summed over datums, or averaged."""
        sums = dict.fromkeys(self.graph.metrics, 0.0)
        for array, example in zip(logprobs, examples, strict=True):
            for name, value in self._run(torch.tensor(array), example)[1].items():
                sums[name] += float(value)
        return {
            name: value / len(examples) if name.endswith(":mean") else value
            for name, value in sums.items()
        }

    def _run(self, logprobs: Tensor, example: Example) -> tuple[Tensor, dict[str, Any]]:
        """Loss and metrics of one datum."""
        given = [torch.from_numpy(value).to(logprobs.device) for value in example.graph_inputs]
        inputs = [logprobs, *given]
        shapes = tuple((tuple(value.shape), value.dtype) for value in inputs)
        if shapes not in self._checked:
            self._evaluate([value.to("meta") for value in inputs])
            self._checked.add(shapes)
        values = self._evaluate(inputs)
        loss = values[self.graph.loss]
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            raise BadRequest(f"custom loss: {self.graph.loss} must be a scalar of floats")
        if logprobs.requires_grad and not loss.requires_grad:
            raise BadRequest(f"custom loss: {self.graph.loss} does not depend on logprobs")
        metrics = {name: values[node] for name, node in self.graph.metrics.items()}
        for name, value in metrics.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise BadRequest(f"custom loss: {name} must be a scalar")
        return loss.to(logprobs.dtype), metrics

    def _evaluate(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """The value of every node."""
        names = (known.node for known in self.graph.inputs)
        values: dict[str, Any] = dict(zip(names, inputs, strict=True))
        num_bytes = 0
        for node in self.graph.steps:
            if self._clock() > self._until:
                raise BadRequest(f"custom loss: took longer than {DEADLINE_S:g} s")
            try:
                with warnings.catch_warnings(action="ignore"):  # the user's, not this server's
                    value = _call(node, values)
            except _USER_ERRORS as error:
                raise _failed(f"{node.name} ({node.target})", error) from None
            num_bytes += _num_bytes(value)
            if num_bytes > MAX_BYTES:
                raise BadRequest(f"custom loss: {node.name}: more than {MAX_BYTES} bytes in all")
            values[node.name] = value
        return values


class _WithGradient(torch.autograd.Function):
    """A number whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None


def _failed(where: str, error: Exception) -> BadRequest:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return BadRequest(f"custom loss: {where}: {lines[0][:200]}")


def _call(node: Node, values: Mapping[str, Any]) -> Any:
    args = [_argument(value, values) for value in node.args]
    kwargs = {key: _argument(value, values) for key, value in node.kwargs.items()}
    if node.op == "call_method":
        if not args or not isinstance(args[0], Tensor):
            raise TypeError("a method of something that is no tensor")
        return _METHODS[node.target](*args, **kwargs)
    return _FUNCTIONS[node.target.removeprefix("builtins.")](*args, **kwargs)


def _argument(value: Any, values: Mapping[str, Any]) -> Any:
    """What an encoded argument stands for; parse_loss_graph has let no other form pass."""
    match value:
        case list():
            return [_argument(part, values) for part in value]
        case {"ref": name}:
            return values[name]
        case {"tuple": parts}:
            return tuple(_argument(part, values) for part in parts)
        case {"slice": parts}:
            return slice(*(_argument(part, values) for part in parts))
        case {"dict": parts}:
            return {key: _argument(part, values) for key, part in parts.items()}
        case {"float": text}:
            return float(text)
        case {"ellipsis": True}:
            return ...
        case {"dtype": name}:
            return _DTYPES[name]
    return value


def _num_bytes(value: Any) -> int:
    """Of a result; a view counts as if it were none."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple | list):
        return sum(map(_num_bytes, value))
    return 0


def _of_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for tensors and numbers alone, and for no integers that could grow huge."""

    def checked(*args: Any) -> Any:
        for value in args:
            if not isinstance(value, Tensor | bool | int | float):
                raise TypeError(f"{type(value).__name__} is neither a tensor nor a number")
            if isinstance(value, int) and abs(value) > MAX_INTEGER:
                raise TypeError("an integer is too large")
        if function is operator.pow and all(isinstance(value, int) for value in args):
            args = (float(args[0]), *args[1:])
        return function(*args)

    return checked


def _attribute(value: Any, name: str) -> Any:
    if not isinstance(value, Tensor):
        raise TypeError("an attribute of something that is no tensor")
    return _ATTRIBUTES[name](value)


def _item(value: Any, index: Any) -> Any:
    if not isinstance(value, Tensor | tuple | list):
        raise TypeError(f"a part of {type(value).__name__}")
    return value[index]


_MODULES: Mapping[str, Any] = {
    "torch.nn.functional.": torch.nn.functional,
    "torch._C._nn.": torch._C._nn,
    "torch.": torch,
    "operator.": operator,
    "math.": math,
}


def _function(name: str) -> Callable[..., Any]:
    """Of an allowed name. Only the table below asks, and only for names that are written down."""
    prefix = next(prefix for prefix in _MODULES if name.startswith(prefix))
    function: Callable[..., Any] = getattr(_MODULES[prefix], name.removeprefix(prefix))
    return _of_numbers(function) if prefix in ("operator.", "math.") else function


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{name: _function(name) for name in FUNCTIONS - {"getattr", "operator.getitem"}},
    "getattr": _attribute,
    "operator.getitem": _item,
}
_METHODS: Mapping[str, Callable[..., Any]] = {name: getattr(Tensor, name) for name in METHODS}
_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
_ATTRIBUTES: Mapping[str, Callable[[Tensor], Any]] = {
    name: operator.attrgetter(name) for name in ATTRIBUTES
}


def graph_inputs(graph: LossGraph, arrays: Mapping[str, Array], num_tokens: int) -> list[Array]:
    """The inputs beside logprobs, in their order and rank. BadRequest if a shape does not fit."""
    inputs = []
    for known in graph.inputs[1:]:
        array = arrays[known.name]
        if known.rank == 0 and array.size == 1:
            array = array.reshape(())
        if array.ndim != known.rank or (known.rank and len(array) != num_tokens):
            wanted = [(), (num_tokens,), (num_tokens, "K")][known.rank]
            raise BadRequest(
                f"loss_fn_inputs.{known.name}: shape {list(array.shape)}; the loss has declared "
                f"{list(wanted)}"
            )
        inputs.append(np.array(array, order="C"))
    return inputs
