"""The housekeeping jobs as Celery tasks, for deployments whose registry is not to do them itself.

Celery carries hints only: every job looks at the whole state (jobs.py), so one that is lost, late
or delivered twice changes nothing. JSON alone is accepted; a task is acknowledged once it is done.
"""

import asyncio
from datetime import UTC, datetime
from typing import Any

from celery import Celery

from luthier_core.blobs import open_blobs
from luthier_core.config import Config
from luthier_core.oplog import connect
from luthier_registry.housekeeping import ARCHIVES_S, GENERATION_S, SETTLE_S, build_jobs

TASK = "luthier.job"
ACCEPT = ["json"]
"""Nothing that can carry code (reliability S6)."""
MAX_JOB_S = 3600
"""A job that takes longer is killed and done again."""


def make_app(config: Config) -> Celery:
    """The application: one task, and a beat that sends it for each job in its time."""
    app = Celery("luthier", broker=config.side_redis_url().replace("unix://", "redis+socket://"))
    app.conf.update(
        accept_content=ACCEPT,
        task_serializer="json",
        result_serializer="json",
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_time_limit=MAX_JOB_S,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        # Longer than any job: Redis would deliver one that still runs a second time.
        broker_transport_options={"visibility_timeout": 2 * MAX_JOB_S},
        beat_schedule={
            name: {
                "task": TASK,
                "schedule": every_s,
                "args": [name],
                # A worker that was away finds one message per job, not one per turn missed.
                "options": {"expires": max(every_s, 1.0)},
            }
            for name, every_s in _schedule(config).items()
        },
    )

    @app.task(name=TASK)  # type: ignore[untyped-decorator]
    def run(name: str) -> None:
        asyncio.run(run_job(config, name))

    return app


async def run_job(config: Config, name: str) -> dict[str, Any]:
    """Run one job with connections of its own; what it did."""
    async with connect(config.redis_url) as client, open_blobs(config) as blobs:
        return await build_jobs(config, blobs, client, clock=lambda: datetime.now(UTC)).run(name)


def _schedule(config: Config) -> dict[str, float]:
    settings = config.housekeeping
    return {
        "generation": GENERATION_S,
        "archives": ARCHIVES_S,
        "lists": SETTLE_S,
        "usage": settings.usage_s,
        "storage": settings.storage_s,
        "keep-last": settings.keep_last_s,
        "expiry": settings.expiry_s,
        "sweep": settings.sweep_s,
    }
