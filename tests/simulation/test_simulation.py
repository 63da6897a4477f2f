"""The protocol core under simulated faults: a few histories, and every planted bug."""

import pytest
from tests.simulation.history import simulate
from tests.simulation.planted import BUGS

NUM_HISTORIES = 200
CHUNK = 50


@pytest.mark.parametrize("first", range(0, NUM_HISTORIES, CHUNK))
def test_no_history_breaks_a_promise(first):
    verdicts = [simulate(seed) for seed in range(first, first + CHUNK)]
    assert {v.seed: v.violations for v in verdicts if v.violations} == {}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name):
    bug = BUGS[name]
    caught = simulate(bug.seed, bug.parts).violations
    assert caught, f"it survives; another seed: run.py --mutant {name} --histories 5000"


@pytest.mark.parametrize("seed", sorted({bug.seed for bug in BUGS.values()}))
def test_a_seed_that_shows_a_bug_shows_nothing_without_it(seed):
    assert simulate(seed).violations == []


def test_a_seed_is_one_history():
    assert simulate(127, traced=True).trace == simulate(127, traced=True).trace
