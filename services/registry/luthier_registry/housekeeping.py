"""Which jobs there are."""

from collections.abc import Callable
from datetime import datetime

import redis.asyncio as redis

from luthier_core.blobs import Blobs
from luthier_core.config import Config
from luthier_core.oplog import Oplog
from luthier_registry.archives import Archives
from luthier_registry.counting import Counting
from luthier_registry.expiry import Expiry
from luthier_registry.jobs import Job, Jobs
from luthier_registry.lists import Lists
from luthier_registry.rebuild import Rebuild
from luthier_registry.retention import Retention
from luthier_registry.storage import Storage
from luthier_registry.sweep import Sweep

SETTLE_S = 60.0
"""Rows agree with their records again this long after a crash, and LEFT_AFTER more."""
ARCHIVES_S = 1.0
"""Who asks for an archive waits so long at most before it is begun."""
GENERATION_S = 1.0
"""A Redis that was wiped or restarted is noticed within this."""


def build_jobs(
    config: Config, blobs: Blobs, client: redis.Redis, *, clock: Callable[[], datetime]
) -> Jobs:
    """The jobs, in the order in which they are looked at."""
    settings = config.housekeeping
    counting = Counting(blobs, Oplog(client), config.model_names, clock=clock)
    rebuild = Rebuild(config, blobs, client, counting, clock=clock)
    lists = Lists(blobs, client, clock=clock)
    retention = Retention(blobs, client, lists, default=settings.keep_last, clock=clock)
    return Jobs(
        client,
        {
            "generation": Job(GENERATION_S, rebuild.run_if_restarted),
            "rebuild-index": Job(None, rebuild.run),
            "archives": Job(ARCHIVES_S, Archives(blobs, client, clock=clock).run),
            "lists": Job(SETTLE_S, lists.settle),
            "usage": Job(settings.usage_s, counting.run),
            "storage": Job(settings.storage_s, Storage(blobs, client, clock=clock).run),
            "keep-last": Job(settings.keep_last_s, retention.run),
            "expiry": Job(settings.expiry_s, Expiry(blobs, client, clock=clock).run),
            "sweep": Job(
                settings.sweep_s, Sweep(blobs, client, clock=clock, trash_s=settings.trash_s).run
            ),
        },
        clock=clock,
    )
