"""Which waiting ops make up a cycle."""

from luthier_core.ops import Kind
from luthier_trainer.planner import MAX_OPS_PER_SHARE, Head, Share, plan

FB, STEP, SAVE = Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP, Kind.SAVE_WEIGHTS


def test_an_optimizer_step_runs_in_the_cycle_of_its_gradients():
    assert plan([Head("a", (FB, FB, STEP, FB, STEP), -1)]) == [Share("a", 3)]


def test_every_waiting_run_gets_a_share_and_the_one_served_longest_ago_is_first():
    heads = [Head("a", (FB, STEP) * 50, 7), Head("b", (STEP,), 3), Head("c", (), 1)]
    assert plan(heads) == [Share("b", 1), Share("a", 2)]


def test_a_run_with_a_deep_queue_gets_no_more_than_a_share():
    assert plan([Head("a", (FB,) * 100, -1)]) == [Share("a", MAX_OPS_PER_SHARE)]


def test_a_save_ends_a_share():
    assert plan([Head("a", (SAVE, FB), -1)]) == [Share("a", 1)]
