"""One trial on real processes, and what must have happened in it to make it evidence."""

import pytest
from tests.cluster.faults import POINTS
from tests.cluster.run import NUM_RUNS, Trial, play, show

SEED = 7

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trial() -> Trial:
    trial = play(SEED)
    show([trial])
    return trial


def test_nothing_is_lost_and_nothing_doubled_whatever_dies_or_freezes(trial: Trial) -> None:
    assert trial.violations == []
    assert trial.verdict.counters.accepted == trial.verdict.counters.committed


def test_every_failpoint_was_hit_and_every_kind_of_fault_happened(trial: Trial) -> None:
    assert trial.hits.keys() >= POINTS
    assert trial.faults["kill9"] == len(POINTS)
    assert trial.faults["stop"] == 4
    assert trial.faults["raise"] == 1
    counters = trial.verdict.counters
    assert counters.trims > 0, "no snapshot was made"
    assert counters.take_overs > NUM_RUNS
    assert counters.executed > counters.committed, "nothing was replayed"
