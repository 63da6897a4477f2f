"""Which waiting ops make up a cycle, and what a tenant waits for beside others."""

from collections.abc import Iterator, Sequence
from itertools import islice

import pytest

from luthier_core.ops import Kind
from luthier_trainer.planner import (
    MAX_OPS_PER_SHARE,
    MIN_OP_TOKENS,
    QUANTUM_TOKENS,
    Head,
    Planner,
    Share,
    Waiting,
    estimated_tokens,
)

MAX_TOKENS = 2 * QUANTUM_TOKENS
STEP = Waiting(Kind.OPTIM_STEP, MIN_OP_TOKENS)
SAVE = Waiting(Kind.SAVE_WEIGHTS, MIN_OP_TOKENS)


def passes(num_tokens: int) -> Waiting:
    return Waiting(Kind.FORWARD_BACKWARD, num_tokens)


FB = passes(100)


def plan_once(*heads: Head) -> list[Share]:
    return Planner(MAX_TOKENS).plan(heads)


class Queues:
    """The waiting ops of some runs, served cycle by cycle."""

    def __init__(self, ops: dict[str, Sequence[Waiting]]) -> None:
        """By run; a run's id begins with its tenant's name and a dash."""
        self.ops = {run_id: list(waiting) for run_id, waiting in ops.items()}
        self.last_cycle = dict.fromkeys(ops, -1)
        self.planner = Planner(MAX_TOKENS)

    def cycles(self) -> Iterator[list[Share]]:
        """Until nothing waits."""
        number = 0
        while cycle := self.planner.plan([self.head(run_id) for run_id in self.ops]):
            for share in cycle:
                assert tuple(self.ops[share.run_id][: len(share.ops)]) == share.ops
                del self.ops[share.run_id][: len(share.ops)]
                self.last_cycle[share.run_id] = number
            yield cycle
            number += 1

    def head(self, run_id: str) -> Head:
        tenant = run_id.partition("-")[0]
        return Head(run_id, tenant, tuple(self.ops[run_id]), self.last_cycle[run_id])


def num_tokens(cycle: Sequence[Share], tenant: str) -> int:
    return sum(share.num_tokens for share in cycle if share.tenant == tenant)


def test_an_optimizer_step_runs_in_the_cycle_of_its_gradients() -> None:
    head = Head("a", "ann", (FB, FB, STEP, FB, STEP), -1)
    assert plan_once(head) == [Share("a", "ann", (FB, FB, STEP))]


def test_nothing_is_planned_when_nothing_waits() -> None:
    assert plan_once(Head("a", "ann", (), 7)) == []


def test_a_save_ends_a_share() -> None:
    assert plan_once(Head("a", "ann", (SAVE, FB), -1)) == [Share("a", "ann", (SAVE,))]


def test_a_run_with_a_deep_queue_gets_no_more_than_a_share() -> None:
    [share] = plan_once(Head("a", "ann", (passes(64),) * 100, -1))
    assert len(share.ops) == MAX_OPS_PER_SHARE


def test_a_cycle_has_the_shares_of_several_runs_up_to_its_budget() -> None:
    heads = [Head(f"{name}-run", name, (passes(900), STEP), -1) for name in "abcdefghijkl"]
    cycle = plan_once(*heads)
    assert [share.run_id for share in cycle] == [head.run_id for head in heads[: len(cycle)]]
    total = sum(share.num_tokens for share in cycle)
    assert MAX_TOKENS - 900 - 64 < total <= MAX_TOKENS + MIN_OP_TOKENS


def test_a_request_larger_than_the_budget_is_a_cycle_of_its_own() -> None:
    large = passes(10 * MAX_TOKENS)
    assert plan_once(Head("a", "ann", (large, large, STEP), -1)) == [Share("a", "ann", (large,))]


def test_of_a_tenants_runs_the_one_served_longest_ago_is_first() -> None:
    heads = [Head(f"a{index}", "ann", (STEP,), 9 - index) for index in range(5)]
    assert [share.run_id for share in plan_once(*heads)] == ["a4", "a3", "a2", "a1", "a0"]


