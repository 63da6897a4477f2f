"""One trial on real processes, and what it must have seen to count as evidence."""

import pytest
from tests.cluster.run import Trial, play, show

from luthier_core.failpoints import POINTS

pytestmark = pytest.mark.slow

SEED = 7


@pytest.fixture(scope="module")
def trial() -> Trial:
    """Every failpoint kills a process once, and some freeze one, while four runs are trained."""
    trial = play(SEED)
    show([trial])
    return trial


def test_nothing_is_lost_and_nothing_doubled_whatever_dies_or_freezes(trial: Trial) -> None:
    assert trial.violations == []
    counters = trial.verdict.counters
    assert counters.accepted == counters.committed
    assert counters.executed >= counters.committed


def test_every_failpoint_was_hit_and_every_fault_happened(trial: Trial) -> None:
    assert set(trial.hits) == POINTS
    ...
