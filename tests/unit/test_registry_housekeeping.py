"""Housekeeping: what was used is counted once, what nothing needs goes after a day of grace."""

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.registry_stack import Stack

from luthier_core import keys
from luthier_core.config import LimitsConfig
from luthier_core.oplog import Oplog
from luthier_core.ops import Body, Kind, Op, Outcome, SamplingJob
from luthier_core.protocol import Head, SnapshotRef
from luthier_core.records import OrgRecord, RunRecord
from luthier_registry import traces

HOURS = "starting_on=2026-01-02T00:00&ending_before=2026-01-05T00:00"


async def job(stack: Stack, name: str) -> dict[str, Any]:
    state = await stack.client.admin("POST", f"/jobs/{name}")
    assert "error" not in state, state
    return dict(state["did"])


async def has_org(stack: Stack, tenant: str = "ann") -> None:
    record = OrgRecord(org_id=tenant, name=tenant, created_at=stack.clock())
    await stack.blobs.put_if_absent(keys.org_record(tenant), record.to_bytes())


async def admitted(stack: Stack, run: RunRecord, seq: int, **fields: Any) -> Op:
    oplog = Oplog(stack.valkey)
    await oplog.load_library()
    op = Op(
        run_id=run.run_id,
        seq=seq,
        kind=fields.get("kind", Kind.FORWARD_BACKWARD),
        digest="d" * 64,
        body=Body.of(fields.get("body", b"{}")),
    )
    header = {"base_model": run.base_model, "facts": "{}"} if seq == 0 else None
    await oplog.admit(op, tenant=run.tenant, limits=LimitsConfig(), header=header)
    await oplog.announce_run(run.base_model, run.run_id, 1.0)
    return op


async def committed(
    stack: Stack, run: RunRecord, num_ops: int, *, first: int = 0, from_ms: int = 0
) -> None:
    """Ops of 10 tokens each, with their metrics; one every 10 ms."""
    oplog = Oplog(stack.valkey)
    for seq in range(first, first + num_ops):
        await admitted(stack, run, seq)
        if seq == 0:
            assert await oplog.acquire(run.run_id, 1, "w/1")
        kept = {"kind": "forward_backward", "metrics": {"num_tokens:sum": 10.0}, "worker": "w"}
        at_ms = from_ms + 10 * seq
        kept |= {"admitted_ms": at_ms, "begun_ms": at_ms + 2, "ended_ms": at_ms + 15}
        outcome = Outcome.completed(Body.of(b"{}"), metrics=json.dumps(kept))
        assert (await oplog.commit(run.run_id, 1, seq, outcome)).status == "OK"


async def table(stack: Stack, by: str, tenant: str = "ann") -> dict[str, dict[str, Any]]:
    answer = await stack.client.admin("GET", f"/orgs/{tenant}/usage?{HOURS}&by={by}")
    return {row[by]: row for row in answer["rows"]}


# --- usage ----------------------------------------------------------------------------------------


async def test_every_op_is_counted_once_however_often_the_job_runs(stack: Stack) -> None:
    run = await stack.run()
    await committed(stack, run, 3)
    assert await job(stack, "usage") == {"ops": 3, "samples": 0}
    assert await job(stack, "usage") == {"ops": 0, "samples": 0}
    await committed(stack, run, 2, first=3)
    await asyncio.gather(*(job(stack, "usage") for _ in range(5)))
    assert (await table(stack, "run"))[run.run_id]["trained_tokens"] == 50


async def test_a_count_that_died_after_its_segment_is_finished_and_not_doubled(
    stack: Stack,
) -> None:
    run = await stack.run()
    await committed(stack, run, 2)
    await job(stack, "usage")
    # As if the job had died between the segment and the sums: the cursor and the sums are back.
    await stack.valkey.delete(
        keys.metrics_cursor("ann"), *[key async for key in stack.valkey.scan_iter("*:usage:*")]
    )
    await committed(stack, run, 1, first=2)
    await job(stack, "usage")
    assert (await table(stack, "run"))[run.run_id]["trained_tokens"] == 30


async def test_the_metric_history_outlives_the_futures_and_is_paged(stack: Stack) -> None:
    run = await stack.run()
    await committed(stack, run, 5)
    await job(stack, "usage")
    for seq in range(5):
        await stack.valkey.delete(keys.run_outcome(run.run_id, seq))
    await committed(stack, run, 2, first=5)  # not counted yet, and there all the same

    async def page(after: int) -> list[int]:
        answer = await stack.client.admin(
            "GET", f"/metrics/{run.run_id}?after={after}&limit=3", "ann"
        )
        assert all(entry["metrics"]["num_tokens:sum"] == 10 for entry in answer["entries"])
        return [entry["seq"] for entry in answer["entries"]]

    assert [await page(-1), await page(2), await page(5), await page(6)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6],
        [],
    ]


