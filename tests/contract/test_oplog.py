"""The promises of the operation log's function library, on a real server."""

import asyncio
from itertools import permutations

import pytest

from luthier_core import keys
from luthier_core.config import LimitsConfig
from luthier_core.lifecycle import WorkerLease
from luthier_core.oplog import Oplog, RedisRestarted
from luthier_core.ops import Body, Gradient, Kind, Op, Outcome, digest_of

RUN, SAMPLER = "s1:train:0", "s1:sample:0"
TENANT = "ann"
LIMITS = LimitsConfig()
DONE = Outcome.completed(Body.of(b"{}"))
HEADER = {"base_model": "m", "facts": "{}"}


def op(seq: int, body: bytes = b"x", kind: Kind = Kind.FORWARD_BACKWARD) -> Op:
    return Op(run_id=RUN, seq=seq, kind=kind, digest=digest_of(body), body=Body.of(body))


async def admit(oplog: Oplog, wanted: Op, limits: LimitsConfig = LIMITS) -> str:
    header = HEADER if wanted.seq == 0 else None
    admission = await oplog.admit(wanted, tenant=TENANT, limits=limits, header=header)
    return admission.status


@pytest.fixture
async def run(oplog: Oplog) -> Oplog:
    """A run whose creation is admitted, owned under epoch 1 and committed."""
    assert await admit(oplog, op(0, kind=Kind.CREATE_MODEL)) == "OK"
    assert await oplog.acquire(RUN, 1, "trainer-0/a") == (0, -1)
    assert (await oplog.commit(RUN, 1, 0, DONE)).status == "OK"
    return oplog


async def seqs(oplog: Oplog) -> list[int]:
    return [entry.seq for entry in (await oplog.read_log({RUN: 0})).get(RUN, [])]


@pytest.mark.parametrize("order", list(permutations((1, 2, 3))))
async def test_ops_enter_the_log_in_order_of_seq_whatever_the_order_of_arrival(run, order):
    for seq in order:
        assert await admit(run, op(seq)) == "OK"
    assert await seqs(run) == [0, 1, 2, 3]


async def test_an_op_above_a_gap_is_accepted_and_waits(run):
    assert await admit(run, op(3)) == "OK"
    assert await seqs(run) == [0]
    assert await run.is_parked(RUN, 3)


async def test_an_accepted_op_is_never_missed_while_its_gap_is_being_filled(run):
    for seq in range(1, 100, 2):
        await admit(run, op(seq + 1))
        standing, _ = await asyncio.gather(run.standing(RUN, seq + 1), admit(run, op(seq)))
        assert standing.is_accepted


async def test_a_committed_op_always_shows_its_outcome(run):
    for seq in range(1, 50):
        await admit(run, op(seq))
        standing, _ = await asyncio.gather(run.standing(RUN, seq), run.commit(RUN, 1, seq, DONE))
        assert (standing.outcome is not None) or not standing.is_committed


async def test_a_repeated_post_is_a_duplicate_in_the_log_above_a_gap_and_after_commit(run):
    await admit(run, op(1))
    await admit(run, op(3))
    assert [await admit(run, op(seq)) for seq in (1, 3)] == ["DUP", "DUP"]
    await run.commit(RUN, 1, 1, DONE)
    assert await admit(run, op(1)) == "DUP"
    assert await seqs(run) == [0, 1]


async def test_another_body_under_a_used_seq_is_refused_and_changes_nothing(run):
    await admit(run, op(1, b"first"))
    await admit(run, op(3, b"first"))
    assert [await admit(run, op(seq, b"second")) for seq in (1, 3)] == ["MISMATCH", "MISMATCH"]
    await admit(run, op(2))
    log = (await run.read_log({RUN: 0}))[RUN]
    assert [entry.body.inline for entry in log[1:]] == [b"first", b"x", b"first"]


async def test_the_same_post_on_two_gateways_at_once_is_admitted_once(run):
    statuses = await asyncio.gather(*(admit(run, op(1)) for _ in range(20)))
    assert sorted(statuses) == ["DUP"] * 19 + ["OK"]
    assert await seqs(run) == [0, 1]


