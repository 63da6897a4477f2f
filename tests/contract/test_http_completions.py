"""Completions of sampling sessions, cancellation, size before payload, and status as plain JSON."""

from dataclasses import replace
from typing import Any

import pytest
from tests.contract.gateway_client import Api, Sampler
from tests.contract.gateway_stack import GatewayStack

from luthier_core import keys
from luthier_core.oplog import Oplog
from luthier_core.ops import SEQS_PER_CLONE
from luthier_core.proto import wire_pb2

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
SHORT = {"max_tokens": 2, "temperature": 0}
ENDLESS = {"max_tokens": 60, "stop": []}


async def sample(api: Api, sampler_id: str, seq: int, **fields: Any) -> str:
    wanted = {"prompt": PROMPT, "sampling_params": SHORT, **fields}
    return await Sampler(api, sampler_id).send(seq_id=seq, **wanted)


async def completions(api: Api, sampler_id: str, cursor: int = 0, **fields: Any) -> dict[str, Any]:
    target = {
        "type": "sampling_session",
        "sampling_session_id": sampler_id,
        "cloned_sampler_id": fields.pop("clone", 0),
    }
    answer = await api.post("retrieve_futures", {"target": target, "prev_cursor": cursor, **fields})
    assert answer.status == 200, answer
    return answer.json()


async def all_completions(api: Api, sampler_id: str, count: int) -> tuple[list[str], int]:
    """Ids of the first `count` completions in their order, and the cursor after them."""
    ids: list[str] = []
    cursor = 0
    while len(ids) < count:
        answer = await completions(api, sampler_id, cursor)
        ids += [item["request_id"] for item in answer["completions"]]
        cursor = answer["cursor"]
    return ids, cursor


async def test_every_finished_sample_is_listed_once_and_its_result_can_be_fetched(api: Api):
    sampler_id = (await api.sampler()).session_id
    sent = [await sample(api, sampler_id, seq) for seq in range(5)]
    ids, cursor = await all_completions(api, sampler_id, 5)
    assert sorted(ids) == sorted(sent)
    assert (await completions(api, sampler_id, cursor, timeout=0))["completions"] == []
    for request_id in ids:
        assert len((await api.samples(request_id)).sequences) == 1


async def test_a_completion_says_how_large_its_result_is(api: Api):
    sampler_id = (await api.sampler()).session_id
    request_id = await sample(api, sampler_id, 0)
    (item,) = (await completions(api, sampler_id))["completions"]
    body = (await api.outcome(request_id)).body
    assert item == {
        "state": "finished",
        "request_id": request_id,
        "response_payload_uncompressed_size": len(body),
    }


async def test_a_refused_sample_is_listed_as_failed(api: Api):
    sampler_id = (await api.sampler()).session_id
    request_id = await sample(api, sampler_id, 0, prompt={"chunks": []})
    answer = await completions(api, sampler_id)
    assert answer["completions"] == [{"state": "failed", "request_id": request_id}]
    assert "prompt" in await api.failure(request_id)


async def test_a_lost_reply_is_repeated_until_a_poll_acknowledges_it(api: Api):
    sampler_id = (await api.sampler()).session_id
    await sample(api, sampler_id, 0)
    first = await completions(api, sampler_id)
    assert await completions(api, sampler_id) == first
    after = await completions(api, sampler_id, first["cursor"], timeout=0)
    assert after == {"completions": [], "cursor": first["cursor"]}
    assert (await completions(api, sampler_id, timeout=0))["completions"] == []


async def test_an_empty_poll_is_held_and_gives_the_cursor_back(api: Api):
    sampler_id = (await api.sampler()).session_id
    await sample(api, sampler_id, 0)
    _, cursor = await all_completions(api, sampler_id, 1)
    assert await completions(api, sampler_id, cursor) == {"completions": [], "cursor": cursor}


async def test_each_handle_of_a_sampling_session_has_a_list_of_its_own(api: Api):
    sampler_id = (await api.sampler()).session_id
    mine = await sample(api, sampler_id, 0)
    clones = await sample(api, sampler_id, 3 * SEQS_PER_CLONE + 1)
    assert (await all_completions(api, sampler_id, 1))[0] == [mine]
    other = await completions(api, sampler_id, clone=3)
    assert [item["request_id"] for item in other["completions"]] == [clones]


async def test_acknowledged_results_expire_soon_and_others_keys_are_left_alone(
    api: Api, oplog_of_stack: Oplog
):
    sampler_id = (await api.sampler()).session_id
    ids = [await sample(api, sampler_id, seq) for seq in range(2)]
    await all_completions(api, sampler_id, 2)
    foreign = "another:sample:0:1"
    await completions(api, sampler_id, 2, timeout=0, retrieved_request_ids=[ids[0], foreign, "x"])
    ttl_ms = [
        await oplog_of_stack.redis.pttl(keys.sampling_outcome(sampler_id, seq)) for seq in (0, 1)
    ]
    assert ttl_ms[0] <= 60_000 < ttl_ms[1]