async def test_a_sample_is_counted_when_its_outcome_is_the_one_that_counts(stack: Stack) -> None:
    oplog = Oplog(stack.valkey)
    await oplog.load_library()
    await oplog.open_jobs("tiny")
    session = await stack.client.create_session("ann", project_id="blue")
    sampler = f"{session.session_id}:sample:0"
    await oplog.enqueue(
        tenant="ann",
        base_model="tiny",
        sampling_session_id=sampler,
        seq="0",
        digest="d" * 64,
        job={"session": sampler, "tenant": "ann", "weights": "", **Body.of(b"{}").fields()},
        max_jobs=9,
        header={"base_model": "tiny", "weights": ""},
    )
    claimed: list[SamplingJob] = await oplog.claim("tiny", "w", max_jobs=1, block_ms=None)
    outcome = Outcome.completed(Body.of(b"x"), "protobuf", usage=f"{sampler} 30 10 7")
    assert await oplog.settle(claimed[0], "tiny", outcome) == "OK"
    assert await oplog.settle(claimed[0], "tiny", outcome) == "ALREADY"
    assert await job(stack, "usage") == {"ops": 0, "samples": 1}
    assert await job(stack, "usage") == {"ops": 0, "samples": 0}
    row = (await table(stack, "project"))["blue"]
    assert (row["prefill_tokens"], row["cached_tokens"], row["sampled_tokens"]) == (20, 10, 7)
    assert row["cost_usd"] is None


async def test_storage_is_counted_by_the_time_that_it_is_there(stack: Stack) -> None:
    await has_org(stack)
    run = await stack.run()
    record = await stack.save(run)
    await job(stack, "storage")
    stack.clock.now += timedelta(hours=10)
    await job(stack, "storage")
    events = await stack.client.admin("GET", f"/usage/events?{HOURS}", "ann")
    (event,) = events["data"]
    assert event["event_info"].keys() == {"type", "gigabyte_hours"}  # more breaks old SDKs
    assert event["event_info"]["type"] == "storage"
    hours = event["event_info"]["gigabyte_hours"] * 1e9 / record.size_bytes
    assert 9.5 < hours < 10.5
    answer = await stack.client.admin("GET", "/usage/stored", "ann")
    assert answer["data"][0]["size_bytes"] == record.size_bytes


async def test_stored_bytes_are_told_in_the_order_of_the_projects(stack: Stack) -> None:
    await has_org(stack)
    for project in ("b", "a"):
        session = await stack.client.create_session("ann", project_id=project)
        await stack.save(await stack.run(session_id=session.session_id))
    rows = (await stack.client.admin("GET", "/usage/stored", "ann"))["data"]
    assert [row["project_id"] for row in rows] == ["a", "b"]


async def test_a_table_is_also_csv(stack: Stack) -> None:
    run = await stack.run()
    await committed(stack, run, 1)
    await job(stack, "usage")
    answer = await stack.client.admin("GET", f"/orgs/ann/usage?{HOURS}&by=run&format=csv")
    header, row = answer["csv"].splitlines()
    assert header.startswith("run,trained_tokens,")
    assert row.startswith(f"{run.run_id},10,")