async def test_another_tenants_run_is_no_run(run):
    admission = await run.admit(op(1), tenant="eve", limits=LIMITS)
    assert admission.status == "NORUN"


async def test_an_op_of_an_unknown_run_is_refused(oplog):
    assert await admit(oplog, op(1)) == "NORUN"


async def test_a_seq_too_far_ahead_is_refused(run):
    limits = LimitsConfig(max_seq_ahead=10)
    assert await admit(run, op(11), limits) == "FAR"
    assert await admit(run, op(10), limits) == "OK"


async def test_a_full_queue_refuses_only_while_something_can_be_executed(run):
    limits = LimitsConfig(max_pending_ops=2)
    # Chunks 2 and 3 fill the queue while chunk 1 is withheld until chunk 4 is accepted.
    assert [await admit(run, op(seq), limits) for seq in (2, 3, 4, 5)] == ["OK"] * 4
    assert await admit(run, op(1), limits) == "OK"
    assert await admit(run, op(6), limits) == "BUSY"
    for seq in range(1, 6):
        await run.commit(RUN, 1, seq, DONE)
    assert await admit(run, op(6), limits) == "OK"


async def test_pending_bytes_fill_the_queue_until_they_are_committed(run):
    limits = LimitsConfig(max_pending_bytes=10)
    assert await admit(run, op(1, b"12345678"), limits) == "OK"
    assert await admit(run, op(2, b"12345678"), limits) == "BUSY"
    await run.commit(RUN, 1, 1, DONE)
    assert await admit(run, op(2, b"12345678"), limits) == "OK"


async def test_parked_bytes_have_a_limit_of_their_own(run):
    limits = LimitsConfig(max_parked_bytes=10)
    assert await admit(run, op(3, b"12345678"), limits) == "OK"
    assert await admit(run, op(4, b"12345678"), limits) == "FULL"
    assert await admit(run, op(2), limits) == "OK"


async def test_a_refusal_is_parked_however_many_bytes_are(run):
    limits = LimitsConfig(max_parked_bytes=10)
    assert await admit(run, op(3, b"1234567890"), limits) == "OK"
    assert await admit(run, op(4, b"x"), limits) == "FULL"
    assert await admit(run, op(4, b"x", Kind.REJECTED), limits) == "OK"


async def test_only_a_larger_epoch_takes_a_run_and_a_lost_reply_can_be_repeated(run):
    assert await run.acquire(RUN, 1, "trainer-1/b") is None
    assert await run.acquire(RUN, 2, "trainer-1/b") == (0, 0)
    assert await run.acquire(RUN, 2, "trainer-1/b") == (0, 0)
    assert await run.acquire(RUN, 2, "trainer-0/a") is None


async def test_an_older_owner_is_fenced(run):
    await admit(run, op(1))
    await run.acquire(RUN, 2, "trainer-1/b")
    assert (await run.commit(RUN, 1, 1, DONE)).status == "FENCED"
    assert await run.training_outcome(RUN, 1) is None
    assert not await run.release(RUN, 1)


async def test_an_outcome_is_written_once(run):
    await admit(run, op(1))
    assert (await run.commit(RUN, 1, 1, Outcome.completed(Body.of(b"first")))).status == "OK"
    assert (await run.commit(RUN, 1, 1, Outcome.completed(Body.of(b"second")))).status == "ALREADY"
    outcome = await run.training_outcome(RUN, 1)
    assert outcome is not None
    assert outcome.body.inline == b"first"


async def test_nothing_is_committed_out_of_order_or_without_admission(run):
    await admit(run, op(1))
    await admit(run, op(2))
    assert (await run.commit(RUN, 1, 2, DONE)).status == "ORDER"
    await run.commit(RUN, 1, 1, DONE)
    await run.commit(RUN, 1, 2, DONE)
    assert (await run.commit(RUN, 1, 3, DONE)).status == "ORDER"


