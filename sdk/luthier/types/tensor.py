"""Tensors on the wire: float32 or int64, dense, or sparse by rows (CSR)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.types._base import TensorDtype

if TYPE_CHECKING:
    import torch

_DTYPES: dict[TensorDtype, type[np.generic]] = {"float32": np.float32, "int64": np.int64}


class TensorData:
    """An immutable tensor: a dtype, a shape, and an array in row-major order.

    Dense: `array` has the tensor's shape. Sparse: `array[nnz]` holds the values that
    `sparse_crow_indices[rows + 1]` and `sparse_col_indices[nnz]` place in a `shape` of two
    dimensions; every other cell is the pad value of whoever reads it, 0 unless told.
    """

    __slots__ = ("array", "dtype", "shape", "sparse_col_indices", "sparse_crow_indices")

    def __init__(
        self,
        data: Sequence[float] | NDArray[Any],
        dtype: TensorDtype,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        """ValueError if dtype, shape or indices do not fit the data."""
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: {dtype!r}; allowed are 'float32' and 'int64'")
        array: NDArray[Any] = np.ascontiguousarray(data, dtype=_DTYPES[dtype])
        if (sparse_crow_indices is None) != (sparse_col_indices is None):
            raise ValueError("sparse_crow_indices and sparse_col_indices come together")
        if sparse_crow_indices is not None:
            if shape is None or len(shape) != 2:
                raise ValueError("shape: a sparse tensor needs one of two dimensions")
        elif shape is not None:
            array = array.reshape(tuple(shape))
        self.dtype: TensorDtype = dtype
        self.array = array
        self.shape = list(array.shape) if shape is None else [int(size) for size in shape]
        self.sparse_crow_indices = _ints(sparse_crow_indices)
        self.sparse_col_indices = _ints(sparse_col_indices)

    @property
    def data(self) -> list[Any]:
        """The values, flat; of a sparse tensor only those that it holds."""
        return list(self.array.ravel().tolist())

    @classmethod
    def from_numpy(cls, array: NDArray[Any]) -> "TensorData":
        """Floats become float32; integers and booleans int64; ValueError for anything else."""
        return cls(array, _dtype_of(array), array.shape)

    @classmethod
    def from_torch(cls, tensor: "torch.Tensor") -> "TensorData":
        """A copy on the CPU, without its gradient."""
        import torch

        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bfloat16:  # numpy has no such type
            tensor = tensor.float()
        return cls.from_numpy(tensor.contiguous().numpy().copy())

    @classmethod
    def from_torch_sparse(cls, tensor: "torch.Tensor", pad_value: int = 0) -> "TensorData":
        """Sparse where that is smaller, else dense; cells equal to pad_value are left out."""
        dense = cls.from_torch(tensor)
        if dense.array.ndim != 2:
            return dense
        held = dense.array != pad_value
        num_held, num_rows = int(held.sum()), len(held)
        if num_rows + 1 + 2 * num_held >= held.size:
            return dense
        crow = np.concatenate([[0], np.cumsum(held.sum(axis=1))])
        cols = np.nonzero(held)[1]
        return cls(dense.array[held], dense.dtype, dense.shape, crow.tolist(), cols.tolist())

    def to_numpy(self, pad_value: int = 0) -> NDArray[Any]:
        """The dense array, which must not be written to; pad_value fills a sparse one."""
        if self.sparse_crow_indices is None or self.sparse_col_indices is None:
            return self.array
        dense = np.full(self.shape, pad_value, dtype=self.array.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.sparse_crow_indices))
        dense[rows, self.sparse_col_indices] = self.array
        return dense

    def to_torch(self, pad_value: int = 0) -> "torch.Tensor":
        """A dense copy as a torch tensor; ImportError without torch."""
        import torch

        return torch.from_numpy(self.to_numpy(pad_value).copy())

    def tolist(self) -> Any:
        """The dense values as nested lists."""
        return self.to_numpy().tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return (
            self.dtype == other.dtype
            and self.shape == other.shape
            and bool(np.array_equal(self.to_numpy(), other.to_numpy(), equal_nan=True))
        )

    __hash__ = None  # type: ignore[assignment]  # it holds an array

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape}, data={self.array!r})"


def _dtype_of(array: NDArray[Any]) -> TensorDtype:
    if array.dtype.kind == "f":
        return "float32"
    if array.dtype.kind in "iub":
        return "int64"
    raise ValueError(f"a tensor holds floats or integers, not {array.dtype}")


def _ints(values: Sequence[int] | None) -> list[int] | None:
    return None if values is None else [int(value) for value in values]
