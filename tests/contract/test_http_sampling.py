"""Sampling over HTTP: what a sampling session answers, when it stops, and what it refuses."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.contract.gateway_client import (
    BASE_MODEL,
    Api,
    Sampler,
    datum,
    floats_of,
    int64,
    logprobs_of,
    tokens_of,
)
from tests.contract.gateway_stack import (
    EOS,
    LETTERS,
    LIMITS,
    MAX_CONTEXT_TOKENS,
    VOCAB_SIZE,
    GatewayStack,
)

from luthier_core.proto import wire_pb2

ABSENT_SESSION = "0" * 32
PROMPT = (3, 14, 15, 92, 65, 35)
STOP, LENGTH = wire_pb2.STOP_REASON_STOP, wire_pb2.STOP_REASON_LENGTH
Params = dict[str, Any]
GREEDY: Params = {"temperature": 0.0, "max_tokens": 12, "stop": []}


def all_tokens(response: wire_pb2.SampleResponse) -> list[list[int]]:
    return [tokens_of(sequence) for sequence in response.sequences]


# --- results --------------------------------------------------------------------------------------


async def test_there_is_an_id_for_each_sequence_and_a_logprob_for_each_token(api: Api):
    sampler = await api.sampler()
    accepted = (await sampler.post(num_samples=3)).json()
    ids = accepted["sample_sequence_ids"]
    response = await api.samples(accepted["request_id"])
    assert len(ids) == len(set(ids)) == len(response.sequences) == 3
    for sequence in response.sequences:
        logprobs = floats_of(sequence.logprobs)
        assert len(logprobs) == len(tokens_of(sequence)) > 0
        assert all(value <= 0 for value in logprobs)


async def test_greedy_samples_are_alike_and_seeded_ones_can_be_repeated(api: Api):
    sampler = await api.sampler()
    greedy = await sampler.sample(PROMPT, sampling_params=GREEDY, num_samples=2)
    assert all_tokens(greedy)[0] == all_tokens(greedy)[1]
    seeded = {"seed": 5, "max_tokens": 20, "stop": []}
    first = all_tokens(await sampler.sample(PROMPT, sampling_params=seeded, num_samples=4))
    again = all_tokens(await sampler.sample(PROMPT, sampling_params=seeded, num_samples=4))
    assert first == again
    assert len({tuple(tokens) for tokens in first}) == 4  # one seed, four different samples


async def test_prompt_logprobs_are_those_of_training_and_the_first_is_missing(api: Api):
    sampler, run = await api.sampler(), await api.run()
    params = {"max_tokens": 1}
    response = await sampler.sample(PROMPT, sampling_params=params, prompt_logprobs=True)
    sampled = floats_of(response.prompt_logprobs)
    inputs = datum(PROMPT[:-1], target_tokens=int64(PROMPT[1:]))
    trained = logprobs_of(await api.training_output(await run.forward_backward(inputs)))[0]
    assert math.isnan(sampled[0])
    assert sampled[1:] == pytest.approx(trained, abs=1e-5)


async def test_a_prompt_of_the_whole_context_can_be_scored(api: Api):
    sampler = await api.sampler()
    prompt = [index % VOCAB_SIZE for index in range(MAX_CONTEXT_TOKENS)]
    params = {"max_tokens": 1}
    response = await sampler.sample(prompt, sampling_params=params, prompt_logprobs=True)
    assert len(floats_of(response.prompt_logprobs)) == MAX_CONTEXT_TOKENS
    assert len(all_tokens(response)[0]) == 1


async def test_top_k_logprobs_come_where_they_are_asked_for(api: Api):
    sampler = await api.sampler()
    response = await sampler.sample(
        PROMPT, sampling_params=GREEDY, topk_prompt_logprobs=2, topk_sample_logprobs=3
    )
    assert (response.topk_prompt_logprobs.k, response.topk_prompt_logprobs.length) == (2, 6)
    table = response.sequences[0].topk_sampled_logprobs
    assert (table.k, table.length) == (3, 12)
    best = tokens_of(response.sequences[0])
    ids = memoryview(table.token_ids).cast("i").tolist()
    assert ids[::3] == best


async def test_chosen_tokens_are_scored_along_the_prompt(api: Api):
    sampler = await api.sampler()
    rows = len(PROMPT) - 1
    targets = {"data": [token for token in PROMPT[1:] for _ in "ab"], "shape": [rows, 2]}
    ends, columns = [0] * rows + [1], [7]
    sparse = {"sparse_crow_indices": ends, "sparse_col_indices": columns}
    common = {"sampling_params": {"max_tokens": 1, "seed": 1}, "prompt_logprobs": True}
    dense_answer, sparse_answer = [
        await sampler.sample(PROMPT, target_prompt_logprobs={**tensor, "dtype": "int64"}, **common)
        for tensor in (targets, {"data": [PROMPT[-1]], "shape": [rows, 9], **sparse})
    ]
    expected = floats_of(dense_answer.prompt_logprobs)[1:]
    found = floats_of(dense_answer.target_prompt_logprobs.dense)
    assert found[::2] == found[1::2] == pytest.approx(expected, abs=1e-6)
    csr = sparse_answer.target_prompt_logprobs.sparse_csr
    assert floats_of(csr.values) == pytest.approx(expected[-1:], abs=1e-6)


async def test_the_last_logprobs_and_other_tokens_of_the_prompt_come_if_asked_for(api: Api):
    sampler = await api.sampler()
    response = await sampler.sample(
        PROMPT,
        sampling_params={"max_tokens": 1, "seed": 1},
        prompt_logprobs=True,
        prompt_logprobs_last_n=2,
        prompt_alt_tokens_k=3,
    )
    missing = [math.isnan(number) for number in floats_of(response.prompt_logprobs)]
    assert missing == [True] * (len(PROMPT) - 2) + [False] * 2
    alternatives = response.prompt_alt_tokens
    assert list(alternatives.tokens.shape) == [len(PROMPT) - 1, 3]
    assert len(floats_of(alternatives.logprobs.dense)) == 3 * (len(PROMPT) - 1)


async def test_a_large_prompt_takes_the_way_through_the_store(api: Api):
    sampler = await api.sampler()
    stop = ["x" * 200] * 100
    response = await sampler.sample(sampling_params={"max_tokens": 2, "stop": stop})
    assert len(all_tokens(response)[0]) == 2


# --- when it stops --------------------------------------------------------------------------------


async def test_max_tokens_is_the_limit_and_without_it_the_context_is(api: Api):
    sampler = await api.sampler()
    response = await sampler.sample(PROMPT, sampling_params=GREEDY)
    assert (len(all_tokens(response)[0]), response.sequences[0].stop_reason) == (12, LENGTH)
    response = await sampler.sample(PROMPT, sampling_params={"stop": []})
    assert len(PROMPT) + len(all_tokens(response)[0]) in (
        MAX_CONTEXT_TOKENS,
        MAX_CONTEXT_TOKENS + 1,
    )
    assert response.sequences[0].stop_reason == LENGTH


async def test_an_absent_stop_is_the_end_token_and_an_empty_list_stops_nothing(api: Api):
    sampler = await api.sampler()
    params = {"seed": 2, "max_tokens": 50}
    wanted: dict[str, Any] = {"num_samples": 32}
    free = await sampler.sample(PROMPT, sampling_params={**params, "stop": []}, **wanted)
    assert {len(tokens) for tokens in all_tokens(free)} == {50}
    for absent in ({}, {"stop": None}):
        stopped = await sampler.sample(PROMPT, sampling_params={**params, **absent}, **wanted)
        for sequence, longer in zip(stopped.sequences, all_tokens(free), strict=True):
            end = longer.index(EOS) + 1 if EOS in longer else 50
            # The end token is part of the answer, and the last of it.
            assert tokens_of(sequence) == longer[:end]
            assert sequence.stop_reason == (STOP if EOS in longer else LENGTH)
        assert STOP in {sequence.stop_reason for sequence in stopped.sequences}


@pytest.mark.parametrize("count", [1, 2])
async def test_a_token_id_stops_and_is_the_last_of_the_answer(api: Api, count: int):
    sampler = await api.sampler()
    free = all_tokens(await sampler.sample(PROMPT, sampling_params=GREEDY))[0]
    stops = [free[5], VOCAB_SIZE - 1][:count]
    response = await sampler.sample(PROMPT, sampling_params={**GREEDY, "stop": stops})
    assert all_tokens(response)[0] == free[: free.index(free[5]) + 1]
    assert response.sequences[0].stop_reason == STOP


@pytest.mark.parametrize("as_list", [True, False])
async def test_a_string_stops_with_the_token_that_completes_it(api: Api, as_list: bool):
    sampler = await api.sampler()
    free = all_tokens(await sampler.sample(PROMPT, sampling_params=GREEDY))[0]
    text = "".join(LETTERS[token] for token in free)
    word = text[4:6]
    stop = [word, "never"] if as_list else word
    response = await sampler.sample(PROMPT, sampling_params={**GREEDY, "stop": stop})
    assert all_tokens(response)[0] == free[: text.index(word) + 2]
    assert response.sequences[0].stop_reason == STOP


# --- weights --------------------------------------------------------------------------------------


async def test_a_sampling_session_has_the_weights_of_the_moment_it_was_saved(api: Api):
    session = await api.session()
    run = await api.run(session)
    base = await api.sampler(session)
    before = all_tokens(await base.sample(PROMPT, sampling_params=GREEDY))
    for _ in range(3):
        await run.forward_backward(datum(PROMPT))
        await run.step(learning_rate=0.5)
    saved = await run.send("save_weights_for_sampler", sampling_session_seq_id=1)
    named = await run.send("save_weights_for_sampler", path="after-3")
    for _ in range(2):
        await run.forward_backward(datum(PROMPT))
        await run.step(learning_rate=0.5)
    trained = (await api.result(saved))["sampling_session_id"]
    assert trained == f"{session}:sample:1"
    path = (await api.result(named))["path"]
    assert path == f"tinker://{run.run_id}/sampler_weights/after-3"
    base.session_id, base.next_seq = trained, 0
    ephemeral = all_tokens(await base.sample(PROMPT, sampling_params=GREEDY))
    from_path = await api.sampler(session, sampling_session_seq_id=2, model_path=path)
    assert all_tokens(await from_path.sample(PROMPT, sampling_params=GREEDY)) == ephemeral
    assert ephemeral != before


async def test_a_training_checkpoint_can_be_sampled_from(api: Api):
    """Examples of the SDK give the path of one; its weights are those of a sampler's."""
    session = await api.session()
    run = await api.run(session)
    for _ in range(3):
        await run.forward_backward(datum(PROMPT))
        await run.step(learning_rate=0.5)
    texts = []
    for index, endpoint in enumerate(("save_weights", "save_weights_for_sampler")):
        path = (await api.result(await run.send(endpoint, path="x")))["path"]
        sampler = await api.sampler(session, sampling_session_seq_id=index, model_path=path)
        texts.append(all_tokens(await sampler.sample(PROMPT, sampling_params=GREEDY)))
    assert texts[0] == texts[1]


