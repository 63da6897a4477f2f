"""The promises notice what they are there to notice, with a model that is broken by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.library.model import Model, Run
from tests.library.promises import Promises

from luthier_core.config import LimitsConfig
from luthier_core.oplog import Completion
from luthier_core.ops import Body, Gradient, Kind, Op, Outcome, digest_of

RUN, TENANT = "r1", "ann"
DONE = Outcome.completed(Body.of(b"1"))


@pytest.fixture
def model() -> Model:
    """Op 0 is committed, 1 failed and the client knows, 2 waits, 4 is parked."""
    model = Model(clock=lambda: 1.0)
    for seq in (0, 1, 2, 4):
        op = Op(
            run_id=RUN,
            seq=seq,
            kind=Kind.FORWARD,
            digest=digest_of(b"a"),
            body=Body.of(b"a"),
        )
        header = {"base_model": "m", "facts": "{}"}
        model.admit(op, tenant=TENANT, limits=LimitsConfig(), header=header)
    model.acquire(RUN, 1, "trainer-0/a")
    model.commit(RUN, 1, 0, DONE)
    model.commit(RUN, 1, 1, Outcome.failure("no", "user"), gradient=Gradient.LOST)
    model.told(RUN, 1)
    return model


def change_outcome(model: Model, run: Run) -> None:
    model.outcomes[RUN, 0] = Outcome.failure("no", "user")


def lose_outcome(model: Model, run: Run) -> None:
    del model.outcomes[RUN, 0]


def lose_entry(model: Model, run: Run) -> None:
    del run.log[2]


def change_entry(model: Model, run: Run) -> None:
    run.log[2] = replace(run.log[2], body=Body.of(b"b"))


def leave_the_next_op_parked(model: Model, run: Run) -> None:
    run.parked[3] = replace(run.parked[4], seq=3)
    run.admissions[3] = run.admissions[4]


def forget_bytes(model: Model, run: Run) -> None:
    run.admissions[2] = (run.admissions[2][0], 0, 0)


def untell(model: Model, run: Run) -> None:
    run.told = -1


def tell_past_an_unknown_failure(model: Model, run: Run) -> None:
    run.untold.add(1)


def forget_the_gap(model: Model, run: Run) -> None:
    run.gap_since = 0


def skip_a_position(model: Model, run: Run) -> None:
    model.num_completed["s", 0] = 2
    model.completed["s", 0] = {
        2: Completion(2, "s:0", "finished", 1),
        4: Completion(4, "s:1", "finished", 1),
    }


def go_back(model: Model, run: Run) -> None:
    run.committed = 0


def commit_above_admitted(model: Model, run: Run) -> None:
    run.committed = 9


def attempt_the_op_after_the_next(model: Model, run: Run) -> None:
    run.attempts[3] = 1, 1


@pytest.mark.parametrize(
    "break_it",
    [
        change_outcome,
        lose_outcome,
        lose_entry,
        change_entry,
        leave_the_next_op_parked,
        forget_bytes,
        untell,
        tell_past_an_unknown_failure,
        forget_the_gap,
        skip_a_position,
        go_back,
        commit_above_admitted,
        attempt_the_op_after_the_next,
    ],
)
def test_a_broken_promise_is_noticed(model: Model, break_it: Callable[[Model, Run], None]) -> None:
    promises = Promises()
    promises.check(model)
    promises.check(model)
    break_it(model, model.runs[RUN])
    with pytest.raises(AssertionError):
        promises.check(model)


def test_a_commit_under_an_older_epoch_is_noticed_whatever_it_commits() -> None:
    promises = Promises()
    promises.note_commit(RUN, 2)
    with pytest.raises(AssertionError):
        promises.note_commit(RUN, 1)


def test_a_copy_of_a_model_does_not_change_with_it(model: Model) -> None:
    saved = model.copy()
    model.commit(RUN, 1, 2, DONE)
    assert saved.training_outcome(RUN, 2) is None
    assert saved.runs[RUN].committed == 1
    assert saved.commit(RUN, 1, 2, DONE).status == "OK"
