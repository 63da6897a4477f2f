"""The toy model that is trained: a state that any missing, doubled or reordered op changes.

The weights are a hash over the optimizer steps, the gradient one over the forward_backwards since
the last of them. The workers and the oracle both use it; only the workers can go wrong with it.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b

from luthier_core.ops import INLINE_LIMIT, Kind, digest_of


def _hash(*parts: str) -> str:
    return blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class ToyOp:
    """One request of a client's program."""

    run_id: str
    seq: int
    kind: Kind
    ends: str = "completes"
    """completes | fails: the engine refuses it | kills: it is the engine's death"""
    problem: str | None = None
    """Why the gateway refuses it."""
    large: bool = False
    """Its body does not fit into Redis."""
    large_result: bool = False

    @cached_property
    def body(self) -> bytes:
        fields = {"seq": self.seq, "kind": self.kind, "ends": self.ends}
        fields |= {"large_result": self.large_result}
        return json.dumps(fields | {"pad": "x" * (INLINE_LIMIT if self.large else 0)}).encode()

    @cached_property
    def digest(self) -> str:
        return digest_of(self.body)


@dataclass(frozen=True, slots=True)
class State:
    """The state of one run."""

    weights: str = ""
    gradient: str = ""
    num_steps: int = 0

    @property
    def digest(self) -> str:
        return _hash(self.weights, self.gradient, str(self.num_steps))

    def applied(self, kind: Kind, op_digest: str) -> "State":
        """The state after an op that completes."""
        match kind:
            case Kind.CREATE_MODEL:
                return State(weights=_hash("new", op_digest))
            case Kind.FORWARD_BACKWARD:
                return replace(self, gradient=_hash(self.gradient, op_digest))
            case Kind.OPTIM_STEP:
                weights = _hash(self.weights, self.gradient, op_digest)
                return State(weights, "", self.num_steps + 1)
        return self

    def result(self, op_digest: str, *, large: bool) -> bytes:
        """What the client gets: it names the state after the op, and the op."""
        pad = "y" * (INLINE_LIMIT if large else 0)
        return f"{self.digest} {_hash(op_digest)}{pad}".encode()

    def without_gradient(self) -> "State":
        return replace(self, gradient="")


@dataclass(frozen=True, slots=True)
class BodyFields:
    ends: str
    large_result: bool


def body_fields(body: bytes) -> BodyFields:
    """What the engine reads in an op's body."""
    fields = json.loads(body)
    return BodyFields(fields["ends"], fields["large_result"])
