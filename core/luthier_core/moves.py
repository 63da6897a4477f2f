"""Runs that are to have another trainer, and trainers that are to have none.

An operator's wish is a field in Redis. The owner sees it at its next look, commits what it has
executed, stores the run's state, and marks the wish as settled; then the new owner takes the run
over as it takes over one whose owner has died, but has nothing to replay. Whoever has the run when
the wish is granted forgets it. A wish for a trainer that is not alive holds nothing up.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

import redis.asyncio as redis

from luthier_core import keys

_SETTLED = " settled"


@dataclass(frozen=True, slots=True)
class Wishes:
    """Of one base model, at one moment."""

    targets: dict[str, str] = field(default_factory=dict)
    """Run -> the trainer that is to have it."""
    settled: frozenset[str] = frozenset()
    """Runs that their owners have let go of."""
    drained: frozenset[str] = frozenset()
    """Trainers that are to have no runs."""

    def candidates(self, trainers: Collection[str]) -> list[str]:
        """Who may take a run; all of them if all are drained."""
        return [name for name in trainers if name not in self.drained] or list(trainers)

    def target_of(self, run_id: str, trainers: Collection[str]) -> str:
        """The live trainer that is to have this run; empty if it is anybody's."""
        target = self.targets.get(run_id, "")
        return target if target in trainers else ""


class Moves:
    """The wishes in Redis."""

    def __init__(self, client: redis.Redis, base_model: str) -> None:
        self._redis = client
        self._moves = keys.run_moves(base_model)
        self._drained = keys.drained_trainers(base_model)

    async def read(self) -> Wishes:
        pipe = self._redis.pipeline(transaction=False)
        pipe.hgetall(self._moves)
        pipe.smembers(self._drained)
        moves, drained = await pipe.execute()
        wanted = {run_id.decode(): wish.decode() for run_id, wish in moves.items()}
        return Wishes(
            {run_id: wish.removesuffix(_SETTLED) for run_id, wish in wanted.items()},
            frozenset(run_id for run_id, wish in wanted.items() if wish.endswith(_SETTLED)),
            frozenset(name.decode() for name in drained),
        )

    async def ask(self, run_id: str, target: str) -> None:
        """The run's owner is to let go of it, in favour of `target`."""
        await self._do(self._redis.hset(self._moves, run_id, target))

    async def settle(self, run_id: str, target: str) -> None:
        """The owner has let go."""
        await self._do(self._redis.hset(self._moves, run_id, target + _SETTLED))

    async def forget(self, run_id: str) -> None:
        """The wish is granted, or nobody's any more."""
        await self._do(self._redis.hdel(self._moves, run_id))

    async def drain(self, trainer: str) -> None:
        """All its runs are to go elsewhere, and no new ones to come."""
        await self._do(self._redis.sadd(self._drained, trainer))

    async def undrain(self, trainer: str) -> None:
        await self._do(self._redis.srem(self._drained, trainer))

    async def _do(self, call: Any) -> None:
        await cast(Any, call)
