"""Checks a safetensors file before anything loads it (reliability S7).

The format: 8 bytes little-endian N, N bytes of JSON, then the tensors' bytes one after the other.
Source: the format's description in the safetensors repository.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier_core.errors import InvalidField

MAX_HEADER_BYTES = 1024 * 1024
MAX_TENSORS = 10_000
MAX_DIMS = 8
_LENGTH_BYTES = 8
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
FLOATS = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file, without its bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Of its bytes, in the file."""
    end: int


def read_header(data: bytes, file: str) -> dict[str, TensorInfo]:
    """What the file says that it holds; InvalidField if that is not exactly what it can hold.

    Offsets must be whole and leave no gap, overlap nothing and end with the file; so no two names
    share bytes, and nothing is hidden between them.
    """
    begin = _header_end(data, len(data), file)
    return _tensors(data[:begin], len(data), file)


class PassingCheck:
    """Checks a file while its bytes pass by: as read_header does, and that all are finite floats.

    It holds the header and one piece. `check` is given the tensors before any of their bytes count.
    """

    def __init__(
        self, file: str, num_bytes: int, check: Callable[[Mapping[str, TensorInfo]], None]
    ) -> None:
        self._file = file
        self._num_bytes = num_bytes
        self._check = check
        self._num_passed = 0
        self._rest = b""
        """Of the header, then of a value: what has come and is not a whole one yet."""
        self._todo: deque[tuple[str, TensorInfo]] | None = None
        self._at = 0

    def feed(self, piece: bytes) -> None:
        """The next bytes; InvalidField as soon as it is sure that the file is none of ours."""
        self._num_passed += len(piece)
        data = self._rest + piece
        if self._todo is None:
            if len(data) < _LENGTH_BYTES:
                self._rest = data
                return
            begin = _header_end(data, self._num_bytes, self._file)
            if len(data) < begin:
                self._rest = data
                return
            tensors = _tensors(data[:begin], self._num_bytes, self._file)
            self._check(tensors)
            self._todo = deque(sorted(tensors.items(), key=lambda item: item[1].start))
            self._at, data = begin, data[begin:]
        self._rest = self._check_values(memoryview(data), self._todo)

    def end(self) -> None:
        """InvalidField unless the whole file has come."""
        if self._num_passed != self._num_bytes or self._todo is None or self._todo:
            raise InvalidField(
                f"{self._file}: {self._num_passed} bytes came instead of {self._num_bytes}"
            )

    def _check_values(self, data: memoryview, todo: deque[tuple[str, TensorInfo]]) -> bytes:
        """What is left of `data`: the beginning of a value."""
        while todo:
            name, tensor = todo[0]
            size = min(tensor.end - self._at, len(data))
            size -= size % _ITEM_BYTES[tensor.dtype]
            _check_values(name, tensor.dtype, data[:size], self._file)
            self._at, data = self._at + size, data[size:]
            if self._at < tensor.end:
                break
            todo.popleft()
        return bytes(data)


def _header_end(data: bytes, num_bytes: int, file: str) -> int:
    """Where the tensors begin, in a file of so many bytes that begins with `data`."""
    num_header = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < _LENGTH_BYTES or num_header > min(MAX_HEADER_BYTES, num_bytes - _LENGTH_BYTES):
        raise InvalidField(f"{file}: a header of {num_header} bytes in {num_bytes}")
    return _LENGTH_BYTES + num_header


def _tensors(head: bytes, num_bytes: int, file: str) -> dict[str, TensorInfo]:
    begin = len(head)
    entries = _entries(head[_LENGTH_BYTES:], file)
    tensors = {name: _tensor(name, entry, begin, file) for name, entry in entries.items()}
    _check_layout(tensors, begin, num_bytes, file)
    return tensors


def _check_layout(tensors: Mapping[str, TensorInfo], begin: int, num_bytes: int, file: str) -> None:
    at = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start != at:
            raise InvalidField(f"{file}: tensor {name!r} begins at {tensor.start}, not at {at}")
        at = tensor.end
    if at != num_bytes:
        raise InvalidField(f"{file}: its tensors end at {at} of {num_bytes} bytes")


def _check_values(name: str, dtype: str, data: memoryview, file: str) -> None:
    if dtype not in FLOATS:
        raise InvalidField(f"{file}: tensor {name!r} is {dtype}, not one of {sorted(FLOATS)}")
    if not _is_finite(data, dtype):
        raise InvalidField(f"{file}: tensor {name!r} has a value that is not finite")


def _is_finite(data: memoryview, dtype: str) -> bool:
    if dtype == "BF16":  # all exponent bits set: numpy has no such type
        bits = np.frombuffer(data, "<u2")
        return not bool(((bits & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype])).all())


def _entries(header: bytes, file: str) -> dict[str, Any]:
    try:
        entries = json.loads(header, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidField(f"{file}: damaged header: {str(error)[:200]}") from None
    if not isinstance(entries, dict) or len(entries) > MAX_TENSORS:
        raise InvalidField(f"{file}: its header is no object of at most {MAX_TENSORS} tensors")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidField(f"{file}: __metadata__ must hold strings only")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may take different ones of two equal keys: what was checked is then not used."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _tensor(name: str, entry: Any, begin: int, file: str) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidField(f"{file}: tensor {name[:200]!r} must have dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise InvalidField(f"{file}: tensor {name[:200]!r} has dtype {str(dtype)[:50]!r}")
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise InvalidField(f"{file}: tensor {name[:200]!r} has shape {str(shape)[:100]}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise InvalidField(f"{file}: tensor {name[:200]!r} has offsets {str(offsets)[:100]}")
    _check_size(name, dtype, shape, offsets, file)
    return TensorInfo(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _check_size(name: str, dtype: str, shape: list[int], offsets: list[int], file: str) -> None:
    num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]  # exact: these integers do not overflow
    if num_bytes == 0 or offsets[1] - offsets[0] != num_bytes:
        raise InvalidField(
            f"{file}: tensor {name[:200]!r} of {dtype}{shape} needs {num_bytes} bytes, at least 1; "
            f"its offsets are {offsets}"
        )


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        for value in values
    )
