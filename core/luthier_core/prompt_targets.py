"""The tensor of token ids that a sampling request wants scored at its prompt's positions.

Cell [i, j] scores a token at prompt position i + 1; -1 asks for nothing. Dense or CSR, and the
answer has the same form (wire protocol 6.4).
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from luthier_core.errors import InvalidField
from luthier_core.proto import wire_pb2 as wire

FIELD = "target_prompt_logprobs"


@dataclass(frozen=True, eq=False)
class PromptTargets:
    """N stored cells: their token ids, and the prompt positions at which they are scored."""

    shape: tuple[int, int]
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    """Never decreasing."""
    csr: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    """Row ends and columns, for the answer; None: dense."""

    @classmethod
    def parse(cls, tensor: dict[str, Any], num_prompt_tokens: int) -> Self:
        """From the TensorData of a request; InvalidField names the part that is wrong."""
        if tensor.get("dtype") != "int64":
            raise InvalidField(f"{FIELD}.dtype: must be 'int64'")
        tokens = _integers(tensor, "data")
        num_rows, width = shape = _shape(tensor.get("shape"), num_prompt_tokens)
        rows_of_cells = tensor.get("sparse_crow_indices"), tensor.get("sparse_col_indices")
        if rows_of_cells == (None, None):
            if len(tokens) != num_rows * width:
                raise InvalidField(f"{FIELD}.data: {len(tokens)} values do not fill {list(shape)}")
            positions = np.repeat(np.arange(1, num_rows + 1), width)
            return cls(shape, tokens, positions)
        ends, columns = (_integers(tensor, f"sparse_{name}_indices") for name in ("crow", "col"))
        _check_csr(ends, columns, len(tokens), num_rows, width)
        positions = np.repeat(np.arange(1, num_rows + 1), np.diff(ends))
        return cls(shape, tokens, positions, (ends, columns))

    @property
    def first_position(self) -> int | None:
        """The first prompt position with a token to score."""
        wanted = self.positions[self.tokens >= 0]
        return int(wanted[0]) if len(wanted) else None

    def tensor(self, logprobs: NDArray[np.float32]) -> wire.Tensor:
        """The answer: float32 logprobs of the N cells, in the request's form."""
        answer = wire.Tensor(dtype=wire.DTYPE_FLOAT32, shape=self.shape)
        values = logprobs.astype("<f4").tobytes()
        if self.csr is None:
            answer.dense = values
        else:
            ends, columns = (part.astype("<i8").tobytes() for part in self.csr)
            answer.sparse_csr.CopyFrom(
                wire.SparseCsr(values=values, crow_indices=ends, col_indices=columns)
            )
        return answer


def _shape(shape: Any, num_prompt_tokens: int) -> tuple[int, int]:
    match shape:
        case [int(num_rows), int(width)] if num_rows == num_prompt_tokens - 1 and width >= 0:
            return num_rows, width
    raise InvalidField(
        f"{FIELD}.shape: must be [{num_prompt_tokens - 1}, K] for a prompt of "
        f"{num_prompt_tokens} tokens"
    )


def _integers(tensor: dict[str, Any], name: str) -> NDArray[np.int64]:
    values = tensor.get(name)
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise InvalidField(f"{FIELD}.{name}: must be a flat list of integers")
    try:
        return np.asarray(values, dtype=np.int64)
    except OverflowError:
        raise InvalidField(f"{FIELD}.{name}: a value does not fit int64") from None


def _check_csr(
    ends: NDArray[np.int64], columns: NDArray[np.int64], num_cells: int, num_rows: int, width: int
) -> None:
    fits = (
        len(ends) == num_rows + 1
        and len(columns) == num_cells
        and ends[0] == 0
        and ends[-1] == num_cells
        and bool((np.diff(ends) >= 0).all())
        and bool(((columns >= 0) & (columns < width)).all())
    )
    if not fits:
        raise InvalidField(
            f"{FIELD}: CSR indices do not describe a tensor of {[num_rows, width]} "
            f"with {num_cells} values"
        )
