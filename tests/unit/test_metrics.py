"""Metrics that only a fault moves: counted when it happens, and at no other time."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import REGISTRY

from luthier_core import metrics
from luthier_core.config import LimitsConfig
from luthier_core.errors import ConfigError
from luthier_core.futures import FutureId
from luthier_core.oplog import Attempt, Oplog
from luthier_core.ops import Body, Gradient, Kind, Op, Outcome
from luthier_core.ops_server import parse_address
from luthier_core.owner import Action, Step
from luthier_core.protocol import Acquire, Begin, CasHead, Commit, Execute, FailRange, Head
from luthier_gateway.observing import Delivered
from luthier_registry.observing import Observer
from luthier_trainer.observing import EffectWatch

HEAD = Head(2, "trainer-0/abc")
OUTCOME = Outcome(state="completed")
COMMIT = Commit("r", 2, 1, OUTCOME, Gradient.KEPT, "", Kind.FORWARD_BACKWARD)


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def an_op(run_id: str = "r", seq: int = 0) -> Op:
    return Op(run_id=run_id, seq=seq, kind=Kind.OPTIM_STEP, digest=f"{seq}", body=Body.of(b"{}"))


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def answered(watch: EffectWatch, effect: Any, answer: Any) -> None:
    async def perform() -> Any:
        return answer

    assert await watch.watch(effect, perform()) is answer


FAULTS = [
    (COMMIT, Attempt("FENCED"), "luthier_trainer_fenced_total", {"effect": "commit"}),
    (COMMIT, Attempt("ORDER"), "luthier_trainer_out_of_order_total", {"effect": "commit"}),
    (Acquire("r", 2, "w"), None, "luthier_trainer_fenced_total", {"effect": "acquire"}),
    (CasHead("r", HEAD, ""), None, "luthier_trainer_head_conflicts_total", {}),
    (
        Begin("r", 2, 1, Kind.FORWARD_BACKWARD),
        Attempt("OK", 3, 3),
        "luthier_trainer_quarantined_ops_total",
        {},
    ),
    (
        Begin("r", 2, 1, Kind.FORWARD_BACKWARD),
        Attempt("OK", 11, 0),
        "luthier_trainer_quarantined_ops_total",
        {},
    ),
    (FailRange("r", 2, range(3), OUTCOME), "OK", "luthier_trainer_gaps_given_up_total", {}),
]


@pytest.mark.parametrize(("effect", "answer", "name", "labels"), FAULTS)
async def test_a_fault_is_counted(effect: Any, answer: Any, name: str, labels: dict[str, str]):
    before = value(name, **labels)
    await answered(EffectWatch(), effect, answer)
    assert value(name, **labels) == before + 1


async def test_what_goes_well_is_no_fault():
    before = {name: value(name, **labels) for _, _, name, labels in FAULTS}
    watch = EffectWatch()
    await answered(watch, Acquire("r", 1, "w"), (1, 0))
    await answered(watch, Begin("r", 1, 1, Kind.FORWARD_BACKWARD), Attempt("OK", 1, 0))
    await answered(watch, Begin("r", 1, 2, Kind.FORWARD_BACKWARD), Attempt("OK", 2, 2))
    await answered(watch, COMMIT, Attempt("ALREADY"))
    await answered(watch, CasHead("r", HEAD, ""), "etag")
    assert before == {name: value(name, **labels) for _, _, name, labels in FAULTS}


async def test_a_recovery_lasts_until_the_first_new_op():
    clock, before = Clock(), value("luthier_trainer_recovery_seconds_sum")
    num_before = value("luthier_trainer_recoveries_total")
    watch = EffectWatch(clock)
    await answered(watch, Acquire("r", 2, "w"), (3, 1))
    replayed = value("luthier_trainer_replayed_ops_total")
    await answered(watch, Execute(Step(an_op(), Action.EXECUTE, publish=False)), None)
    assert value("luthier_trainer_replayed_ops_total") == replayed + 1
    clock.now += 7
    for seq in (2, 3):
        await answered(watch, Begin("r", 2, seq, Kind.FORWARD_BACKWARD), Attempt("OK", 1, 0))
        clock.now += 100
    assert value("luthier_trainer_recoveries_total") == num_before + 1
    assert value("luthier_trainer_recovery_seconds_sum") == before + 7


async def test_a_new_run_is_no_recovery():
    before = value("luthier_trainer_recoveries_total")
    watch = EffectWatch()
    await answered(watch, Acquire("r", 1, "w"), (0, -1))
    await answered(watch, Begin("r", 1, 0, Kind.FORWARD_BACKWARD), Attempt("OK", 1, 0))
    assert value("luthier_trainer_recoveries_total") == before


@pytest.fixture
def delivered() -> Any:
    future, kept = FutureId.parse(f"{'0' * 32}:train:0:1"), Delivered()
    assert future is not None
    before = value("luthier_gateway_changed_outcomes_total")

    def deliver(text: str, *, path: str = "/retrieve_future") -> float:
        kept.note(path, future, web.Response(body=text.encode()))
        return value("luthier_gateway_changed_outcomes_total") - before

    return deliver


def test_a_result_that_changes_after_it_was_delivered_is_counted(delivered: Any):
    assert (delivered("a"), delivered("a"), delivered("b")) == (0, 0, 1)


def test_the_same_result_in_another_form_has_not_changed(delivered: Any):
    assert (delivered("a"), delivered("b", path="/futures/1")) == (0, 0)


class NoJobs:
    """A stand-in for housekeeping that has one job with a result."""

    async def states(self) -> list[dict[str, Any]]:
        return [{"job": "sweep", "at": "2026-01-01T00:00:00+00:00", "did": {"waiting": 4}}]


async def test_queues_have_a_depth_and_an_age_for_each_tenant(oplog: Oplog):
    header = {"tenant": "ann", "base_model": "m", "facts": "{}"}
    run_id = f"{'0' * 32}:train:0"
    now = datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
    log = Oplog(oplog.redis, clock=lambda: (now - timedelta(seconds=30)).timestamp())
    for seq in (0, 1):
        op = an_op(run_id, seq)
        limits, new = LimitsConfig(), header if seq == 0 else None
        assert (await log.admit(op, tenant="ann", limits=limits, header=new)).status == "OK"
    await log.announce_run("m", run_id, 0.0)
    jobs: Any = NoJobs()

    await Observer(oplog, jobs, ["m"], clock=lambda: now).refresh()

    labels = {"base_model": "m", "tenant": "ann", "kind": "train"}
    assert value("luthier_registry_queue_depth", **labels) == 2
    assert value("luthier_registry_queue_age_seconds", **labels) == 30
    assert value("luthier_registry_log_ops_max", base_model="m") == 2
    ready = {"base_model": "m", "role": "trainer", "state": "ready"}
    assert REGISTRY.get_sample_value("luthier_registry_live_workers", ready) == 0
    assert value("luthier_registry_job_age_seconds", task="sweep") == 60
    assert value("luthier_registry_job_result", task="sweep", what="waiting") == 4


@pytest.mark.parametrize("address", ["9090", ":9090", "host:", "host:x", "host:0", "host:65536"])
def test_an_ops_address_is_a_host_and_a_port(address: str):
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        parse_address(address)


def test_the_documentation_names_every_metric_and_no_other():
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    listed = set(re.findall(r"^\| `(luthier_\w+)` \|", text, re.MULTILINE))
    defined = [metric for metric in vars(metrics).values() if hasattr(metric, "_name")]
    assert listed == {m._name + "_total" * (m._type == "counter") for m in defined}
