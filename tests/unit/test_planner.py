"""Which waiting ops make up a cycle."""

from luthier_core.ops import Kind
from luthier_trainer.planner import MAX_OPS_PER_SHARE, Head, Share, plan

FB, STEP, SAVE = Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP, Kind.SAVE_WEIGHTS


def test_an_optimizer_step_runs_in_the_cycle_of_its_gradients():
    assert plan([Head("a", "ann", (FB, FB, STEP, FB, STEP), -1)]) == [Share("a", 3)]


def test_every_waiting_tenant_gets_a_share_and_the_one_served_longest_ago_is_first():
    heads = [
        Head("a", "ann", (FB, STEP) * 50, 7),
        Head("b", "bob", (STEP,), 3),
        Head("c", "cid", (), 1),
    ]
    assert plan(heads) == [Share("b", 1), Share("a", 2)]


def test_a_tenant_with_many_runs_gets_one_share_for_the_run_served_longest_ago():
    heads = [Head(f"a{index}", "ann", (STEP,), 9 - index) for index in range(5)]
    assert plan([*heads, Head("b", "bob", (STEP,), 8)]) == [Share("b", 1), Share("a4", 1)]


def test_a_new_run_does_not_bring_its_tenant_forward():
    heads = [Head("a", "ann", (), 9), Head("new", "ann", (FB,), -1), Head("b", "bob", (FB,), 8)]
    assert plan(heads) == [Share("b", 1), Share("new", 1)]


def test_a_run_with_a_deep_queue_gets_no_more_than_a_share():
    assert plan([Head("a", "ann", (FB,) * 100, -1)]) == [Share("a", MAX_OPS_PER_SHARE)]


def test_a_save_ends_a_share():
    assert plan([Head("a", "ann", (SAVE, FB), -1)]) == [Share("a", 1)]
