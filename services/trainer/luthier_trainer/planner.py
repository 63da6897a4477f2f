"""Pure: which waiting ops make up the next clock cycle.

Tenants are served in turn, by deficit round robin (Shreedhar and Varghese 1995) in tokens: in its
turn a tenant is given a quantum, spends what its ops cost, and keeps the rest while more of its ops
wait; one that has nothing to do loses it. Their runs alternate in a cycle, which ends early when
one has something new and has had less (see cycles.py). So neither many runs, nor deep queues, nor
large requests of one tenant make the others wait for more than one turn (reliability G13).

Of a tenant's runs the one served longest ago is next. A run's turn, its share, is its leading
forward and forward_backward ops and the op that ends them, so that an optimizer step runs in the
cycle of its gradients; a cycle has the shares of several runs, up to a budget of tokens, whose
passes the engine may share.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import itemgetter

from luthier_core.ops import Kind

MAX_OPS_PER_SHARE = 16
QUANTUM_TOKENS = 4096
"""Given to a tenant in its turn; about one micro-batch."""
MIN_OP_TOKENS = 64
"""What the smallest op costs: an optimizer step and a save have no tokens, but take time."""
BYTES_PER_TOKEN = 16
"""Of a forward_backward's body: 4 of the token, 8 of its target, 4 of each loss input."""

PASSES = frozenset({Kind.FORWARD, Kind.FORWARD_BACKWARD})


def estimated_tokens(kind: Kind, num_bytes: int) -> int:
    """What an op with a body of that size costs, known before the body has been read."""
    return max(MIN_OP_TOKENS, num_bytes // BYTES_PER_TOKEN if kind in PASSES else 0)


@dataclass(frozen=True, slots=True)
class Waiting:
    """One op that could be executed once those before it have been."""

    kind: Kind
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Head:
    """What waits at the head of one run, if anything does."""

    run_id: str
    tenant: str
    ops: tuple[Waiting, ...]
    last_cycle: int
    """The cycle that served this run last; -1 if none did."""


@dataclass(frozen=True, slots=True)
class Share:
    """The first waiting ops of a run, one after the other."""

    run_id: str
    tenant: str
    ops: tuple[Waiting, ...]

    @property
    def num_tokens(self) -> int:
        return sum(op.num_tokens for op in self.ops)

    def may_end_after(self, num_ops: int) -> bool:
        """Whether it can be cut there; not before its last op if that is no gradient's."""
        return num_ops < len(self.ops) - 1 or self.ops[-1].kind in PASSES


class Planner:
    """Remembers whose turn it is and what each tenant has left to spend."""

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens` of one cycle; a single op may have more."""
        self._max_tokens = max_tokens
        self._deficits: dict[str, int] = {}
        """Tokens left, of every tenant that has runs; the one served longest ago first."""
        self._in_turn = ""
        """Whose turn the last cycle cut off."""

    def plan(self, heads: Sequence[Head]) -> list[Share]:
        """The next cycle, in which no run is twice, and tenants alternate; empty if nothing waits.

        `heads` has every run, those with nothing waiting too: their tenants keep their place.
        """
        return _alternating(self._plan(heads))

    def _plan(self, heads: Sequence[Head]) -> list[Share]:
        waiting = _waiting_runs(heads)
        self._note_tenants(dict.fromkeys(head.tenant for head in heads), waiting)
        cycle: list[Share] = []
        room = self._max_tokens
        # Round after round until somebody can pay; in a cycle everybody has one turn at most, or
        # those with many runs would have more of them than those with one.
        while waiting and not cycle:
            for tenant in [tenant for tenant in self._deficits if tenant in waiting]:
                if tenant != self._in_turn:
                    self._deficits[tenant] += QUANTUM_TOKENS
                    self._in_turn = tenant
                runs, left_behind = waiting[tenant], 0
                while runs and (first := runs[0].ops[0].num_tokens) <= self._deficits[tenant]:
                    if cycle and first > room:
                        return cycle
                    head = runs.pop(0)
                    share = _share_of(head, min(room, self._deficits[tenant]))
                    left_behind += len(head.ops) - len(share.ops)
                    self._deficits[tenant] -= share.num_tokens
                    room -= share.num_tokens
                    cycle.append(share)
                self._end_turn(tenant, cannot_pay=bool(runs), has_more=left_behind > 0)
        return cycle

    def give_back(self, share: Share, num_ops: int) -> None:
        """Only the first `num_ops` of a share have been carried out: another goes first now."""
        unspent = sum(op.num_tokens for op in share.ops[num_ops:])
        if unspent and share.tenant in self._deficits:
            left = self._deficits.pop(share.tenant) + unspent
            self._deficits[share.tenant] = min(left, QUANTUM_TOKENS)

    def _note_tenants(self, known: Collection[str], waiting: Collection[str]) -> None:
        """A tenant that is new was never served; one that has become idle loses what it had."""
        kept = {
            tenant: left if tenant in waiting else min(left, 0)
            for tenant, left in self._deficits.items()
            if tenant in known
        }
        self._deficits = {tenant: 0 for tenant in known if tenant not in kept} | kept
        if self._in_turn not in waiting:
            self._in_turn = ""

    def _end_turn(self, tenant: str, *, cannot_pay: bool, has_more: bool) -> None:
        """To the back of the line. Who could spend no more keeps a quantum, or nothing if idle."""
        left = self._deficits.pop(tenant)
        most = left if cannot_pay else QUANTUM_TOKENS if has_more else 0
        self._deficits[tenant] = min(left, most)
        self._in_turn = ""


def _waiting_runs(heads: Sequence[Head]) -> dict[str, list[Head]]:
    """Tenant -> its runs that have something waiting, the one served longest ago first."""
    waiting: dict[str, list[Head]] = {}
    for head in sorted(heads, key=lambda head: head.last_cycle):
        if head.ops:
            waiting.setdefault(head.tenant, []).append(head)
    return waiting


def _alternating(shares: Sequence[Share]) -> list[Share]:
    """The first share of each tenant, then the second of each that has one, and so on."""
    so_far: Counter[str] = Counter()
    rounds = []
    for share in shares:
        rounds.append(so_far[share.tenant])
        so_far[share.tenant] += 1
    return [share for _, share in sorted(zip(rounds, shares, strict=True), key=itemgetter(0))]


def _share_of(head: Head, max_tokens: int) -> Share:
    """As many passes as may be, at least one, and the op that ends them; or one other op."""
    num_tokens = 0
    for index, op in enumerate(head.ops[:MAX_OPS_PER_SHARE]):
        if op.kind not in PASSES:
            return Share(head.run_id, head.tenant, head.ops[: index + 1])
        num_tokens += op.num_tokens
        if index and num_tokens > max_tokens:
            return Share(head.run_id, head.tenant, head.ops[:index])
    return Share(head.run_id, head.tenant, head.ops[:MAX_OPS_PER_SHARE])
