"""Which jobs there are."""

from collections.abc import Callable
from datetime import datetime

import redis.asyncio as redis

from luthier_core.blobs import Blobs
from luthier_core.config import Config
from luthier_core.oplog import Oplog
from luthier_registry.counting import Counting
from luthier_registry.expiry import Expiry
from luthier_registry.jobs import Job, Jobs
from luthier_registry.lists import Lists
from luthier_registry.rebuild import Rebuild
from luthier_registry.storage import Storage
from luthier_registry.sweep import Sweep

SETTLE_S = 60.0
"""Rows agree with their records again this long after a crash, and LEFT_AFTER more."""
GENERATION_S = 1.0
"""A wiped Redis is noticed within this."""


def build_jobs(
    config: Config, blobs: Blobs, client: redis.Redis, *, clock: Callable[[], datetime]
) -> Jobs:
    """The jobs, in the order in which they are looked at."""
    settings = config.housekeeping
    counting = Counting(blobs, Oplog(client), config.model_names, clock=clock)
    rebuild = Rebuild(config, blobs, client, counting, clock=clock)
    return Jobs(
        client,
        {
            "generation": Job(GENERATION_S, rebuild.run_if_wiped),
            "rebuild-index": Job(None, rebuild.run),
            "lists": Job(SETTLE_S, Lists(blobs, client, clock=clock).settle),
            "usage": Job(settings.usage_s, counting.run),
            "storage": Job(settings.storage_s, Storage(blobs, client, clock=clock).run),
            "expiry": Job(settings.expiry_s, Expiry(blobs, client, clock=clock).run),
            "sweep": Job(
                settings.sweep_s, Sweep(blobs, client, clock=clock, trash_s=settings.trash_s).run
            ),
        },
        clock=clock,
    )
