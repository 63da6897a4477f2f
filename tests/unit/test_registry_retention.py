"""Keep-last-K: the newest of each kind stay, and what somebody wants kept is not counted."""

import pytest
from tests.unit.registry_stack import Stack
from tests.unit.test_registry_housekeeping import has_org, job

from luthier_core.errors import InvalidField, NotFound
from luthier_core.records import RunRecord


async def saved_run(stack: Stack) -> RunRecord:
    """With a1 ... a4 of each kind, the oldest first."""
    await has_org(stack)
    run = await stack.run()
    for seq in range(1, 5):
        for kind in ("weights", "sampler_weights"):
            await stack.save(run, kind=kind, name=f"a{seq}", seq=seq)
    return run


async def ids(stack: Stack, run: RunRecord) -> set[str]:
    rows = (await stack.client.list_run_checkpoints(run.tenant, run.run_id))["checkpoints"]
    return {row["checkpoint_id"] for row in rows}


async def test_a_run_keeps_all_until_its_owner_says_otherwise(stack: Stack) -> None:
    run = await saved_run(stack)
    assert await job(stack, "keep-last") == {"expired": 0}
    assert await stack.client.keep_last("ann", run.run_id) == {"keep_last": 0}
    await stack.client.set_keep_last("ann", run.run_id, 2)
    assert await job(stack, "keep-last") == {"expired": 4}
    assert await job(stack, "keep-last") == {"expired": 0}
    kinds = ("weights", "sampler_weights")
    assert await ids(stack, run) == {f"{kind}/{name}" for kind in kinds for name in ("a3", "a4")}
    with pytest.raises(NotFound):
        await stack.client.resolve("ann", f"tinker://{run.run_id}/weights/a1")
    await stack.client.set_keep_last("ann", run.run_id, None)
    assert await stack.client.keep_last("ann", run.run_id) == {"keep_last": 0}


async def test_what_is_published_or_a_recovery_is_kept_and_not_counted(stack: Stack) -> None:
    run = await saved_run(stack)
    await stack.save(run, name="recovery-9", seq=9)
    await stack.save(run, kind="external_weights", name="out", seq=10)
    await stack.client.publish("ann", run.run_id, "weights", "a1")
    await stack.client.set_keep_last("ann", run.run_id, 1)
    await job(stack, "keep-last")
    assert await ids(stack, run) == {
        *("weights/a1", "weights/a4", "weights/recovery-9"),
        *("sampler_weights/a4", "external_weights/out"),
    }


async def test_an_expired_name_can_be_saved_again(stack: Stack) -> None:
    run = await saved_run(stack)
    await stack.client.set_keep_last("ann", run.run_id, 1)
    await job(stack, "keep-last")
    await stack.save(run, name="a1", seq=7)
    assert "weights/a1" in await ids(stack, run)


async def test_only_the_owner_decides(stack: Stack) -> None:
    run = await saved_run(stack)
    with pytest.raises(NotFound):
        await stack.client.set_keep_last("bob", run.run_id, 1)
    with pytest.raises(InvalidField):
        await stack.client.set_keep_last("ann", run.run_id, -1)