async def test_failures_are_remembered_for_replay(run):
    await admit(run, op(1))
    await admit(run, op(2))
    await run.commit(RUN, 1, 1, Outcome.failure("no", "user"))
    await run.commit(RUN, 1, 2, DONE)
    assert (await run.recorded(RUN)).failed == {1}


async def fail(run: Oplog, *seqs: int) -> None:
    """Forward_backwards that end with an error."""
    for seq in seqs:
        await run.commit(RUN, 1, seq, Outcome.failure("no", "user"), gradient=Gradient.LOST)


async def told(run: Oplog, *seqs: int) -> list[int]:
    """What the entries of these ops say that their client knew."""
    entries = (await run.read_log({RUN: seqs[0]}))[RUN]
    return [entry.told for entry in entries if entry.seq in seqs]


async def test_an_op_carries_the_losses_its_client_knew_of(run):
    await admit(run, op(1))
    await admit(run, op(4))
    await fail(run, 1)
    await run.told(RUN, 1)
    await admit(run, op(2))
    await admit(run, op(3))
    assert await told(run, 1, 2, 3, 4) == [-1, 1, 1, -1]


async def test_an_op_does_not_carry_a_loss_while_an_older_one_has_not_been_delivered(run):
    for seq in (1, 2, 3):
        await admit(run, op(seq))
    await fail(run, 1)
    await run.commit(RUN, 1, 2, DONE)
    await fail(run, 3)
    await run.told(RUN, 3)
    await admit(run, op(4))
    await run.told(RUN, 1)
    await admit(run, op(5))
    assert await told(run, 4, 5) == [0, 3]


async def test_a_loss_that_was_trimmed_before_its_delivery_is_not_taken_for_known(run):
    for seq in (1, 2, 3):
        await admit(run, op(seq))
    await fail(run, 1, 2, 3)
    await run.trim(RUN, 1, 2)
    await run.told(RUN, 1)
    await run.told(RUN, 3)
    await admit(run, op(4))
    assert await told(run, 4) == [1]


async def test_an_error_that_is_never_fetched_costs_one_optimizer_step_and_no_more(run):
    for seq in (1, 2, 3):
        await admit(run, op(seq))
    await fail(run, 1)
    await run.commit(RUN, 1, 2, DONE, gradient=Gradient.CLEARED)
    await fail(run, 3)
    await run.told(RUN, 3)
    await admit(run, op(4))
    assert await told(run, 4) == [3]


async def test_only_a_lost_gradient_waits_for_its_delivery(run):
    for seq in (1, 2):
        await admit(run, op(seq))
    await run.commit(RUN, 1, 1, Outcome.failure("a save that failed", "user"))
    await fail(run, 2)
    await run.told(RUN, 2)
    await admit(run, op(3))
    assert await told(run, 3) == [2]


async def test_a_run_with_work_is_not_released(run):
    await admit(run, op(1))
    assert not await run.release(RUN, 1)
    await run.commit(RUN, 1, 1, DONE)
    assert await run.release(RUN, 1)
    header = await run.header(RUN)
    assert header is not None
    assert (header.owner, header.epoch) == ("", 1)


@pytest.mark.parametrize("seq", [None, 1, 2], ids=["idle", "new work", "a gap"])
async def test_only_a_run_that_nobody_has_to_look_at_leaves_the_list(run, seq):
    await run.announce_run("m", RUN, 0)
    assert await run.release(RUN, 1)
    if seq is not None:
        # Between the release and what follows.
        await admit(run, op(seq))
    await run.retire_run("m", RUN)
    assert await run.live_runs("m") == ([] if seq is None else [RUN])


async def test_a_refused_creation_fails_at_once_and_takes_no_ops(oplog):
    failure = Outcome.failure("rank: too large", "user")
    reject = {"tenant": TENANT, "digest": digest_of(b"a"), "header": HEADER, "outcome": failure}
    assert await oplog.reject_run(RUN, **reject) == "OK"
    assert await oplog.reject_run(RUN, **reject) == "DUP"
    assert await oplog.reject_run(RUN, **{**reject, "digest": digest_of(b"b")}) == "MISMATCH"
    assert await oplog.reject_run(RUN, **{**reject, "tenant": "eve"}) == "NORUN"
    outcome = await oplog.training_outcome(RUN, 0)
    assert outcome is not None
    assert outcome.failed
    assert await admit(oplog, op(1)) == "DEAD"


