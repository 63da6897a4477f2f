"""Why is my run waiting, over HTTP."""

from tests.contract.gateway_client import Api

from luthier_core import keys
from luthier_core.oplog import Oplog


async def test_a_run_that_waits_for_a_seq_says_so_to_its_owner_alone(api: Api, stranger: Api):
    run = await api.run()
    await run.step(seq_id=3)
    session = run.run_id.partition(":")[0]
    (row,) = (await api.get(f"sessions/{session}/queue")).json()["runs"]
    assert (row["run_id"], row["num_parked"], row["num_queued"]) == (run.run_id, 1, 0)
    assert "waiting for seq 1" in row["waits_for"]
    assert row["since_s"] >= 0
    assert (await stranger.get(f"sessions/{session}/queue")).status == 404
    for seq in (1, 2):
        await api.result(await run.step(seq_id=seq))
    await api.result(f"{run.run_id}:3")
    assert (await api.get(f"sessions/{session}/queue")).json() == {"runs": []}


async def test_cancelling_an_idle_run_changes_nothing(
    api: Api, stranger: Api, oplog_of_stack: Oplog
):
    run = await api.run()
    path = f"training_runs/{run.run_id}/cancel_queued"
    assert (await stranger.post(path)).status == 404
    assert (await api.post(path)).json() == {"run_id": run.run_id, "num_cancelled": 0}
    await api.result(await run.step())


async def test_what_is_cancelled_fails_and_what_comes_after_is_executed(
    api: Api, oplog_of_stack: Oplog
):
    run = await api.run()
    header = keys.run_header(run.run_id)
    await oplog_of_stack.redis.hset(header, "cancelled_to", 10**6)  # as if all were queued
    error = None
    for _ in range(1000):  # until the trainer has seen it
        outcome = (await api.outcome(await run.step())).json()
        if error := outcome.get("error"):
            break
    assert "cancelled by the owner" in error
    await oplog_of_stack.redis.hset(header, "cancelled_to", run.next_seq - 1)
    for _ in range(1000):
        if "error" not in (await api.outcome(await run.step())).json():
            return
    raise AssertionError("the run is not free")
