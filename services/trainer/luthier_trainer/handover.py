"""Runs that an operator wants at another trainer: settled here, one at a time, then let go of."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from luthier_core.moves import Moves, Wishes
from luthier_core.oplog import REDIS_ERRORS
from luthier_trainer.engine_client import EngineDied
from luthier_trainer.owned_run import OwnedRun

log = logging.getLogger(__name__)


class HandingOver:
    """The wishes that concern one worker, as they were when it last looked."""

    def __init__(
        self,
        name: str,
        moves: Moves,
        *,
        cycling: asyncio.Lock,
        forget: Callable[[OwnedRun], Awaitable[None]],
    ) -> None:
        """`cycling`: held while an op is executed; `forget` drops a run's state here."""
        self.wishes = Wishes()
        self._name = name
        self._moves = moves
        self._cycling = cycling
        self._forget = forget
        self._leaving: asyncio.Queue[tuple[OwnedRun, str]] = asyncio.Queue()

    async def look(self) -> bool:
        """Read the wishes; whether some of them may concern this worker's own runs."""
        self.wishes = await self._moves.read()
        return bool(self.wishes.targets) or self._name in self.wishes.drained

    async def heed(
        self, runs: Iterable[OwnedRun], trainers: list[str], rank: Callable[[str, str], bytes]
    ) -> None:
        """Have every one of these runs handed over that is wanted elsewhere."""
        wishes = self.wishes
        others = [name for name in wishes.candidates(trainers) if name != self._name]
        for run in list(runs):
            run_id = run.tenure.run_id
            target = wishes.target_of(run_id, trainers)
            if self._name in wishes.drained and others and not target:
                target = max(others, key=lambda name: rank(run_id, name))
            if target == self._name:
                await self._moves.forget(run_id)
            elif target and not run.paused:
                run.paused = True
                self._leaving.put_nowait((run, target))

    async def granted(self, run_id: str) -> None:
        """This worker has taken the run over."""
        if run_id in self.wishes.targets:
            await self._moves.forget(run_id)

    async def run(self) -> None:
        """Settle runs and let them go, for ever."""
        while True:
            run, target = await self._leaving.get()
            run_id = run.tenure.run_id
            try:
                async with self._cycling:  # no step of it is under way
                    await run.settle()
                await self._moves.settle(run_id, target)
                log.info("handing %s over to %s", run_id, target)
                await self._forget(run)
            except (EngineDied, *REDIS_ERRORS) as error:
                log.warning("%s stays: %s", run_id, error)
                run.paused = False
