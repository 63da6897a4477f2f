"""Which waiting ops make up a cycle."""

from luthier_core.ops import Kind
from luthier_trainer.planner import MAX_OPS_PER_SHARE, Head, Share, plan

FB, STEP, SAVE = Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP, Kind.SAVE_WEIGHTS


def test_an_optimizer_step_runs_in_the_cycle_of_its_gradients():
    heads = [Head("a", "ann", (FB, FB, STEP, FB, STEP), -1)]
    assert plan(heads) == Share("a", "ann", (FB, FB, STEP))


def test_the_tenant_served_longest_ago_is_next():
    heads = [
        Head("a", "ann", (FB, STEP) * 50, 7),
        Head("b", "bob", (STEP,), 3),
        Head("c", "cid", (), 1),
    ]
    assert plan(heads) == Share("b", "bob", (STEP,))


def test_nothing_is_planned_when_nothing_waits():
    assert plan([Head("a", "ann", (), 7)]) is None


def test_of_a_tenants_runs_the_one_served_longest_ago_is_next():
    heads = [Head(f"a{index}", "ann", (STEP,), 9 - index) for index in range(5)]
    assert plan([*heads, Head("b", "bob", (), 11)]) == Share("a4", "ann", (STEP,))


def test_neither_many_runs_nor_a_new_one_bring_a_tenant_forward():
    heads = [Head(f"a{index}", "ann", (STEP,), index) for index in range(9)]
    heads += [Head("new", "ann", (FB,), -1), Head("b", "bob", (FB,), 7)]
    assert plan(heads) == Share("b", "bob", (FB,))


def test_a_run_with_a_deep_queue_gets_no_more_than_a_share():
    assert plan([Head("a", "ann", (FB,) * 100, -1)]) == Share("a", "ann", (FB,) * MAX_OPS_PER_SHARE)


def test_a_save_ends_a_share():
    assert plan([Head("a", "ann", (SAVE, FB), -1)]) == Share("a", "ann", (SAVE,))


def test_a_share_can_be_cut_anywhere_but_between_a_gradient_and_its_step():
    ends = [Share("a", "ann", (FB, FB, FB, STEP)).may_end_after(num) for num in (1, 2, 3)]
    assert ends == [True, True, False]
    assert Share("a", "ann", (FB, FB)).may_end_after(1)
