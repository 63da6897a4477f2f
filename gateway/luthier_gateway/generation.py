"""Nothing is taken or told while Redis is not the one that the object store knows."""

import asyncio
import logging

from aiohttp import web
from redis.exceptions import ResponseError

from luthier_core.blobs import Blobs
from luthier_core.errors import Unavailable
from luthier_core.generation import Generation
from luthier_core.oplog import REDIS_ERRORS, Oplog

log = logging.getLogger(__name__)

NOT_CONFIRMED = "the operation log was lost; runs are being brought back to their last snapshots"


class GenerationWatch:
    """What this process knows of the generation; the function library is loaded once it holds."""

    def __init__(self, oplog: Oplog, blobs: Blobs) -> None:
        self._oplog = oplog
        self._generation = Generation(oplog.redis, blobs)
        self._confirmed = False

    async def is_confirmed(self) -> bool:
        """As known, or looked up while it is not."""
        return self._confirmed or await self.still_holds()

    async def still_holds(self) -> bool:
        """Looked up now: something is not there, and that may be why."""
        holds = await self._generation.is_confirmed()
        if holds and not self._confirmed:
            await self._oplog.load_library()
        self._confirmed = holds
        return holds

    async def keep_looking(self, every_s: float) -> None:
        """Look again and again, for ever."""
        while True:
            try:
                await self.still_holds()
            except (Unavailable, ResponseError, *REDIS_ERRORS) as error:
                log.warning("cannot look at the generation: %r", error)
            await asyncio.sleep(every_s)


GENERATION = web.AppKey("generation", GenerationWatch)
