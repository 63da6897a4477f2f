"""Pure: which waiting ops make up the next clock cycle.

Each run that has something waiting gets one share: its leading forward and forward_backward ops
and the op that ends them, so that an optimizer step runs in the cycle of its gradients. The run
served longest ago comes first, so that one with a deep queue does not keep the others waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from luthier_core.ops import Kind

MAX_OPS_PER_SHARE = 16
_GOES_ON = frozenset({Kind.FORWARD, Kind.FORWARD_BACKWARD})


@dataclass(frozen=True, slots=True)
class Head:
    """What waits at the head of one run."""

    run_id: str
    kinds: tuple[Kind, ...]
    last_cycle: int
    """The cycle that served this run last; -1 if none did."""


@dataclass(frozen=True, slots=True)
class Share:
    """The first `num_ops` waiting ops of a run, one after the other."""

    run_id: str
    num_ops: int


def plan(heads: Sequence[Head]) -> list[Share]:
    """The shares of the next cycle, in the order in which they run."""
    waiting = sorted((head for head in heads if head.kinds), key=lambda head: head.last_cycle)
    return [Share(head.run_id, _share_of(head.kinds)) for head in waiting]


def _share_of(kinds: tuple[Kind, ...]) -> int:
    for index, kind in enumerate(kinds[:MAX_OPS_PER_SHARE]):
        if kind not in _GOES_ON:
            return index + 1
    return min(len(kinds), MAX_OPS_PER_SHARE)