async def test_begin_counts_attempts_and_commit_begins_the_next(run):
    await admit(run, op(1))
    assert (await run.begin(RUN, 1, 1)).attempts == 1
    assert (await run.begin(RUN, 1, 2)).status == "ORDER"
    assert (await run.commit(RUN, 1, 1, DONE, begin_next=True)).attempts == 0  # 2 is not admitted
    await admit(run, op(2))
    await admit(run, op(3))
    assert (await run.commit(RUN, 1, 2, DONE, begin_next=True)).attempts == 1
    assert (await run.begin(RUN, 1, 2)).status == "ALREADY"
    await run.acquire(RUN, 2, "trainer-1/b")
    assert (await run.begin(RUN, 2, 3)).attempts == 2


async def test_a_begin_that_is_repeated_for_a_lost_reply_is_no_second_attempt(run):
    await admit(run, op(1))
    assert [(await run.begin(RUN, 1, 1)).attempts for _ in range(3)] == [1, 1, 1]


async def test_a_fenced_owner_begins_and_blames_nothing(run):
    await admit(run, op(1))
    await run.acquire(RUN, 2, "trainer-1/b")
    assert (await run.begin(RUN, 1, 1)).status == "FENCED"
    assert await run.blame(RUN, 1, 1) < 0


async def test_deaths_are_counted_for_the_op_under_way_and_forgotten_with_it(run):
    await admit(run, op(1))
    assert await run.blame(RUN, 1, 1) < 0  # not begun
    for epoch in (1, 2):
        await run.acquire(RUN, epoch, f"trainer-{epoch}/a")
        await run.begin(RUN, epoch, 1)
        assert await run.blame(RUN, epoch, 1) == epoch
    assert await run.blame(RUN, 2, 2) < 0
    assert (await run.begin(RUN, 2, 1)).deaths == 2
    await run.commit(RUN, 2, 1, DONE)
    fields = await run.redis.hkeys(keys.run_header(RUN))
    assert not {b"b:1", b"n:1", b"a:1"} & set(fields)


async def test_how_an_op_was_split_is_known_until_it_is_trimmed(run):
    await admit(run, op(1))
    await run.acquire(RUN, 1, "trainer-1/a")
    assert await run.halve(RUN, 2, 1, 1) == "FENCED"
    assert await run.halve(RUN, 1, 2, 1) == "ORDER"  # not admitted
    assert [await run.halve(RUN, 1, 1, number) for number in (1, 2)] == ["OK", "OK"]
    assert (await run.recorded(RUN)).halvings == {1: 2}
    await run.commit(RUN, 1, 1, DONE)
    assert await run.halve(RUN, 1, 1, 3) == "ORDER"  # it has been executed
    assert (await run.recorded(RUN)).halvings == {1: 2}
    await run.trim(RUN, 1, 1)
    assert (await run.recorded(RUN)).halvings == {}


async def test_a_worker_that_is_stuck_lets_its_lease_run_out(run):
    lease = WorkerLease(run, "t0", role="trainer", base_model="tiny", lease_s=60)
    answers = iter([False] * 3)
    keeping = asyncio.create_task(lease.keep(0.0, lambda: next(answers, True)))
    while not await run.live_workers():
        await asyncio.sleep(0)
    keeping.cancel()
    assert next(answers, None) is None


async def test_a_worker_is_there_again_after_redis_was_wiped(run):
    lease = WorkerLease(run, "t0", role="trainer", base_model="tiny", lease_s=60)
    await lease.take()
    await run.redis.flushall()
    keeping = asyncio.create_task(lease.keep(0.0))
    async with asyncio.timeout(10):
        while not await run.live_workers():
            await asyncio.sleep(0)
    keeping.cancel()


