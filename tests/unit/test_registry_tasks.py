"""Housekeeping by Celery: a real worker with its beat, a real broker."""

import asyncio
import contextlib
import io
import os
import sys
import tarfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from tests.unit.registry_stack import Stack, serving
from tests.unit.test_registry_housekeeping import committed

from luthier_core import keys
from luthier_core.config import Config, HousekeepingConfig, dump_config
from luthier_core.registry_client import RegistryClient
from luthier_registry.tasks import TASK, make_app


@contextlib.asynccontextmanager
async def working(config: Config, folder: Path) -> AsyncIterator[None]:
    """A worker with its beat, which keeps no file and drains at SIGTERM."""
    scratch = folder / "tmp"
    scratch.mkdir()
    path = folder / "config.toml"
    path.write_text(dump_config(config))
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "luthier_registry.tasks", "--config", str(path)),
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    try:
        yield
        assert list(scratch.iterdir()) == []
    finally:
        worker.terminate()
        await worker.wait()
    assert worker.returncode == 0


def test_only_json_is_accepted_and_a_task_is_acknowledged_when_it_is_done(stack: Stack) -> None:
    conf = make_app(stack.config).conf
    assert (conf.accept_content, conf.task_serializer) == (["json"], "json")
    assert conf.task_acks_late
    jobs = {"generation", "archives", "lists", "usage", "storage", "keep-last", "expiry", "sweep"}
    assert set(conf.beat_schedule) == jobs


async def test_a_worker_runs_the_jobs_and_a_doubled_one_changes_nothing(
    stack: Stack, tmp_path: Path
) -> None:
    run = await stack.run()
    await committed(stack, run, 2)
    config = replace(stack.config, housekeeping=HousekeepingConfig(runner="celery", usage_s=0.2))
    app = make_app(config)
    for _ in range(3):
        await asyncio.to_thread(app.send_task, TASK, ["usage"])
    app.close()
    async with working(config, tmp_path), asyncio.timeout(60):
        while not (await stack.valkey.hexists("jobs", "usage")):
            await asyncio.sleep(0.05)
    hours = [key async for key in stack.valkey.scan_iter("*:usage:*")]
    (counted,) = [await stack.valkey.hvals(hour) for hour in hours]
    assert [int(value) for value in counted] == [20]


async def test_a_worker_makes_the_archive_that_a_call_waits_for(
    stack: Stack, tmp_path: Path
) -> None:
    run = await stack.run()
    record = await stack.save(run, files={"adapter_config.json": b"{}", "moments": b"x"})
    config = replace(
        stack.config,
        housekeeping=HousekeepingConfig(runner="celery"),
        registry_url=f"{stack.config.registry_url}2",
    )
    async with serving(config, stack.clock), RegistryClient(config) as client:
        async with working(config, tmp_path):
            key = await client.archive("ann", run.run_id, "weights", "x")
        (job,) = [
            job for job in (await client.admin("GET", "/jobs"))["jobs"] if job["job"] == "archives"
        ]
    assert key == keys.archive("ann", record.manifest_digest)
    with tarfile.open(fileobj=io.BytesIO(await stack.blobs.get(key))) as archive:
        assert archive.getnames() == ["adapter_config.json"]
    assert job["every_s"] == 1.0
    assert "at" in job
