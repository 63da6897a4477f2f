"""retrieve_future: what it answers for which id, held open until then, as often as it is asked."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.contract.gateway_client import PROTOBUF, Api, datum
from tests.contract.gateway_stack import LIMITS, GatewayStack

from luthier_core.errors import Unavailable
from luthier_core.oplog import Oplog, connect
from luthier_core.ops import Body, Kind, Op
from luthier_gateway import futures
from luthier_gateway.backends import Backends

ABSENT_SESSION = "0" * 32


@pytest.mark.parametrize(
    "request_id",
    ["", "x", "1", "a:b:c:d", f"{ABSENT_SESSION}:train:0", "s:train:0:-1", "s:train:0:1 ", "}:1"],
)
async def test_an_id_of_no_known_form_is_a_404(api: Api, request_id: str):
    answer = await api.poll(request_id)
    assert answer.status == 404
    assert "request_id" in answer.detail


async def test_an_id_of_a_run_or_sampler_that_is_not_there_is_a_404(api: Api):
    for kind in ("train", "sample"):
        answer = await api.poll(f"{ABSENT_SESSION}:{kind}:0:1")
        assert answer.status == 404
        assert ABSENT_SESSION in answer.detail


async def test_a_seq_that_was_never_accepted_is_gone(api: Api):
    run, sampler = await api.run(), await api.sampler()
    await api.training_output(await run.forward_backward())
    for request_id in (f"{run.run_id}:2", f"{run.run_id}:9999999999", f"{sampler.session_id}:0"):
        answer = await api.poll(request_id)
        assert answer.status == 410
        assert request_id in answer.detail


async def test_a_poll_without_an_id_says_so(api: Api):
    answer = await api.post("retrieve_future", {"allow_metadata_only": True})
    assert answer.status == 400
    assert "request_id" in answer.detail


async def test_a_poll_is_held_and_then_answered_with_what_is_waited_for(api: Api):
    run = await api.run()
    early = await run.forward_backward(seq_id=2)
    answer = await api.poll(early)
    assert answer.status == 408
    body = answer.json()
    reason = body.pop("queue_state_reason")
    assert body == {"type": "try_again", "request_id": early, "queue_state": "active"}
    assert reason.startswith("waiting for seq 1, which has not arrived for ")


async def test_all_open_polls_are_answered_when_the_outcome_is_there(api: Api):
    run = await api.run()
    early = await run.forward_backward(seq_id=2)
    polls = [asyncio.create_task(api.outcome(early)) for _ in range(5)]
    first = await run.forward_backward(seq_id=1)
    answers = await asyncio.gather(*polls, api.outcome(first))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers[:5]}) == 1


async def test_results_and_failures_can_be_fetched_again(api: Api):
    run = await api.run()
    good = await run.forward_backward()
    bad = await run.forward_backward(datum(weights=None))
    step = await run.step()
    for request_id in (good, bad, step, f"{run.run_id}:0"):
        answers = [await api.outcome(request_id) for _ in range(3)]
        assert {answer.status for answer in answers} == {200}
        assert len({answer.body for answer in answers}) == 1


async def test_results_can_be_fetched_after_the_session_has_ended(api: Api):
    run = await api.run()
    request_id = await run.forward_backward()
    session = run.run_id.partition(":")[0]
    await api.post(f"sessions/{session}/finish", {"reason": {"type": "success"}})
    await api.training_output(request_id)


async def test_a_training_result_is_protobuf_and_everything_else_json(api: Api):
    run = await api.run()
    good = await run.forward_backward()
    bad = await run.forward_backward(datum(weights=None))
    step = await run.step()
    types = {
        request_id: (await api.outcome(request_id)).headers["Content-Type"].partition(";")[0]
        for request_id in (good, bad, step, f"{run.run_id}:0")
    }
    assert list(types.values()) == [PROTOBUF] + ["application/json"] * 3


@pytest.mark.parametrize("metadata_only", [True, False, None])
async def test_asking_for_metadata_only_may_bring_the_result(api: Api, metadata_only: bool | None):
    run = await api.run()
    request_id = await run.forward_backward()
    await api.training_output(request_id)
    wanted = {"request_id": request_id, "allow_metadata_only": metadata_only}
    answer = await api.post("retrieve_future", wanted, Accept=PROTOBUF)
    assert answer.headers["Content-Type"] == PROTOBUF


async def test_too_many_open_polls_are_429(
    second_gateway: Callable[..., Any], api: Api, gateway_stack: GatewayStack
):
    tight = await second_gateway(gateway=replace(gateway_stack.config.gateway, max_open_polls=0))
    run = await api.run()
    answer = await tight.poll(f"{run.run_id}:0")
    assert answer.status == 429
    assert int(answer.headers["Retry-After"]) > 0


async def test_a_run_that_no_trainer_takes_is_paused_for_capacity_and_called_out_again(
    api: Api, gateway_stack: GatewayStack
):
    run_id = f"{await api.session()}:train:0"
    body = Body.of(b"{}")
    op = Op(run_id=run_id, seq=0, kind=Kind.CREATE_MODEL, digest="d", body=body)
    async with connect(gateway_stack.config.redis_url) as client:
        oplog = Oplog(client)
        header = {"base_model": "tiny/nobody", "facts": "{}"}
        await oplog.admit(op, tenant="ann", limits=LIMITS, header=header)
        answer = await api.poll(f"{run_id}:0")
        assert answer.status == 408
        assert answer.json()["queue_state"] == "paused_capacity"
        assert "no trainer of tiny/nobody is running" in answer.json()["queue_state_reason"]
        # The gateway that admitted it may have died before it did this.
        assert await oplog.live_runs("tiny/nobody") == [run_id]


async def test_a_poll_gets_a_5xx_only_slowly_because_it_is_repeated_at_once(
    second_gateway: Callable[..., Any], api: Api, monkeypatch: pytest.MonkeyPatch
):
    run = await api.run()
    held = []

    async def hold() -> None:
        held.append(True)

    async def broken(*args: Any, **kwargs: Any) -> None:
        raise Unavailable("the object store")

    monkeypatch.setattr(futures, "hold_in_trouble", hold)
    monkeypatch.setattr(Backends, "run", broken)
    gateway = await second_gateway()
    assert (await gateway.post("get_info", {"model_id": run.run_id})).status == 503
    assert held == []
    assert (await gateway.poll(f"{run.run_id}:0")).status == 503
    assert held == [True]
