"""What a worker makes of its engine's deaths: whom to blame, whom to give up, and a new engine."""

import asyncio
import logging
from collections import Counter

from luthier_core import metrics
from luthier_core.protocol import MAX_DEATHS, Left, blame_next, drive
from luthier_trainer.engine_client import EngineClient, EngineDied
from luthier_trainer.owned_run import OwnedRun

log = logging.getLogger(__name__)

START_PAUSES_S = (0.0, 1.0, 5.0, 25.0)
"""Before each try to start an engine; a worker that cannot ends, and others take its runs."""

GIVEN_UP = f"the run's state could not be rebuilt in {MAX_DEATHS} tries"


class EngineWatch:
    """The deaths of one worker's engines, and which runs were in the midst of something."""

    def __init__(self, engine: EngineClient) -> None:
        self.num_deaths = 0
        """What one engine knew is not known by the next."""
        self.is_up = True
        self._engine = engine
        self._suspects: set[str] = set()
        """Runs whose next op was under way when the engine died."""
        self._failed_rebuilds: Counter[str] = Counter()
        """Run -> how often the engine died, or had no memory, while its state was rebuilt."""

    async def died(self) -> None:
        """Returns once the engine has died; from then on it is not up."""
        await self._engine.died()
        self.num_deaths += 1
        metrics.ENGINE_DEATHS.inc()
        self.is_up = False

    async def start_anew(self) -> None:
        """Returns once there is an engine again; EngineDied or its complaint if there will not."""
        for pause_s in START_PAUSES_S[:-1]:
            await asyncio.sleep(pause_s)
            try:
                await self._engine.start()
                break
            except EngineDied as error:
                log.error("the engine did not start: %s", error)
        else:
            await asyncio.sleep(START_PAUSES_S[-1])
            await self._engine.start()
        self.is_up = True

    async def blame(self, run: OwnedRun, death: EngineDied) -> None:
        """Note of which op the engine died, if it was this run's; the run is to be left."""
        run.paused = True
        run_id, seq = run.tenure.run_id, run.owner.executed_to + 1
        if not (death.under_way and run.owner.under_way):
            return
        if run.owner.replaying:
            self.not_rebuilt(run_id)
            return
        await run.commits.join()
        try:
            num_deaths = await drive(blame_next(run.tenure), run.effects.perform)
        except Left as error:
            log.warning("nothing to blame: %s", error)
            return
        self._suspects.add(run_id)
        log.error("the engine died of seq %d of %s, time %d: %s", seq, run_id, num_deaths, death)

    def not_rebuilt(self, run_id: str) -> None:
        """The state of this run could not be rebuilt, which may be the run's fault."""
        self._failed_rebuilds[run_id] += 1

    def gives_up(self, run_id: str) -> bool:
        """Whether rebuilding this run has failed too often to be tried again."""
        return self._failed_rebuilds[run_id] >= MAX_DEATHS

    def suspects(self, run_id: str) -> bool:
        """Whether the next op of this run may be what killed the engine."""
        return run_id in self._suspects

    def acquit(self, run_id: str) -> None:
        """An op of this run has been executed that was not before."""
        self._suspects.discard(run_id)
        del self._failed_rebuilds[run_id]