async def test_completions_of_another_tenant_are_absent(api: Api, stranger: Api):
    sampler_id = (await api.sampler()).session_id
    target = {"type": "sampling_session", "sampling_session_id": sampler_id}
    answer = await stranger.post("retrieve_futures", {"target": target})
    assert answer.status == 404


async def test_a_cancelled_sample_ends_at_once_and_stays_cancelled(api: Api):
    sampler_id = (await api.sampler()).session_id
    request_id = await sample(api, sampler_id, 0, num_samples=16, sampling_params=ENDLESS)
    for _ in range(2):
        assert (await api.post("cancel_future", {"request_id": request_id})).status == 200
    message = await api.failure(request_id)
    assert message == "cancelled"
    # The engine has room again: what comes later is not held up by what was cancelled.
    later = await sample(api, sampler_id, 1)
    assert len((await api.samples(later)).sequences) == 1
    assert await api.failure(request_id) == "cancelled"


async def test_cancelling_what_is_done_unknown_or_foreign_changes_nothing(api: Api, stranger: Api):
    sampler_id = (await api.sampler()).session_id
    request_id = await sample(api, sampler_id, 0)
    before = (await api.outcome(request_id)).body
    waiting = await sample(api, sampler_id, 1, num_samples=8, sampling_params=ENDLESS)
    for caller, wanted in [
        (api, request_id),
        (api, f"{sampler_id}:99"),
        (api, "no id of ours"),
        (stranger, waiting),
    ]:
        assert (await caller.post("cancel_future", {"request_id": wanted})).status == 200
    assert (await api.outcome(request_id)).body == before
    assert len((await api.samples(waiting)).sequences) == 8


async def test_training_is_not_cancelled(api: Api):
    run = await api.run()
    answer = await api.post("cancel_future", {"request_id": f"{run.run_id}:0"})
    assert answer.status == 400
    assert "only samples" in answer.detail


async def test_a_large_result_is_announced_by_its_size_to_clients_that_allow_it(
    api: Api, gateway_stack: GatewayStack, second_gateway: Any
):
    run = await api.run()
    request_id = await run.forward_backward()
    whole = (await api.outcome(request_id)).body
    peeking = await second_gateway(gateway=replace(gateway_stack.config.gateway, peek_bytes=10))
    wanted = {"request_id": request_id, "allow_metadata_only": True}
    answer = await peeking.post("retrieve_future", wanted)
    assert answer.json() == {"status": "complete_metadata", "response_payload_size": len(whole)}
    assert (await peeking.outcome(request_id)).body == whole


@pytest.mark.parametrize("fails", [False, True])
async def test_the_status_of_a_training_op_is_plain_json(api: Api, fails: bool):
    run = await api.run()
    request_id = await run.send("optim_step", adam_params={"learning_rate": -1.0 if fails else 0.1})
    await api.outcome(request_id)
    status = (await api.get(f"futures/{request_id}")).json()
    if fails:
        assert (status["status"], status["category"], status["result"]) == ("failed", "user", None)
        assert "learning_rate" in status["error"]
    else:
        assert (status["status"], status["error"]) == ("completed", None)
        assert "metrics" in status["result"]


async def test_the_status_has_the_numbers_of_a_protobuf_result(api: Api):
    run = await api.run()
    request_id = await run.forward_backward()
    output = await api.training_output(request_id)
    result = (await api.get(f"futures/{request_id}")).json()["result"]
    assert result["metrics"] == pytest.approx(dict(output.metrics))
    (datum,) = result["loss_fn_outputs"]
    expected = output.loss_fn_outputs[0].fields["logprobs"]
    assert datum["logprobs"]["dtype"] == "float32"
    assert 4 * len(datum["logprobs"]["data"]) == len(expected.data)

    sampler_id = (await api.sampler()).session_id
    sampled = await sample(api, sampler_id, 0, prompt_logprobs=True, topk_prompt_logprobs=2)
    response: wire_pb2.SampleResponse = await api.samples(sampled)
    result = (await api.get(f"futures/{sampled}")).json()["result"]
    assert 4 * len(result["sequences"][0]["tokens"]) == len(response.sequences[0].tokens)
    assert result["prompt_logprobs"][0] is None
    assert [row and len(row) for row in result["topk_prompt_logprobs"]] == [None, 2, 2]


async def test_a_pending_future_says_what_it_waits_for(api: Api):
    run = await api.run()
    request_id = await run.forward_backward(seq_id=2)
    status = (await api.get(f"futures/{request_id}")).json()
    assert status["status"] == "pending"
    assert status["reason"].startswith("waiting for seq 1, which has not arrived")


async def test_a_cursor_that_redis_has_forgotten_is_set_back_and_hides_nothing(api: Api):
    sampler_id = (await api.sampler()).session_id
    sent = await sample(api, sampler_id, 0)
    _, last = await all_completions(api, sampler_id, 1)
    answer = await completions(api, sampler_id, cursor=last + 7)  # as before Redis was rolled back
    assert [item["request_id"] for item in answer["completions"]] == [sent]
    assert answer["cursor"] == last
