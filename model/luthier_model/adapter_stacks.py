"""AdapterStacks: the adapters that a sampler runs, their factors side by side for batched products.

One product for all adapters of a step instead of one for each: there a launch, and on a CPU the way
into the matrix library, takes longer than the product of a few rows.

Dimensions: S slots of a stack, N of them in a batch, D features in, E features out, R rank, filled
up with zeros to a multiple of RANK_MULTIPLE.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier_model.adapted_linear import StackedDeltas
from luthier_model.lora import LoraAdapter, Segment
from luthier_model.products import ROW_MULTIPLE, round_up

RANK_MULTIPLE = 16
MAX_SHORT_ROWS = 16
"""Segments up to here are filled up to the longest of a batch; a longer one is a batch alone."""
MAX_STACKS = 8
"""Beyond those of the current forward, the ones longest unused are given up."""

_Kind = tuple[int, tuple[str, ...]]
"""Rank and modules: adapters that can share a stack."""


class AdapterStacks:
    """A stack for each kind of adapter. What a forward needs is moved into them as it comes.

    An adapter in a stack is not copied: its factors are views of its slot, until another adapter
    needs the slot. So its tensors must not be an optimizer's.
    """

    def __init__(self) -> None:
        self._stacks: dict[_Kind, _Stack] = {}
        """Longest unused first."""

    def deltas(self, segments: Sequence[Segment]) -> list[StackedDeltas]:
        """The deltas of these rows, in as few batches as their kinds, lengths and slots allow."""
        by_kind: dict[_Kind, list[LoraAdapter]] = {}
        for segment in segments:
            if segment.adapter is not None:
                by_kind.setdefault(_kind(segment.adapter), []).append(segment.adapter)
        for kind, adapters in by_kind.items():
            self._stacks[kind] = stack = self._stacks.pop(kind, None) or _Stack(adapters[0])
            stack.place(adapters)
        for kind in list(self._stacks)[: max(0, len(self._stacks) - max(MAX_STACKS, len(by_kind)))]:
            self._stacks.pop(kind).give_up()
        return [batch for run in _runs(segments) for batch in self._batches(run)]

    def _batches(self, run: Sequence[Segment]) -> Iterator[StackedDeltas]:
        assert run[0].adapter is not None
        stack = self._stacks[_kind(run[0].adapter)]
        slots = [stack.slot(segment) for segment in run]
        if max(slots) - min(slots) < 2 * len(run):
            yield stack.batch(run, slots)
            return
        # The slots between would take longer than it saves.
        for segment, slot in zip(run, slots, strict=True):
            yield stack.batch([segment], [slot])


class _Stack:
    """Factors [S, D, R] and [S, R, E] of each module that adapters of this kind are on."""

    def __init__(self, adapter: LoraAdapter) -> None:
        """Room for adapters like this one."""
        self._scale = adapter.scale
        self._device = next(iter(adapter.pairs.values())).a.device
        self._owners: list[LoraAdapter | None] = []
        self._slots: dict[int, int] = {}
        """id of each owner -> its slot."""
        rank = round_up(adapter.spec.rank, RANK_MULTIPLE)
        self._factors = {
            name: (
                pair.a.new_empty(0, pair.a.shape[1], rank),
                pair.b.new_empty(0, rank, len(pair.b)),
            )
            for name, pair in adapter.pairs.items()
            if pair.a.dim() == 2  # those on experts have a product for each expert
        }

    def slot(self, segment: Segment) -> int:
        return self._slots[id(segment.adapter)]

    def place(self, adapters: Sequence[LoraAdapter]) -> None:
        """Each gets a slot, the lowest of those that none of them has."""
        wanted = {id(adapter): adapter for adapter in adapters}
        self._grow(len(wanted))
        free = (slot for slot, owner in enumerate(self._owners) if id(owner) not in wanted)
        for key, adapter in wanted.items():
            if key not in self._slots:
                self._put(next(free), adapter)

    def give_up(self) -> None:
        for slot in range(len(self._owners)):
            self._move_out(slot)

    def batch(self, segments: Sequence[Segment], slots: Sequence[int]) -> StackedDeltas:
        """Of segments that lie end to end."""
        first, num_slots = min(slots), max(slots) - min(slots) + 1
        rows = slice(segments[0].start, segments[-1].stop)
        lengths = np.array([segment.stop - segment.start for segment in segments])
        length = int(lengths.max())
        gathered = places = None
        is_long = length > MAX_SHORT_ROWS
        in_order = list(slots) == list(range(first, first + num_slots))
        if not (is_long or (in_order and (lengths == length).all() and not length % ROW_MULTIPLE)):
            length = round_up(length, ROW_MULTIPLE)
            starts = (np.array(slots) - first) * length
            places = np.concatenate(
                [s + np.arange(n) for s, n in zip(starts, lengths, strict=True)]
            )
            # Any row will do as a filler: what comes of it is dropped.
            gathered = np.full(num_slots * length, rows.start)
            gathered[places] = np.arange(rows.start, rows.stop)
        return StackedDeltas(
            rows=rows,
            factors=self._factors,
            slots=slice(first, first + num_slots),
            scale=self._scale,
            gathered=self._indices(gathered),
            places=self._indices(places),
        )

    def _indices(self, numbers: NDArray[np.int64] | None) -> Tensor | None:
        return None if numbers is None else torch.from_numpy(numbers).to(self._device)

    def _grow(self, num_slots: int) -> None:
        """At least double the slots if these are more."""
        if num_slots <= len(self._owners):
            return
        num_new = max(num_slots - len(self._owners), len(self._owners))
        for name, (a_SDR, b_SRE) in self._factors.items():
            self._factors[name] = _with_slots(a_SDR, num_new), _with_slots(b_SRE, num_new)
            for slot, owner in enumerate(self._owners):
                if owner is not None:
                    self._point(owner, slot, name)
        self._owners += [None] * num_new

    def _put(self, slot: int, adapter: LoraAdapter) -> None:
        self._move_out(slot)
        rank = adapter.spec.rank
        for name, (a_SDR, b_SRE) in self._factors.items():
            a_SDR[slot, :, :rank] = adapter.pairs[name].a.T
            b_SRE[slot, :rank] = adapter.pairs[name].b.T
            self._point(adapter, slot, name)
        self._owners[slot], self._slots[id(adapter)] = adapter, slot

    def _point(self, adapter: LoraAdapter, slot: int, name: str) -> None:
        """Let the adapter's factors be views of its slot."""
        (a_SDR, b_SRE), rank = self._factors[name], adapter.spec.rank
        pair = adapter.pairs[name]
        pair.a, pair.b = a_SDR[slot, :, :rank].T, b_SRE[slot, :rank].T

    def _move_out(self, slot: int) -> None:
        owner = self._owners[slot]
        if owner is None:
            return
        for name in self._factors:
            pair = owner.pairs[name]
            pair.a, pair.b = pair.a.clone(), pair.b.clone()
        self._owners[slot] = None
        del self._slots[id(owner)]


def _kind(adapter: LoraAdapter) -> _Kind:
    return adapter.spec.rank, tuple(adapter.pairs)


def _runs(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """What can be one batch: short segments end to end, of different adapters of one kind."""
    run: list[Segment] = []
    for segment in segments:
        if run and not _joins(segment, run):
            yield run
            run = []
        if segment.adapter is not None:
            run.append(segment)
    if run:
        yield run


def _joins(segment: Segment, run: Sequence[Segment]) -> bool:
    adapter, last = segment.adapter, run[-1]
    return (
        adapter is not None
        and last.adapter is not None
        and max(segment.stop - segment.start, last.stop - last.start) <= MAX_SHORT_ROWS
        and _kind(adapter) == _kind(last.adapter)
        and all(other.adapter is not adapter for other in run)
    )


def _with_slots(factors: Tensor, num_new: int) -> Tensor:
    return torch.cat([factors, factors.new_zeros(num_new, *factors.shape[1:])])
