"""What a gateway does about samples that Redis has forgotten."""

from datetime import UTC, datetime

import pytest

from luthier_core import keys
from luthier_core.oplog import Oplog
from luthier_core.records import SamplerRecord
from luthier_gateway import accepted
from luthier_gateway.accepted import LOST, AcceptedSamples

SAMPLER = SamplerRecord(
    sampling_session_id="s:sample:0",
    tenant="ann",
    session_id="s",
    base_model="tiny",
    created_at=datetime.now(UTC),
)


async def enqueue(oplog: Oplog, seq: str) -> None:
    await oplog.enqueue(
        tenant="ann",
        base_model="tiny",
        sampling_session_id="s:sample:0",
        seq=seq,
        digest="d" * 32,
        job={"body": b"{}", "size": "2"},
        max_jobs=10,
        header={"base_model": "tiny", "weights": ""},
    )


@pytest.fixture
async def samples(oplog: Oplog) -> AcceptedSamples:
    """Two of which Redis knows one; Redis was another process at the last check."""
    samples = AcceptedSamples(oplog)
    await samples.check()
    for seq in (1, 2):
        samples.note(SAMPLER, seq, "d" * 32)
    await enqueue(oplog, "1")
    return samples


async def test_a_sample_that_redis_has_lost_fails_for_who_waits_for_it(
    samples: AcceptedSamples, oplog: Oplog
):
    samples._server = "0" * 40
    await samples.check()
    (completion,) = await oplog.completions("s:sample:0", 0, after=0)
    assert (completion.request_id, completion.state) == ("s:sample:0:2", "failed")
    stored = await oplog.redis.hgetall(keys.sampling_outcome("s:sample:0", "2"))
    assert stored[b"body"] == LOST.body.inline


async def test_nothing_fails_while_redis_is_the_same(samples: AcceptedSamples, oplog: Oplog):
    await samples.check()
    assert await oplog.completions("s:sample:0", 0, after=0) == []


async def test_only_what_is_young_is_remembered(oplog: Oplog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(accepted, "MAX_REMEMBERED", 2)
    now = 0.0
    samples = AcceptedSamples(oplog, clock=lambda: now)
    for seq in (1, 2, 3):
        samples.note(SAMPLER, seq, "d" * 32)
    assert [sample.seq for sample in samples._recent] == [2, 3]
    now = accepted.REMEMBERED_S
    samples.note(SAMPLER, 4, "d" * 32)
    assert [sample.seq for sample in samples._recent] == [4]