# --- traces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [False, True])
async def test_a_trace_has_the_latest_requests_and_is_swept(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    monkeypatch.setattr(traces, "MAX_REQUESTS", 3)
    await has_org(stack)
    run = await stack.run()
    await committed(stack, run, 5)
    if counted:
        await job(stack, "usage")
    key = await stack.client.trace("ann", run.session_id)
    assert key is not None
    events = json.loads(await stack.blobs.get(key))["traceEvents"]
    assert [event["args"]["seq"] for event in events if "seq" in event.get("args", {})] == [2, 3, 4]
    times = [(event["ph"], event["ts"]) for event in events if event.get("id") == "1.2"]
    assert times == [("b", 20_000), ("b", 22_000), ("e", 35_000), ("e", 35_000)]
    await job(stack, "sweep")
    stack.clock.now += timedelta(hours=2)
    await job(stack, "sweep")
    assert await stack.blobs.head(key) is None


# --- sweep ----------------------------------------------------------------------------------------


async def objects(stack: Stack, part: str) -> set[str]:
    return {info.key async for info in stack.blobs.list("t/ann/") if part in info.key}


async def test_a_deleted_checkpoint_goes_after_its_grace_and_nothing_else_does(
    stack: Stack,
) -> None:
    await has_org(stack)
    run = await stack.run()
    await stack.save(run, name="kept", seq=1)
    before = await objects(stack, "/ckpt/")
    await stack.save(run, name="gone", seq=2)
    await stack.client.delete_checkpoint("ann", run.run_id, "weights", "gone")
    assert (await job(stack, "sweep"))["deleted"] == 0
    assert len(await objects(stack, "/ckpt/")) == 2
    stack.clock.now += timedelta(hours=2)
    everything = await objects(stack, "")
    assert (await job(stack, "sweep"))["deleted"] == 2  # its file and its manifest
    assert await objects(stack, "/ckpt/") == before
    assert {key.split("/")[4] for key in everything - await objects(stack, "")} == {"ckpt", "man"}


async def test_what_is_needed_again_within_its_grace_stays(stack: Stack) -> None:
    await has_org(stack)
    run = await stack.run()
    record = await stack.save(run)
    await stack.client.delete_checkpoint("ann", run.run_id, "weights", "x")
    await job(stack, "sweep")
    stack.clock.now += timedelta(hours=2)
    key = keys.name_record("ann", run.run_id, "weights", "x")
    await stack.blobs.put(key, record.to_bytes())
    assert (await job(stack, "sweep"))["deleted"] == 0
    assert len(await objects(stack, "/ckpt/")) == 1


async def test_files_of_a_load_that_a_replay_needs_stay(stack: Stack) -> None:
    await has_org(stack)
    source, run = await stack.run(), await stack.run()
    record = await stack.save(source)
    load = json.dumps({"manifest": record.manifest_key, "path": "p", "optimizer": False}).encode()
    await admitted(stack, run, 0, kind=Kind.CREATE_MODEL)
    await admitted(stack, run, 1, kind=Kind.LOAD_WEIGHTS, body=load)
    await stack.client.delete_checkpoint("ann", source.run_id, "weights", "x")
    await job(stack, "sweep")
    stack.clock.now += timedelta(hours=2)
    assert (await job(stack, "sweep"))["deleted"] == 0
    await stack.valkey.delete(keys.run_log(run.run_id))  # trimmed: no replay begins before the load
    await job(stack, "sweep")
    stack.clock.now += timedelta(hours=2)
    assert (await job(stack, "sweep"))["deleted"] == 2


async def test_snapshots_and_payloads_behind_the_older_snapshot_go(stack: Stack) -> None:
    await has_org(stack)
    run = await stack.run()
    refs = [SnapshotRef(seq, 1) for seq in (2, 4, 6)]
    for ref in refs:
        prefix = keys.snapshot_prefix("ann", run.run_id, ref.seq, ref.epoch)
        await stack.blobs.put(f"{prefix}manifest.json", b"{}")
    for seq in range(1, 8):
        await stack.blobs.put(keys.op_payload("ann", run.run_id, seq, "ab" * 32), b"x")
        await stack.blobs.put(keys.op_result("ann", run.run_id, seq, 1), b"x")
    await stack.valkey.hset(keys.run_outcome(run.run_id, 7), "state", "completed")
    head = Head(1, "w/1", snap=refs[2], prev_snap=refs[1])
    await stack.blobs.put(keys.run_head("ann", run.run_id), head.to_bytes())
    await job(stack, "sweep")
    stack.clock.now += timedelta(hours=2)
    await job(stack, "sweep")
    left = {key.split("/", 4)[4] for key in await objects(stack, "/runs/")}
    assert {name for name in left if name.startswith("snap/")} == {
        "snap/4-1/manifest.json",
        "snap/6-1/manifest.json",
    }
    assert {int(n[4:].split("-")[0]) for n in left if n.startswith("ops/")} == {5, 6, 7}
    assert {name for name in left if name.startswith("res/")} == {"res/7-1"}
    assert {"HEAD.json", "run.json"} <= left


async def test_what_has_expired_loses_archive_and_files(stack: Stack) -> None:
    await has_org(stack)
    run = await stack.run()
    record = await stack.save(run, ttl_seconds=60)
    archive = keys.archive("ann", record.manifest_digest)
    await stack.blobs.put(archive, b"tar")
    stack.clock.now += timedelta(seconds=61)
    assert (await stack.client.list_checkpoints("ann", limit=9, offset=0))["checkpoints"] == []
    assert await job(stack, "expiry") == {"expired": 1}
    assert await stack.blobs.size(archive) is None
    await job(stack, "sweep")
    stack.clock.now += timedelta(hours=2)
    await job(stack, "sweep")
    assert await objects(stack, "/ckpt/") == set()


async def test_jobs_say_when_they_ran_and_what_they_did(stack: Stack) -> None:
    await job(stack, "sweep")
    jobs = {item["job"]: item for item in (await stack.client.admin("GET", "/jobs"))["jobs"]}
    assert set(jobs) == {
        *("generation", "rebuild-index", "archives", "lists", "usage", "storage"),
        *("keep-last", "expiry", "sweep"),
    }
    assert jobs["sweep"]["did"] == {"deleted": 0, "waiting": 0}
    assert "at" not in jobs["usage"]