async def test_a_death_that_is_told_twice_counts_once(run):
    await admit(run, op(1))
    await run.begin(RUN, 1, 1)
    assert [await run.blame(RUN, 1, 1), await run.blame(RUN, 1, 1)] == [1, 1]
    await run.acquire(RUN, 2, "trainer-1/b")
    await run.begin(RUN, 2, 1)
    assert await run.blame(RUN, 2, 1) == 2


async def test_trim_drops_the_log_and_its_fields_and_a_late_duplicate_keeps_its_id(run):
    for seq in range(1, 4):
        await admit(run, op(seq))
    await run.commit(RUN, 1, 1, DONE)
    assert await run.trim(RUN, 1, 2) == "ORDER"
    assert await run.trim(RUN, 1, 1) == "OK"
    assert await seqs(run) == [2, 3]
    assert not {b"d:0", b"d:1"} & set(await run.redis.hkeys(keys.run_header(RUN)))
    assert await admit(run, op(1)) == "DUP"
    await run.acquire(RUN, 2, "trainer-1/b")
    assert await run.trim(RUN, 1, 1) == "FENCED"


async def test_ffwd_uses_up_the_ids_behind_a_snapshot(run):
    await admit(run, op(3))
    await admit(run, op(9))
    assert await run.ffwd(RUN, 1, 5) == "OK"
    assert await run.ffwd(RUN, 1, 5) == "ALREADY"
    header = await run.header(RUN)
    assert header is not None
    assert (header.admitted, header.committed) == (5, 5)
    assert await run.is_parked(RUN, 9)
    assert not await run.is_parked(RUN, 3)
    assert await admit(run, op(6)) == "OK"


async def test_ffwd_admits_what_waited_directly_above_it(run):
    for seq in (2, 6, 7, 9):
        await admit(run, op(seq))
    assert await run.ffwd(RUN, 1, 5) == "OK"
    header = await run.header(RUN)
    assert header is not None
    assert (header.admitted, header.committed) == (7, 5)
    assert [entry.seq for entry in (await run.read_log({RUN: 6}))[RUN]] == [6, 7]
    assert (await run.commit(RUN, 1, 6, DONE)).status == "OK"


async def test_ffwd_counts_the_bytes_of_used_up_ops_no_longer(run):
    limits = LimitsConfig(max_pending_bytes=10, max_parked_bytes=10)
    await admit(run, op(1, b"12345"), limits)
    await admit(run, op(3, b"12345"), limits)
    assert await run.ffwd(RUN, 1, 4) == "OK"
    assert await admit(run, op(6, b"1234567890"), limits) == "OK"
    assert await admit(run, op(5, b""), limits) == "OK"
    assert await admit(run, op(7, b"1"), limits) == "BUSY"
    fields = await run.redis.hmget(keys.run_header(RUN), "bytes", "parked_bytes")
    assert fields == [b"10", b"0"]


async def test_published_sampler_weights_never_go_back(run):
    assert await run.publish(RUN, 1, 5, "five") == "OK"
    assert await run.publish(RUN, 1, 5, "five") == "STALE"
    assert await run.publish(RUN, 1, 4, "four") == "STALE"
    await run.acquire(RUN, 2, "trainer-1/b")
    assert await run.publish(RUN, 1, 9, "zombie") == "FENCED"
    assert await run.publish(RUN, 2, 4, "replayed") == "OK"


async def test_a_gap_that_is_given_up_fails_what_waits_above_it(run):
    await admit(run, op(1))
    await admit(run, op(3))
    never = Outcome.failure("seq 2 never arrived", "user")
    assert await run.fail_range(RUN, 1, range(2, 4), never) == "ORDER"
    await run.commit(RUN, 1, 1, DONE)
    assert await run.fail_range(RUN, 1, range(2, 4), never) == "OK"
    assert await run.fail_range(RUN, 1, range(2, 4), never) == "ALREADY"
    outcomes = [await run.training_outcome(RUN, seq) for seq in (2, 3)]
    assert all(outcome is not None and outcome.failed for outcome in outcomes)
    assert (await run.recorded(RUN)).failed == {2, 3}
    assert await admit(run, op(4)) == "DEAD"
    assert await admit(run, op(3)) == "DUP"


