"""oplog.lua on a real server answers and holds what the model says, whatever the calls.

Its size is LUTHIER_SIM_SIZE, pr or nightly; README.md says how to repeat a failure.
"""

import os
from collections.abc import Iterator
from typing import Any, cast

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, reproduce_failure, settings
from hypothesis.stateful import run_state_machine_as_test
from redis.exceptions import ResponseError
from tests.library.library_machine import LibraryMachine
from tests.library.mutants import LIBRARY, MUTANTS, PROGRAMS, Program, mutated
from tests.library.server import Server, running_server

PR = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    phases=[phase for phase in Phase if phase is not Phase.explain],
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
NIGHTLY = settings(PR, max_examples=500, stateful_step_count=200, derandomize=False)
SIZES = {"pr": (1, PR), "nightly": (40, NIGHTLY)}
"""How many runs, and of what size: hypothesis remembers a whole run, about 1 MB an example."""
HUNT = settings(PR, max_examples=400, phases=[Phase.generate], print_blob=False)
"""Ends with the first failure, which is not made smaller."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


def test_the_library_does_what_the_model_does(server: Server) -> None:
    server.load(LIBRARY)

    def machine() -> LibraryMachine:
        return LibraryMachine(server)

    num_runs, size = SIZES[os.environ.get("LUTHIER_SIM_SIZE", "pr")]
    if blob := os.environ.get("LUTHIER_SIM_BLOB"):
        reproduce_failure(hypothesis.__version__, blob.encode())(machine)
        num_runs = 1
    for _ in range(num_runs):
        run_state_machine_as_test(cast(Any, machine), settings=size)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_library_passes_a_saved_program(server: Server, name: str) -> None:
    server.load(LIBRARY)
    play(server, PROGRAMS[name])


def test_every_planted_bug_is_caught(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    caught = {name: examples_until_caught(server, name) for name in MUTANTS}
    survivors = [name for name, examples in caught.items() if examples is None]
    with capsys.disabled():
        most = max(examples or 0 for examples in caught.values())
        print(
            f"\nmutants caught {len(caught) - len(survivors)}/{len(caught)}, "
            f"{len(PROGRAMS)} of them by a saved program, the others within {most} examples"
        )
    assert not survivors


def examples_until_caught(server: Server, name: str) -> int | None:
    """How many programs ran on the mutant until one failed; None if none did."""
    server.load(mutated(name))
    num_examples = 0

    def machine() -> LibraryMachine:
        nonlocal num_examples
        num_examples += 1
        return LibraryMachine(server)

    try:
        if name in PROGRAMS:
            play(server, PROGRAMS[name])
        else:
            run_state_machine_as_test(cast(Any, machine), settings=HUNT)
    except (AssertionError, ResponseError):
        return num_examples
    return None


def play(server: Server, program: Program) -> None:
    state = LibraryMachine(server)
    for rule, arguments in program:
        getattr(state, rule)(**arguments)
        state.check()
