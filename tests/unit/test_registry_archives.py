"""Archives made by a job: who waits is told, and one that died or came twice changes nothing."""

import asyncio
from typing import Any

import pytest
from tests.unit.registry_stack import Stack

from luthier_core import keys
from luthier_core.errors import CheckpointDamaged
from luthier_core.records import CheckpointRecord
from luthier_registry.archives import WANTED, Archives, is_made

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


async def asked_for(
    stack: Stack, **changes: Any
) -> tuple[Archives, CheckpointRecord, "asyncio.Task[None]"]:
    """A call that waits."""
    record = await stack.save(await stack.run(), files=FILES, **changes)
    archives = Archives(stack.blobs, stack.valkey, clock=stack.clock)
    waiting = asyncio.create_task(archives.wait(record))
    async with asyncio.timeout(10):
        while not await stack.valkey.exists(WANTED):
            await asyncio.sleep(0)
    return archives, record, waiting


async def test_who_waits_is_told_when_the_job_has_made_it(stack: Stack) -> None:
    archives, record, waiting = await asked_for(stack)
    assert await archives.run() == {"made": 1}
    await waiting
    assert await is_made(stack.blobs, record)
    assert await archives.run() == {"made": 0}
    assert not await stack.valkey.exists(WANTED)


async def test_a_job_that_died_is_done_by_the_next_and_two_make_one(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives, record, waiting = await asked_for(stack)
    with monkeypatch.context() as broken:
        broken.setattr(stack.blobs, "put_stream", _dies)
        with pytest.raises(KeyboardInterrupt):
            await Archives(stack.blobs, stack.valkey, clock=stack.clock).run()
    await asyncio.gather(archives.run(), archives.run())
    await waiting
    assert await is_made(stack.blobs, record)


async def _dies(*_: object) -> None:
    raise KeyboardInterrupt


async def test_files_that_have_changed_are_told_to_who_waits(stack: Stack) -> None:
    archives, record, waiting = await asked_for(stack)
    prefix = keys.checkpoint_prefix("ann", record.run_id, 1, 1)
    await stack.blobs.put(f"{prefix}adapter_config.json", b"[]")
    assert await archives.run() == {"made": 0}
    with pytest.raises(CheckpointDamaged, match="adapter_config"):
        await waiting
    assert not await is_made(stack.blobs, record)


async def test_a_checkpoint_that_went_meanwhile_has_no_archive(stack: Stack) -> None:
    archives, record, waiting = await asked_for(stack)
    await stack.client.delete_checkpoint("ann", record.run_id, "weights", "x")
    assert await archives.run() == {"made": 0}
    await waiting
    assert not await is_made(stack.blobs, record)