async def test_a_gap_is_not_given_up_when_what_was_missing_has_arrived(run):
    await admit(run, op(2))
    await admit(run, op(1))
    never = Outcome.failure("seq 1 never arrived", "user")
    assert await run.fail_range(RUN, 1, range(1, 3), never) == "ORDER"
    assert await run.training_outcome(RUN, 1) is None


async def test_a_gap_remembers_a_client_that_asks_for_what_was_lost(run):
    async def lost() -> int:
        header = await run.header(RUN)
        assert header is not None
        return header.lost

    await admit(run, op(3))
    await run.lost(RUN, 3)  # it is here
    assert await lost() == -1
    await run.lost(RUN, 1)
    assert await lost() == 1
    await admit(run, op(1))
    await admit(run, op(2))
    assert await lost() == -1


async def test_a_run_does_not_end_with_an_op_that_waits_above_the_failed_ones(run):
    await admit(run, op(3))
    never = Outcome.failure("seq 1 never arrived", "user")
    await admit(run, op(5))  # arrives after the reaper has looked
    assert await run.fail_range(RUN, 1, range(1, 4), never) == "ORDER"
    assert await run.training_outcome(RUN, 1) is None
    assert await run.fail_range(RUN, 1, range(1, 6), never) == "OK"


async def test_an_owner_is_not_heard_by_another_server_than_it_means(run):
    info = await run.redis.info("server")
    assert await run.server_id(RUN) == info["run_id"]
    await admit(run, op(1))
    with pytest.raises(RedisRestarted):
        await run.commit(RUN, 1, 1, DONE, server="0" * 40)
    assert await run.training_outcome(RUN, 1) is None
    assert (await run.commit(RUN, 1, 1, DONE, server=info["run_id"])).status == "OK"


async def test_the_log_survives_a_reload_of_the_library(run):
    await admit(run, op(1))
    await run.load_library()
    assert await admit(run, op(1)) == "DUP"


# --- sampling -------------------------------------------------------------------------------------

SAMPLER = "s1:sample:0"
BIG_SEQ = str(10**18 + 1)


async def enqueue(oplog: Oplog, seq: str = BIG_SEQ, body: bytes = b"{}", max_jobs: int = 9) -> str:
    return await oplog.enqueue(
        tenant=TENANT,
        base_model="m",
        sampling_session_id=SAMPLER,
        seq=seq,
        digest=digest_of(body),
        job={"session": SAMPLER, "tenant": TENANT, "weights": "", **Body.of(body).fields()},
        max_jobs=max_jobs,
        header={"base_model": "m", "weights": ""},
    )


@pytest.fixture
async def jobs(oplog: Oplog) -> Oplog:
    await oplog.open_jobs("m")
    return oplog


async def test_a_job_with_a_seq_beyond_2_to_the_53_keeps_every_digit(jobs):
    assert await enqueue(jobs) == "OK"
    (job,) = await jobs.claim("m", "sampler-0", max_jobs=5, block_ms=1)
    assert (job.seq, job.request_id) == (BIG_SEQ, f"{SAMPLER}:{BIG_SEQ}")


async def test_a_repeated_sample_is_queued_once_and_another_body_is_refused(jobs):
    assert [await enqueue(jobs), await enqueue(jobs)] == ["OK", "DUP"]
    assert await enqueue(jobs, body=b'{"other": 1}') == "MISMATCH"
    assert len(await jobs.claim("m", "sampler-0", max_jobs=5, block_ms=1)) == 1


async def test_a_full_sampling_queue_refuses(jobs):
    assert [await enqueue(jobs, seq, max_jobs=2) for seq in "123"] == ["OK", "OK", "BUSY"]


async def test_the_first_outcome_of_a_sample_wins_and_the_job_is_gone(jobs):
    await enqueue(jobs)
    (job,) = await jobs.claim("m", "sampler-0", max_jobs=1, block_ms=1)
    assert await jobs.settle(job, "m", Outcome.completed(Body.of(b"first"))) == "OK"
    assert await jobs.settle(job, "m", Outcome.completed(Body.of(b"second"))) == "ALREADY"
    fields = await jobs.redis.hgetall(keys.sampling_outcome(SAMPLER, BIG_SEQ))
    assert fields[b"body"] == b"first"
    assert await jobs.redis.xlen(keys.sampling_jobs("m")) == 0
    assert await jobs.claim_own("m", "sampler-0") == []


