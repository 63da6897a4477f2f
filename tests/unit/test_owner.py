"""The owner of a run: what is executed, replayed, refused; without any I/O."""

import math

import pytest

from luthier_core.oplog import Recorded
from luthier_core.ops import Body, Kind, Op, Outcome, Refusal
from luthier_core.owner import Action, Diverged, FoldState, Measure, Owner

OK = Outcome(state="completed")
FAILED = Outcome.failure("broken", "server")
FB, STEP, SAVE = Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP, Kind.SAVE_WEIGHTS


def log(*kinds: Kind, told: dict[int, int] | None = None) -> list[Op]:
    ops = [Kind.CREATE_MODEL, *kinds]
    return [
        Op(
            run_id="r",
            seq=seq,
            kind=kind,
            digest="",
            body=Refusal(FB, "no").body() if kind is Kind.REJECTED else Body.of(b""),
            told=(told or {}).get(seq, -1),
        )
        for seq, kind in enumerate(ops)
    ]


def drive(owner: Owner, fails: set[int] = frozenset()) -> list[tuple[int, Action, bool, bool]]:
    """(seq, action, publish, failed) of every step; executing a seq in `fails` fails."""
    steps = []
    while step := owner.next_step():
        executed = FAILED if step.op.seq in fails else OK
        outcome = step.outcome or executed
        owner.ended(outcome)
        steps.append((step.op.seq, step.action, step.publish, outcome.failed))
    return steps


def new(ops: list[Op]) -> Owner:
    owner = Owner("r", 1, committed=-1)
    owner.feed(ops)
    return owner


def test_ops_are_executed_in_order_and_published():
    steps = drive(new(log(FB, STEP)))
    assert steps == [(seq, Action.EXECUTE, True, False) for seq in range(3)]


def test_ops_read_twice_are_executed_once():
    owner = new(log(FB))
    owner.feed(log(FB, STEP))
    assert [step[0] for step in drive(owner)] == [0, 1, 2]


def test_committed_ops_are_replayed_without_publishing_and_saves_are_skipped():
    owner = Owner("r", 2, committed=3)
    owner.feed(log(FB, SAVE, STEP, FB))
    assert drive(owner) == [
        (0, Action.EXECUTE, False, False),
        (1, Action.EXECUTE, False, False),
        (2, Action.NOTHING, False, False),
        (3, Action.EXECUTE, False, False),
        (4, Action.EXECUTE, True, False),
    ]


def test_replay_follows_the_recorded_failure_instead_of_trying_again():
    owner = Owner("r", 2, committed=2, recorded=Recorded(frozenset({1, 2})))
    owner.feed(log(FB, STEP))
    assert drive(owner)[1:] == [
        (1, Action.NOTHING, False, True),
        (2, Action.CLEAR_GRADIENT, False, True),
    ]


def test_a_replayed_op_that_ends_differently_is_noticed():
    owner = Owner("r", 2, committed=1)
    owner.feed(log(FB))
    with pytest.raises(Diverged, match="seq 1"):
        drive(owner, fails={1})


def test_a_broken_run_fails_what_comes_and_executes_nothing():
    owner = Owner("r", 2, committed=1)
    owner.feed(log(FB))
    with pytest.raises(Diverged):
        drive(owner, fails={1})
    owner.break_run("cannot be rebuilt")
    owner.feed(log(FB, STEP))
    assert drive(owner) == [(2, Action.NOTHING, True, True)]


def test_an_optimizer_step_after_an_unknown_failure_fails_and_the_gradient_is_cleared():
    steps = drive(new(log(FB, FB, STEP, FB, STEP)), fails={2})
    assert steps[3] == (3, Action.CLEAR_GRADIENT, True, True)
    assert steps[5] == (5, Action.EXECUTE, True, False)


def test_an_optimizer_step_sent_in_knowledge_of_the_failure_is_obeyed():
    steps = drive(new(log(FB, FB, STEP, told={3: 2})), fails={2})
    assert steps[3] == (3, Action.EXECUTE, True, False)


def test_knowing_an_older_failure_is_not_knowing_a_later_one():
    steps = drive(new(log(FB, FB, STEP, told={3: 1})), fails={1, 2})
    assert steps[3] == (3, Action.CLEAR_GRADIENT, True, True)


def test_an_optimizer_step_that_is_given_up_clears_the_gradient_as_its_replay_will():
    owner = new(log(FB, STEP))
    for _ in range(2):
        owner.next_step()
        owner.ended(OK)
    owner.next_step()
    assert owner.quarantine(3).action is Action.CLEAR_GRADIENT


def test_the_message_of_an_incomplete_gradient_names_the_seq():
    owner = new(log(FB, STEP))
    for _ in range(2):
        step = owner.next_step()
        assert step is not None
        owner.ended(FAILED if step.op.seq == 1 else OK)
    step = owner.next_step()
    assert step is not None
    assert step.outcome is not None
    assert b"gradient of seq 1 missing" in (step.outcome.body.inline or b"")


def test_a_rejected_request_fails_with_its_message_and_counts_as_a_missing_gradient():
    owner = new(log(Kind.REJECTED, STEP))
    steps = drive(owner)
    assert steps[1] == (1, Action.NOTHING, True, True)
    assert steps[2] == (2, Action.CLEAR_GRADIENT, True, True)


def test_a_replay_knows_of_the_incomplete_gradient_as_the_first_run_did():
    owner = Owner("r", 2, committed=1, recorded=Recorded(frozenset({1})))
    owner.feed(log(FB, STEP))
    assert drive(owner)[2] == (2, Action.CLEAR_GRADIENT, True, True)


def history(owner: Owner, checksums: dict[int, str]) -> dict[int, str]:
    """seq -> digest after it, when executing leaves these checksums."""
    digests = {}
    while step := owner.next_step():
        owner.ended(step.outcome or OK, checksums.get(step.op.seq, ""))
        digests[step.op.seq] = owner.state.digest
    return digests


def test_a_replay_that_leaves_another_state_is_noticed_at_its_first_op():
    states = {0: "a", 1: "b", 2: "c"}
    recorded = Recorded(digests=history(new(log(FB, STEP)), states))
    same = Owner("r", 2, committed=2, recorded=recorded)
    same.feed(log(FB, STEP))
    assert history(same, states) == recorded.digests
    other = Owner("r", 2, committed=2, recorded=recorded)
    other.feed(log(FB, STEP))
    with pytest.raises(Diverged, match="seq 1"):
        history(other, {**states, 1: "B"})


@pytest.mark.parametrize(
    ("recorded", "value", "deviation"),
    [(2.0, 2.0, 0.0), (2.0, 2.5, 0.2), (0.0, 0.5, 0.5), (math.nan, math.nan, 0.0)],
)
def test_a_deviation_is_relative_but_for_values_below_the_floor(
    recorded: float, value: float, deviation: float
):
    assert Measure(value, floor=1.0).deviation(recorded) == pytest.approx(deviation)


def test_a_number_instead_of_none_deviates_without_bound():
    assert Measure(math.nan).deviation(1.0) == math.inf
    assert Measure(1.0).deviation(math.inf) == math.inf


def test_a_replay_from_a_snapshot_goes_on_with_its_digest():
    states = {0: "a", 1: "b", 2: "c"}
    digests = history(new(log(FB, STEP)), states)
    state = FoldState(digest=digests[1])
    owner = Owner("r", 2, 2, Recorded(digests=digests), state_seq=1, state=state)
    owner.feed(log(FB, STEP)[2:])
    assert history(owner, states) == {2: digests[2]}