async def test_in_flight_sampling_sessions_have_the_weights_that_were_saved_last(api: Api):
    run = await api.run()

    async def save(number: int, kind: str) -> Sampler:
        wanted = {"sampling_session_seq_id": number, "kind": kind}
        saved = await api.result(await run.send("save_weights_for_sampler", **wanted))
        return Sampler(api, saved["sampling_session_id"])

    async def logprobs(sampler: Sampler) -> list[float]:
        found = await sampler.sample(PROMPT, sampling_params=GREEDY, prompt_logprobs=True)
        return floats_of(found.prompt_logprobs)[1:]

    first, snapshot = await save(0, "inflight"), await save(1, "snapshot")
    before = await logprobs(first)
    assert before == await logprobs(snapshot)
    await run.forward_backward(datum(PROMPT))
    await run.step(learning_rate=0.5)
    second = await save(2, "inflight")
    assert second.session_id != first.session_id
    after = await logprobs(second)
    assert after == await logprobs(first)
    assert after != before
    assert before == await logprobs(snapshot)


async def test_samplers_are_described_without_their_weights(api: Api):
    session = await api.session()
    base = await api.sampler(session)
    described = (await api.get(f"samplers/{base.session_id}")).json()
    run = await api.run(session)
    info = (await api.post("get_info", {"model_id": run.run_id})).json()
    assert described == {
        "sampler_id": base.session_id,
        "base_model": BASE_MODEL,
        "tokenizer_id": info["model_data"]["tokenizer_id"],
    }
    path = (await api.result(await run.send("save_weights_for_sampler", path="x")))["path"]
    named = await api.sampler(session, sampling_session_seq_id=1, model_path=path)
    described = (await api.get(f"samplers/{named.session_id}")).json()
    assert described["model_path"] == path
    assert described["base_model"] == BASE_MODEL


