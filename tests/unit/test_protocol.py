"""The protocol core, effect by effect, with answers given by hand."""

from collections.abc import Iterable
from typing import Any

import pytest

from luthier_core.oplog import Attempt, Recorded
from luthier_core.ops import Body, Kind, Op, Outcome
from luthier_core.owner import FoldState, Owner
from luthier_core.protocol import (
    COMMIT_DEPTH,
    PROBATION,
    Begin,
    Effect,
    Executed,
    Head,
    Left,
    SnapshotRef,
    Steps,
    Tenure,
    Trim,
    commit_next,
    execute_next,
    recheck,
    store_snapshot,
    take_over,
)

OLDER, NEWER = SnapshotRef(3, 1), SnapshotRef(7, 1)
DONE = Outcome(state="completed")


def played(steps: Steps[Any], answers: Iterable[Any]) -> tuple[list[Effect], Any]:
    """The effects that were yielded, each answered in turn, and what the generator returned."""
    effects, answer = [], None
    remaining = iter(answers)
    while True:
        try:
            effects.append(steps.send(answer))
        except StopIteration as end:
            return effects, end.value
        answer = next(remaining)


def taken_over(restored: list[Any]) -> Tenure:
    """A run of nine committed ops with two snapshots; `restored` answers each Restore."""
    head = Head(1, "w/1", NEWER, OLDER)
    answers = [(head, "a"), "b", (8, 8), *restored, Recorded()]
    _, tenure = played(take_over("r", "w/2"), answers)
    return tenure


def new_tenure(num_ops: int) -> Tenure:
    """A new run whose log holds forward_backwards only."""
    owner = Owner("r", 1, committed=-1)
    op = Op(run_id="r", seq=0, kind=Kind.FORWARD_BACKWARD, digest="", body=Body.of(b""))
    owner.feed(
        [Op(run_id="r", seq=s, kind=op.kind, digest="", body=op.body) for s in range(num_ops)]
    )
    return Tenure("r", "w/1", Head(1, "w/1"), "a", owner, committed=-1, sound=None)


def test_the_first_ops_of_a_tenure_are_begun_one_by_one_then_it_runs_ahead():
    tenure = new_tenure(PROBATION + 2)
    begun = []
    for _ in range(PROBATION):
        assert tenure.depth == 1
        effects, (step, _) = played(execute_next(tenure), [Attempt("OK", 1), Executed(DONE)])
        begun += [effect.seq for effect in effects if isinstance(effect, Begin)]
        played(commit_next(tenure, step, Executed(DONE)), [Attempt("OK")])
    effects, _ = played(execute_next(tenure), [Executed(DONE)])
    assert begun == list(range(PROBATION))
    assert not [effect for effect in effects if isinstance(effect, Begin)]
    assert tenure.depth == COMMIT_DEPTH


def test_a_run_that_another_worker_took_while_redis_was_away_is_left():
    tenure = new_tenure(1)
    played(recheck("r", tenure), [(Head(1, "w/1"), "a")])
    with pytest.raises(Left):
        played(recheck("r", tenure), [(Head(2, "w/2"), "b")])


def test_a_take_over_is_given_up_when_redis_was_away_in_the_midst():
    with pytest.raises(Left):
        played(recheck("r", None), [])


def test_the_log_is_trimmed_up_to_the_snapshot_before():
    effects, _ = played(
        store_snapshot(taken_over([FoldState()]), 8, None, FoldState()), [None, "c", "OK"]
    )
    assert effects[-1] == Trim("r", 2, NEWER.seq)


def test_a_damaged_snapshot_is_not_kept_as_the_one_to_fall_back_on():
    tenure = taken_over([None, FoldState()])
    effects, _ = played(store_snapshot(tenure, 8, None, FoldState()), [None, "c", "OK"])
    assert (tenure.head.snap, tenure.head.prev_snap) == (SnapshotRef(8, 2), OLDER)
    assert effects[-1] == Trim("r", 2, OLDER.seq)
