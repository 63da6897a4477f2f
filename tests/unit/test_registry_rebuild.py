"""A wiped Redis: nothing goes on before headers and lists are made again from the object store."""

import pytest
from tests.unit.registry_stack import Stack
from tests.unit.test_registry_housekeeping import committed, has_org, job, table

from luthier_core import keys
from luthier_core.generation import Generation
from luthier_core.listing import Listing
from luthier_core.oplog import Oplog
from luthier_core.protocol import Head, SnapshotRef
from luthier_registry.rebuild import Rebuild


async def lists(stack: Stack, run_id: str) -> list[object]:
    client = stack.client
    return [
        await client.list_sessions("ann", limit=100, offset=0),
        await client.list_checkpoints("ann", limit=100, offset=0),
        await client.list_run_checkpoints("ann", run_id),
        await client.list_runs("ann", limit=100, offset=0),
        await table(stack, "run"),
        await client.admin("GET", f"/metrics/{run_id}?after=-1&limit=100", "ann"),
    ]


async def test_a_new_deployment_is_confirmed_and_a_wiped_redis_is_not(stack: Stack) -> None:
    first, second = [Generation(stack.valkey, stack.blobs) for _ in range(2)]
    assert await first.is_confirmed()
    assert await second.is_confirmed()
    await stack.valkey.flushall()
    assert not await first.is_confirmed()
    assert not await Generation(stack.valkey, stack.blobs).is_confirmed()
    await first.renew()
    assert await second.is_confirmed()


async def test_lists_and_sums_are_the_same_after_redis_was_wiped(stack: Stack) -> None:
    await has_org(stack)
    assert await Generation(stack.valkey, stack.blobs).is_confirmed()
    run = await stack.run()
    await stack.client.create_sampler(
        "ann", session_id=run.session_id, sampling_session_seq_id=0, base_model="tiny"
    )
    for number in range(3):
        await stack.save(run, name=f"c{number}", seq=number + 1)
    await stack.save(run, name="e", seq=9, kind="ephemeral")
    await committed(stack, run, 3)
    await job(stack, "usage")
    from_ms = int(stack.clock().timestamp() * 1000)
    await committed(stack, run, 2, first=3, from_ms=from_ms)
    await job(stack, "usage")
    before = await lists(stack, run.run_id)
    await stack.valkey.flushall()
    assert (await job(stack, "generation"))["rebuilt"] > 0
    assert await job(stack, "generation") == {"rebuilt": 0}
    await job(stack, "usage")
    assert await lists(stack, run.run_id) == before


async def test_rows_that_a_restarted_redis_has_lost_are_listed_again(stack: Stack) -> None:
    await has_org(stack)
    run = await stack.run()
    await job(stack, "generation")
    await stack.save(run, name="lost", seq=1)
    listed = await lists(stack, run.run_id)
    # As after a rollback: another process, and what was written last is gone.
    await stack.valkey.set(keys.LISTED_SINCE, "the process before")
    await Listing(stack.valkey, "ann").remove_checkpoint(run.run_id, "weights", "lost")
    header = await stack.valkey.hgetall(keys.run_header(run.run_id))
    assert await lists(stack, run.run_id) == listed
    assert await stack.valkey.hgetall(keys.run_header(run.run_id)) == header
    assert await job(stack, "generation") == {"rebuilt": 0}


async def test_a_list_that_was_read_while_redis_restarted_is_read_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    await has_org(stack)
    run = await stack.run()
    await stack.save(run, name="lost", seq=1)
    listed = await stack.client.list_run_checkpoints("ann", run.run_id)
    await Listing(stack.valkey, "ann").remove_checkpoint(run.run_id, "weights", "lost")
    await stack.valkey.set(keys.LISTED_SINCE, "one process")
    seen = [b"one process"]

    async def server(_: Rebuild) -> bytes:
        return seen.pop() if seen else b"the next process"

    monkeypatch.setattr(Rebuild, "_server", server)
    assert await stack.client.list_run_checkpoints("ann", run.run_id) == listed


async def test_what_a_restarted_redis_still_has_is_not_written_again(stack: Stack) -> None:
    await has_org(stack)
    run = await stack.run()
    await stack.client.create_sampler(
        "ann", session_id=run.session_id, sampling_session_seq_id=0, base_model="tiny"
    )
    for seq in range(1, 4):
        await stack.save(run, name=f"c{seq}", seq=seq)
    await job(stack, "generation")
    await stack.valkey.set(keys.LISTED_SINCE, "the process before")
    await stack.valkey.config_resetstat()
    assert await job(stack, "generation") == {"rebuilt": 6}
    commands = await stack.valkey.info("commandstats")
    assert "cmdstat_hmget" in commands
    assert "cmdstat_zadd" not in commands


async def test_records_that_were_all_deleted_meanwhile_are_no_error(stack: Stack) -> None:
    assert await Listing(stack.valkey, "ann").unlisted("sessions", {}) == set()


async def test_a_run_goes_on_from_its_snapshot_and_its_old_owner_is_fenced(stack: Stack) -> None:
    await has_org(stack)
    run, lost = await stack.run(), await stack.run()
    ref = SnapshotRef(5, 3)
    head = Head(3, "w/1", snap=ref, prev_snap=None)
    await stack.blobs.put(keys.run_head("ann", run.run_id), head.to_bytes())
    await job(stack, "rebuild-index")
    oplog = Oplog(stack.valkey)
    await oplog.load_library()
    header = await oplog.header(run.run_id)
    assert header is not None
    assert (header.admitted, header.committed, header.epoch) == (5, 5, 4)
    assert (header.status, header.tenant, header.facts["session_id"]) == (
        "active",
        "ann",
        run.session_id,
    )
    stored = Head.from_bytes(await stack.blobs.get(keys.run_head("ann", run.run_id)))
    assert stored == Head(4, "", snap=ref, prev_snap=None)
    assert await oplog.acquire(run.run_id, 3, "w/1") is None
    assert await oplog.acquire(run.run_id, 5, "w/2") == (5, 5)
    without_snapshot = await oplog.header(lost.run_id)
    assert without_snapshot is not None
    assert without_snapshot.status == "failed"


async def test_a_row_without_a_record_goes_and_every_other_stays(stack: Stack) -> None:
    await has_org(stack)
    run = await stack.run()
    kept, gone = await stack.save(run, name="kept"), await stack.save(run, name="gone", seq=2)
    await stack.blobs.delete(keys.name_record("ann", run.run_id, "weights", gone.name))
    await job(stack, "rebuild-index")
    rows = (await stack.client.list_run_checkpoints("ann", run.run_id))["checkpoints"]
    assert rows == [kept.row()]