async def test_a_sampling_session_sent_again_is_the_same(api: Api):
    session = await api.session()
    assert (await api.sampler(session)).session_id == (await api.sampler(session)).session_id


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({}, "base_model or model_path"),
        ({"base_model": "huge"}, BASE_MODEL),
        ({"model_path": "weights/x"}, "tinker://"),
        ({"base_model": BASE_MODEL, "sampling_session_seq_id": -1}, "sampling_session_seq_id"),
    ],
)
async def test_a_sampling_session_of_nothing_is_a_400(api: Api, weights: dict, said: str):
    wanted = {"session_id": await api.session(), "sampling_session_seq_id": 0, **weights}
    answer = await api.post("create_sampling_session", wanted)
    assert answer.status == 400
    assert said in answer.detail


# --- retries, refusals, limits --------------------------------------------------------------------


async def test_a_sample_sent_again_is_the_same_and_another_body_is_a_400(api: Api):
    sampler = await api.sampler()
    answers = [await sampler.post(PROMPT, seq_id=4, num_samples=2) for _ in range(2)]
    response = await api.samples(answers[0].json()["request_id"])
    answers.append(await sampler.post(PROMPT, seq_id=4, num_samples=2))
    assert len({answer.body for answer in answers}) == 1
    assert await api.samples(answers[2].json()["request_id"]) == response
    other = await sampler.post(PROMPT, seq_id=4, num_samples=3)
    assert other.status == 400
    assert "seq_id: 4" in other.detail


