"""Pure: which waiting ops make up the next clock cycle.

A cycle is one share: of the tenant served longest ago that has something waiting, of its runs the
one served longest ago, the leading forward and forward_backward ops and the op that ends them, so
that an optimizer step runs in the cycle of its gradients. While another tenant waits a share is cut
short. So neither many runs nor deep queues of one tenant keep the others waiting (reliability G13).
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
    """The first waiting ops of a run, one after the other."""

    run_id: str
    tenant: str
    kinds: tuple[Kind, ...]

    def may_end_after(self, num_ops: int) -> bool:
        """Whether it can be cut there; not before its last op if that is no gradient's."""
        return num_ops < len(self.kinds) - 1 or self.kinds[-1] in _GOES_ON


def plan(heads: Sequence[Head]) -> Share | None:
    """The next cycle; None if nothing waits.

    `heads` has every run, those with nothing waiting too: they say when their tenant was served.
    """
    served: dict[str, int] = {}
    for head in heads:
        served[head.tenant] = max(served.get(head.tenant, -1), head.last_cycle)
    waiting = [head for head in heads if head.kinds]
    if not waiting:
        return None
    chosen = min(waiting, key=lambda head: (served[head.tenant], head.last_cycle))
    return Share(chosen.run_id, chosen.tenant, _share_of(chosen.kinds))


def _share_of(kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    for index, kind in enumerate(kinds[:MAX_OPS_PER_SHARE]):
        if kind not in _GOES_ON:
            return kinds[: index + 1]
    return kinds[:MAX_OPS_PER_SHARE]