async def test_an_outcome_after_its_record_has_expired_is_dropped_with_the_job(jobs):
    await enqueue(jobs)
    (job,) = await jobs.claim("m", "sampler-0", max_jobs=1, block_ms=1)
    await jobs.redis.delete(keys.sampling_outcome(SAMPLER, BIG_SEQ))
    assert await jobs.settle(job, "m", Outcome.completed(Body.of(b"late"))) == "ALREADY"
    assert await jobs.redis.exists(keys.sampling_outcome(SAMPLER, BIG_SEQ)) == 0
    assert await jobs.redis.xlen(keys.sampling_jobs("m")) == 0


async def test_a_job_of_a_dead_sampler_is_claimed_by_another_and_by_itself_again(jobs):
    await enqueue(jobs)
    await jobs.claim("m", "sampler-0", max_jobs=1, block_ms=1)
    assert len(await jobs.claim_own("m", "sampler-0")) == 1
    assert len(await jobs.claim_abandoned("m", "sampler-1", idle_ms=0, max_jobs=5)) == 1
    assert (await jobs.deliveries("m", "sampler-1")).popitem()[1] > 1


async def test_a_sampler_goes_on_after_redis_was_wiped(jobs):
    await jobs.redis.flushall()
    assert await jobs.claim_abandoned("m", "sampler-0", idle_ms=0, max_jobs=5) == []
    await jobs.redis.flushall()
    assert await jobs.claim("m", "sampler-0", max_jobs=5, block_ms=1) == []
    await enqueue(jobs)
    assert len(await jobs.claim("m", "sampler-0", max_jobs=5, block_ms=1)) == 1


async def test_a_refused_sample_fails_without_a_job(jobs):
    refused = Outcome.failure("prompt: empty", "user").fields()
    status = await jobs.enqueue(
        tenant=TENANT,
        base_model="m",
        sampling_session_id=SAMPLER,
        seq="1",
        digest=digest_of(b"{}"),
        job=refused,
        max_jobs=9,
        header={"base_model": "m", "weights": ""},
    )
    assert status == "OK"
    assert await enqueue(jobs, seq="1") == "DUP"
    assert await jobs.redis.xlen(keys.sampling_jobs("m")) == 0


async def test_a_lease_is_held_by_one_incarnation_until_it_is_released(oplog):
    first, second = '{"incarnation": "a"}', '{"incarnation": "b"}'
    assert await oplog.hold_lease("w:x", "a", first, 60_000)
    assert not await oplog.hold_lease("w:x", "b", second, 60_000)
    assert await oplog.hold_lease("w:x", "a", first, 60_000)
    await oplog.release_lease("w:x", "b")
    assert not await oplog.hold_lease("w:x", "b", second, 60_000)
    await oplog.release_lease("w:x", "a")
    assert await oplog.hold_lease("w:x", "b", second, 60_000)


def _ms(time: tuple[int, int]) -> int:
    return time[0] * 1000 + time[1] // 1000


async def test_who_has_read_further_than_a_rolled_back_redis_is_told_what_ends_next(oplog):
    async def fail_sample(seq: str) -> None:
        wanted = {"base_model": "m", "sampling_session_id": SAMPLER, "seq": seq, "digest": "d"}
        job = Outcome.failure("refused", "user").fields()
        await oplog.enqueue(tenant=TENANT, job=job, max_jobs=1, header={}, **wanted)

    await fail_sample("0")
    [read] = await oplog.completions(SAMPLER, 0, after=0)
    await oplog.redis.flushall()
    while _ms(await oplog.redis.time()) <= read.position:
        pass  # a restart takes longer
    await fail_sample("1")
    [told] = await oplog.completions(SAMPLER, 0, after=read.position)
    assert told.request_id == f"{SAMPLER}:1"