async def test_seqs_need_no_order_and_may_have_63_bits(api: Api):
    sampler = await api.sampler()
    for seq in (2**63 - 1, 7, 10**18, 0):
        request_id = await sampler.send(seq_id=seq)
        assert request_id.endswith(f":{seq}")
        await api.samples(request_id)


BAD_SAMPLES: dict[str, tuple[list[int], dict[str, Any], str, str]] = {
    "empty prompt": ([], {}, "prompt: empty", "at least one token"),
    "token beyond the vocabulary": (
        [1, VOCAB_SIZE],
        {},
        f"prompt: token id {VOCAB_SIZE} at position 1",
        f"0 to {VOCAB_SIZE - 1}",
    ),
    "negative token": ([-1], {}, "prompt: token id -1", f"0 to {VOCAB_SIZE - 1}"),
    "prompt over the context": (
        [1] * (MAX_CONTEXT_TOKENS + 1),
        {},
        f"prompt: {MAX_CONTEXT_TOKENS + 1} tokens",
        f"{MAX_CONTEXT_TOKENS}",
    ),
    "max_tokens over the context": (
        [1],
        {"sampling_params": {"max_tokens": 10_000}},
        "sampling_params.max_tokens: 10000",
        "at most",
    ),
    "max_tokens 0": (
        [1],
        {"sampling_params": {"max_tokens": 0}},
        "sampling_params.max_tokens",
        "greater than or equal to 1, got 0",
    ),
    "temperature": (
        [1],
        {"sampling_params": {"temperature": -1}},
        "sampling_params.temperature",
        "greater than or equal to 0, got -1",
    ),
    "top_k": (
        [1],
        {"sampling_params": {"top_k": -2}},
        "sampling_params.top_k",
        "greater than or equal to -1, got -2",
    ),
    "stop beyond the vocabulary": (
        [1],
        {"sampling_params": {"stop": [VOCAB_SIZE]}},
        f"sampling_params.stop: token id {VOCAB_SIZE}",
        f"0 to {VOCAB_SIZE - 1}",
    ),
    "too many samples": (
        [1],
        {"num_samples": LIMITS.max_num_samples + 1},
        f"num_samples: {LIMITS.max_num_samples + 1}",
        f"at most {LIMITS.max_num_samples}",
    ),
    "no prompt": ([], {"prompt": None}, "prompt", "required"),
    "chunks that are no list": ([], {"prompt": {"chunks": 5}}, "prompt.chunks", "list"),
    "an image": (
        [],
        {"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}},
        "chunk of type 'image'",
        "encoded_text",
    ),
    "more last logprobs than the prompt has": (
        [1, 2],
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 2},
        "prompt_logprobs_last_n: 2",
        "from 1 to 1",
    ),
    "targets of another prompt": (
        [1, 2],
        {"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [2, 1]}},
        "target_prompt_logprobs.shape",
        "[1, K]",
    ),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
async def test_a_bad_sample_fails_its_future_and_the_sampler_goes_on(api: Api, name: str):
    prompt, fields, field, allowed = BAD_SAMPLES[name]
    sampler = await api.sampler()
    answer = await sampler.post(prompt, **fields)
    assert answer.status == 200
    accepted = answer.json()
    assert accepted["sample_sequence_ids"]
    message = await api.failure(accepted["request_id"])
    assert field in message
    assert allowed in message[message.index(field) :]
    assert len((await sampler.sample()).sequences) == 1


async def test_a_refused_sample_has_an_id_for_each_sequence_that_was_wanted(api: Api):
    answer = await (await api.sampler()).post([], num_samples=5)
    assert len(answer.json()["sample_sequence_ids"]) == 5


@pytest.mark.parametrize("fields", [{"seq_id": -1}, {"seq_id": 2**63}, {"seq_id": "1"}, {}])
async def test_a_sample_without_usable_ids_is_a_400(api: Api, fields: dict[str, Any]):
    sampler = await api.sampler()
    wanted = {"sampling_session_id": sampler.session_id, "prompt": {"chunks": []}, **fields}
    answer = await api.post("asample", wanted)
    assert answer.status == 400
    assert "seq_id" in answer.detail


async def test_a_full_queue_is_429_and_can_be_sent_again(
    second_gateway: Callable[..., Any], api: Api
):
    tight = await second_gateway(limits=replace(LIMITS, max_queued_samples=0))
    sampler = await api.sampler()
    wanted = {
        "sampling_session_id": sampler.session_id,
        "seq_id": 0,
        "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 4},
    }
    refused = await tight.post("asample", wanted)
    assert refused.status == 429
    assert int(refused.headers["Retry-After"]) > 0
    accepted = await api.post("asample", wanted)
    assert accepted.status == 200
    await api.samples(accepted.json()["request_id"])


async def test_many_samples_at_once_are_all_answered(api: Api, gateway_stack: GatewayStack):
    sampler = await api.sampler()
    ids = [await sampler.send(seq_id=seq, num_samples=seq % 3 + 1) for seq in range(40)]
    for seq, request_id in enumerate(ids):
        assert len((await api.samples(request_id)).sequences) == seq % 3 + 1


# --- handles of one session -----------------------------------------------------------------------


async def test_each_handle_that_joins_has_a_number_of_its_own_and_a_retry_the_same(api: Api):
    session_id = (await api.sampler()).session_id
    wanted = {"sampling_session_id": session_id}

    async def join(**headers: str) -> int:
        return int(
            (await api.post("join_sampling_session", wanted, **headers)).json()["client_counter"]
        )

    first = await join(X_Idempotency_Key="a")
    others = [await join(), await join(X_Idempotency_Key="b")]
    assert await join(X_Idempotency_Key="a") == first == 1
    assert len({first, *others, await join()}) == 4
    assert min(others) > first


async def test_samples_of_another_handle_do_not_collide(api: Api):
    sampler = await api.sampler()
    wanted = {"sampling_session_id": sampler.session_id}
    clone = (await api.post("join_sampling_session", wanted)).json()["client_counter"]
    ids = [await sampler.send([1], seq_id=0), await sampler.send([2], seq_id=clone * 10**9)]
    assert len(set(ids)) == 2
    for request_id in ids:
        await api.samples(request_id)


async def test_a_session_that_is_not_there_or_not_mine_cannot_be_joined(api: Api, stranger: Api):
    session_id = (await api.sampler()).session_id
    for client, name in ((api, f"{ABSENT_SESSION}:sample:0"), (stranger, session_id)):
        answer = await client.post("join_sampling_session", {"sampling_session_id": name})
        assert answer.status == 404