@pytest.mark.parametrize(
    "big",
    [
        {f"big-{n}": [passes(1000), STEP] * 50 for n in range(50)},
        {"big-0": [passes(1000), STEP] * 2500},
        {"big-0": [passes(50_000), STEP] * 50},
    ],
    ids=["many runs", "one deep queue", "large requests"],
)
def test_a_tenant_with_fifty_times_the_work_does_not_slow_a_small_one(
    big: dict[str, Sequence[Waiting]],
) -> None:
    small = {"small-0": [passes(1000), STEP] * 50}
    alone = sum(1 for _ in Queues(small).cycles())
    queues = Queues({**big, **small})
    cycles = []
    for cycle in queues.cycles():
        cycles.append(cycle)
        if not queues.ops["small-0"]:
            break
    largest = max(op.num_tokens for ops in big.values() for op in ops)

    # Tokens: with each of its own shares it waits for one quantum of the other tenant at most,
    # and for what is left of one op that had begun to save up for its turn.
    assert sum(num_tokens(cycle, "big") for cycle in cycles) <= alone * QUANTUM_TOKENS + largest
    # Cycles: every cycle of the small tenant's has its share, but for those of an op that is a
    # cycle of its own.
    without = [cycle for cycle in cycles if not num_tokens(cycle, "small")]
    assert len(cycles) - len(without) == alone
    assert len(without) <= 1 + alone * QUANTUM_TOKENS // largest


def test_the_runs_of_tenants_alternate_in_a_cycle() -> None:
    heads = [Head(f"a{n}", "ann", (FB,), n) for n in range(3)]
    heads += [Head(f"b{n}", "bob", (FB,), n) for n in range(2)]
    runs = [share.run_id for share in plan_once(*heads)]
    assert runs == ["a0", "b0", "a1", "b1", "a2"]


def test_a_tenant_that_comes_back_is_served_before_those_that_have_just_been() -> None:
    planner = Planner(MAX_TOKENS)
    busy = Head("b", "busy", (FB,) * 9, 0)
    planner.plan([busy, Head("i", "idle", (), -1)])
    assert [s.run_id for s in planner.plan([busy, Head("i", "idle", (FB,), -1)])] == ["i", "b"]


def test_tenants_with_much_to_do_get_equal_tokens_whatever_their_requests_are() -> None:
    queues = Queues(
        {
            **{f"many-{n}": [passes(300), STEP] * 100 for n in range(20)},
            "large-0": [passes(20_000), STEP] * 100,
            "ragged-0": [passes(1 + 37 * n % 5000) for n in range(2000)],
        }
    )
    served = dict.fromkeys(("many", "large", "ragged"), 0)
    for cycle in islice(queues.cycles(), 150):
        for tenant in served:
            served[tenant] += num_tokens(cycle, tenant)
    assert max(served.values()) - min(served.values()) <= 20_000 + 2 * QUANTUM_TOKENS


def test_a_share_can_be_cut_anywhere_but_between_a_gradient_and_its_step() -> None:
    ends = [Share("a", "ann", (FB, FB, FB, STEP)).may_end_after(num) for num in (1, 2, 3)]
    assert ends == [True, True, False]
    assert Share("a", "ann", (FB, FB)).may_end_after(1)


def test_a_tenant_does_not_pay_for_what_was_cut_off() -> None:
    planner = Planner(MAX_TOKENS)
    heads = [Head("a", "ann", (passes(1500),) * 9, 0), Head("b", "bob", (passes(1500),) * 9, 0)]
    served = {"ann": 0, "bob": 0}
    for _ in range(20):
        for share in planner.plan(heads):
            num_ops = 1 if share.tenant == "ann" else len(share.ops)
            planner.give_back(share, num_ops)
            served[share.tenant] += sum(op.num_tokens for op in share.ops[:num_ops])
    assert served["ann"] >= 18 * 1500


def test_every_op_is_served_once_and_each_run_in_its_order() -> None:
    ops = {f"t{n % 3}-{n}": [passes(n * 777 + 1), FB, STEP, SAVE] * 5 for n in range(9)}
    queues = Queues(ops)
    assert sum(len(share.ops) for cycle in queues.cycles() for share in cycle) == 9 * 20
    assert not any(queues.ops.values())


def test_a_tenant_that_was_idle_has_saved_up_nothing() -> None:
    planner = Planner(MAX_TOKENS)
    busy = Head("b", "busy", (passes(4000),) * 9, 0)
    for number in range(5):
        planner.plan([busy, Head("i", "idle", (STEP,) if number == 0 else (), number)])
    back = Head("i", "idle", (passes(4000),) * 9, 5)
    shares = [share for _ in range(4) for share in planner.plan([busy, back])]
    assert abs(num_tokens(shares, "idle") - num_tokens(shares, "busy")) <= QUANTUM_TOKENS


def test_the_tokens_of_a_request_are_estimated_from_its_size() -> None:
    assert estimated_tokens(Kind.FORWARD_BACKWARD, 16_000) == 1000
    assert estimated_tokens(Kind.FORWARD, 10) == MIN_OP_TOKENS
    assert estimated_tokens(Kind.SAVE_WEIGHTS, 16_000) == MIN_OP_TOKENS
