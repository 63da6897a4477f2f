"""Streams of the OpenAI API: the whole answer, token by token, and ended with its client."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from tests.contract.gateway_client import BASE_MODEL, Api
from tests.contract.gateway_stack import KEYS, GatewayStack
from tests.contract.openai_client import connected, openai

from luthier_core import keys
from luthier_core.oplog import Oplog
from luthier_core.partials import Partial, encode_partials

USER = {"role": "user", "content": "Hi"}
NUM_PROMPTS = 32
ENDLESS = {"prompt": ["ab"] * NUM_PROMPTS, "n": 32, "max_tokens": 60, "seed": 1}
"""Many times the sequences that run at once: seconds of work."""


@pytest.fixture
async def client(gateway_stack: GatewayStack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connected(gateway_stack) as made:
        yield made


async def rest_of(stream: openai.AsyncStream[Any]) -> list[Any]:
    return [chunk async for chunk in stream]


async def test_a_streamed_completion_is_the_whole_one(client: openai.AsyncOpenAI):
    wanted = {"model": BASE_MODEL, "prompt": ["abc", "Hello"], "n": 3, "seed": 5, "logprobs": 1}
    whole = await client.completions.create(**wanted, max_tokens=30)
    texts, tokens, reasons = [""] * 6, [[] for _ in range(6)], [None] * 6
    num_chunks = 0
    async for chunk in await client.completions.create(**wanted, max_tokens=30, stream=True):
        num_chunks += 1
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.token_logprobs
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.token_logprobs for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert num_chunks > 2 * 6  # it did not come at the end only


async def test_a_streamed_chat_is_the_whole_one_and_tells_its_usage(client: openai.AsyncOpenAI):
    wanted = {"model": BASE_MODEL, "messages": [USER], "seed": 5, "max_tokens": 40}
    scored = {"logprobs": True, "top_logprobs": 2}
    whole = await client.chat.completions.create(**wanted, **scored)
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            **wanted, **scored, stream=True, stream_options={"include_usage": True}
        )
    ]
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in parts)
    assert text == whole.choices[0].message.content
    listed = [t for c in parts if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert listed == whole.choices[0].logprobs.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


async def test_no_part_of_a_stop_string_is_ever_streamed(client: openai.AsyncOpenAI):
    wanted = {"model": BASE_MODEL, "prompt": "xyz", "seed": 2, "max_tokens": 40}
    whole = (await client.completions.create(**wanted)).choices[0].text
    stop = whole[12:16]
    # A beginning of the stop, in front of it, that goes on in another way.
    stops = [stop, whole[4:6] + "\x00"]
    parts = [
        chunk.choices[0].text
        async for chunk in await client.completions.create(**wanted, stop=stops, stream=True)
    ]
    assert "".join(parts) == whole[: whole.index(stop)]


async def test_a_stream_without_a_seed_is_random_and_ends(client: openai.AsyncOpenAI):
    texts = set()
    for _ in range(2):
        stream = await client.chat.completions.create(
            model=BASE_MODEL, messages=[USER], max_tokens=20, stream=True
        )
        texts.add("".join([c.choices[0].delta.content or "" async for c in stream]))
    assert len(texts) == 2


async def test_tokens_behind_a_lost_hint_wait_for_the_outcome(
    client: openai.AsyncOpenAI, oplog_of_stack: Oplog
):
    """Every choice is told tokens that do not follow those before, as if hints had been lost."""
    wanted = {"model": BASE_MODEL, "prompt": "abc", "seed": 9, "max_tokens": 50}
    whole = (await client.completions.create(**wanted, n=8)).choices
    texts = [""] * 8
    stream = await client.completions.create(**wanted, n=8, stream=True)
    async for chunk in stream:
        request_id = chunk.id.removeprefix("cmpl-")
        lost = encode_partials([Partial(i, 1000, [1], [-1.0], []) for i in range(8)])
        await oplog_of_stack.redis.spublish(keys.sampling_partials(request_id), lost)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole]


async def test_tokens_that_are_not_the_outcomes_end_the_stream_with_an_error(
    client: openai.AsyncOpenAI, oplog_of_stack: Oplog
):
    """As if a sampler had told tokens and died, and another had drawn others."""
    wanted = {**ENDLESS, "prompt": ["ab"] * 4}
    stream = await client.completions.create(model=BASE_MODEL, **wanted, stream=True)
    session, _, seq = (await anext(stream)).id.removeprefix("cmpl-").rpartition(":")
    wrong = encode_partials([Partial(31, 0, [1] * 55, [-1.0] * 55, [])])
    last = keys.sampling_partials(f"{session}:{int(seq) + 3}")
    await oplog_of_stack.redis.spublish(last, wrong)
    with pytest.raises(openai.APIError, match="came out differently"):
        await rest_of(stream)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_client_that_goes_away_cancels_its_samples(
    gateway_stack: GatewayStack, oplog_of_stack: Oplog, api: Api, stream: bool
):
    jobs, redis = keys.sampling_jobs(BASE_MODEL), oplog_of_stack.redis
    body = json.dumps({"model": BASE_MODEL, **ENDLESS, "stream": stream})
    headers = {"X-API-Key": KEYS["ann"]}
    url = f"{gateway_stack.url}/v1/completions"
    async with aiohttp.ClientSession() as leaving:
        asking = asyncio.create_task(leaving.post(url, data=body, headers=headers))
        async with asyncio.timeout(30):
            while await redis.xlen(jobs) < NUM_PROMPTS // 2:
                await asyncio.sleep(0)
        _, last = (await redis.xrevrange(jobs, count=1))[0]
        if stream:
            async with await asking as response:
                await response.content.readany()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(30):
        while await redis.xlen(jobs):
            await asyncio.sleep(0)
    outcome = keys.sampling_outcome(last[b"session"].decode(), last[b"seq"].decode())
    assert await redis.hget(outcome, "state") == b"cancelled"
    # There is room again: what comes later is not held up.
    assert len((await (await api.sampler()).sample([1, 2, 3])).sequences) == 1
