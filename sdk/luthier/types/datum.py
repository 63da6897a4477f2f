"""One training example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from luthier.types._base import TensorDtype
from luthier.types.model_input import ModelInput
from luthier.types.tensor import TensorData

_DTYPE_OF_INPUT: dict[str, TensorDtype] = {"target_tokens": "int64"}
"""dtype of an input that is given as a list; every other one is float32."""
_SPARSE_INPUTS = frozenset({"target_tokens", "weights"})
"""Inputs that a two-dimensional torch tensor makes sparse where that is smaller."""

LossFnInputs = Mapping[str, Any]
"""Name -> TensorData, torch tensor, numpy array, list of numbers, or ModelInput of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptProvenanceSpan:
    """Positions that come from the prompt of a sampled sequence."""

    sequence_id: str
    offset: int = 0
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledProvenanceSpan:
    """Positions that come from the tokens of a sampled sequence."""

    sequence_id: str
    offset: int = 0
    length: int


ProvenanceSpans = list[PromptProvenanceSpan | SampledProvenanceSpan]


@dataclass(frozen=True, slots=True)
class Datum:
    """An input of T positions, and what its loss is computed from.

    `loss_fn_inputs` maps names to tensors over the same T positions: `target_tokens` int64[T] or
    [T, K] (the label at each position, so already shifted by one), `weights` float32 of the same
    shape, and for policy losses `logprobs` and `advantages` float32[T]. Values may be given as
    TensorData, torch tensors, numpy arrays, lists, or a ModelInput of text; they are kept as
    TensorData.
    """

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = field(default_factory=dict)
    model_input_spans: ProvenanceSpans | None = None
    loss_fn_input_spans: ProvenanceSpans | None = None

    def __post_init__(self) -> None:
        """TypeError or ValueError naming what is no input, or no tensor."""
        if not isinstance(self.model_input, ModelInput):
            kind = type(self.model_input).__name__
            raise TypeError(f"model_input: {kind} is no ModelInput; see ModelInput.from_ints")
        given: Mapping[str, Any] = self.loss_fn_inputs
        tensors = {name: _tensor(name, value) for name, value in given.items()}
        object.__setattr__(self, "loss_fn_inputs", tensors)
        if (self.model_input_spans is None) != (self.loss_fn_input_spans is None):
            raise ValueError("model_input_spans and loss_fn_input_spans come together")

    if TYPE_CHECKING:  # the dataclass would demand TensorData of callers

        def __init__(
            self,
            model_input: ModelInput,
            loss_fn_inputs: LossFnInputs = ...,
            model_input_spans: ProvenanceSpans | None = None,
            loss_fn_input_spans: ProvenanceSpans | None = None,
        ) -> None: ...

    def with_provenance(
        self, model_input: ProvenanceSpans, loss_fn_inputs: ProvenanceSpans
    ) -> Self:
        """A copy that says where its tokens come from; ValueError if the spans do not tile them."""
        _check_tiling("model_input", model_input, self.model_input.length)
        targets = self.loss_fn_inputs.get("target_tokens")
        if targets is not None and len(targets.shape) == 1:
            _check_tiling("loss_fn_inputs", loss_fn_inputs, targets.shape[0])
        return replace(self, model_input_spans=model_input, loss_fn_input_spans=loss_fn_inputs)


def _tensor(name: str, value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    if isinstance(value, np.ndarray):
        return TensorData.from_numpy(value)
    if isinstance(value, ModelInput):
        return TensorData(value.to_ints(), "int64")
    if hasattr(value, "detach"):  # a torch tensor: torch itself is not imported for that
        if name in _SPARSE_INPUTS and value.ndim == 2:
            return TensorData.from_torch_sparse(value)
        return TensorData.from_torch(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"loss_fn_inputs[{name!r}]: {type(value).__name__} is no tensor or list")
    dtype = _DTYPE_OF_INPUT.get(name, "float32")
    try:
        return TensorData(value, dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss_fn_inputs[{name!r}]: not a rectangle of numbers: {error}") from None


def _check_tiling(name: str, spans: ProvenanceSpans, length: int) -> None:
    covered = sum(span.length for span in spans)
    if covered != length:
        raise ValueError(f"{name}: the spans cover {covered} positions of {length}")
