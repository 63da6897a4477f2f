"""Pure: which waiting ops make up the next clock cycle.

Each tenant that has something waiting gets one share: of its runs the one served longest ago, with
its leading forward and forward_backward ops and the op that ends them, so that an optimizer step
runs in the cycle of its gradients. The tenant served longest ago comes first. So neither many runs
nor a deep queue of one tenant keeps the others waiting: reliability G13.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from luthier_core.ops import Kind

MAX_OPS_PER_SHARE = 16
_GOES_ON = frozenset({Kind.FORWARD, Kind.FORWARD_BACKWARD})


@dataclass(frozen=True, slots=True)
class Head:
    """What waits at the head of one run, if anything does."""

    run_id: str
    tenant: str
    kinds: tuple[Kind, ...]
    last_cycle: int
    """The cycle that served this run last; -1 if none did."""


@dataclass(frozen=True, slots=True)
class Share:
    """The first `num_ops` waiting ops of a run, one after the other."""

    run_id: str
    num_ops: int


def plan(heads: Sequence[Head]) -> list[Share]:
    """The shares of the next cycle, in the order in which they run.

    `heads` has every run, those with nothing waiting too: they say when their tenant was served.
    """
    served: dict[str, int] = {}
    for head in heads:
        served[head.tenant] = max(served.get(head.tenant, -1), head.last_cycle)
    turns: dict[str, Head] = {}
    for head in sorted(heads, key=lambda head: head.last_cycle):
        if head.kinds:
            turns.setdefault(head.tenant, head)
    in_order = sorted(turns.values(), key=lambda head: served[head.tenant])
    return [Share(head.run_id, _share_of(head.kinds)) for head in in_order]


def _share_of(kinds: tuple[Kind, ...]) -> int:
    for index, kind in enumerate(kinds[:MAX_OPS_PER_SHARE]):
        if kind not in _GOES_ON:
            return index + 1
    return min(len(kinds), MAX_OPS_PER_SHARE)
