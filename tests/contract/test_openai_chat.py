"""Chat completions through the official `openai` client."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.contract.gateway_client import BASE_MODEL, Api, floats_of, tokens_of
from tests.contract.gateway_stack import MAX_CONTEXT_TOKENS, GatewayStack
from tests.contract.openai_client import connected, openai, text_of, tokens_in

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be-short."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]},
]
RENDERED = "sBe-short./uHi!/a"
"""Of MESSAGES, by the chat template of the stack's model."""
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture
async def client(gateway_stack: GatewayStack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connected(gateway_stack) as made:
        yield made


async def test_a_chat_is_the_sample_of_its_rendered_prompt(client: openai.AsyncOpenAI, api: Api):
    params = {"seed": 11, "temperature": 0.7}
    answer = await client.chat.completions.create(
        model=BASE_MODEL, messages=MESSAGES, n=2, max_completion_tokens=12, **params
    )
    sampler = await api.sampler()
    response = await sampler.sample(
        tokens_in(RENDERED), num_samples=2, sampling_params={"max_tokens": 12, **params}
    )
    assert answer.object == "chat.completion"
    assert [choice.message.role for choice in answer.choices] == ["assistant", "assistant"]
    expected = [text_of(tokens_of(sequence)) for sequence in response.sequences]
    assert [choice.message.content for choice in answer.choices] == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(RENDERED)


async def test_logprobs_come_with_each_token_and_the_likeliest_others(
    client: openai.AsyncOpenAI, api: Api
):
    params = {"seed": 4, "max_tokens": 8}
    answer = await client.chat.completions.create(
        model=BASE_MODEL, messages=MESSAGES, logprobs=True, top_logprobs=3, **params
    )
    response = await (await api.sampler()).sample(tokens_in(RENDERED), sampling_params=params)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    listed = choice.logprobs.content
    assert listed is not None
    assert "".join(token.token for token in listed) == choice.message.content
    expected = floats_of(response.sequences[0].logprobs)[: len(listed)]
    assert [token.logprob for token in listed] == pytest.approx(expected)
    for token in listed:
        assert token.bytes == list(token.token.encode())
        top = [other.logprob for other in token.top_logprobs]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)


async def test_without_a_limit_a_chat_goes_on_to_the_end_of_the_context(
    client: openai.AsyncOpenAI,
):
    answers = await client.chat.completions.create(model=BASE_MODEL, messages=MESSAGES, n=8, seed=1)
    assert answers.usage is not None
    longest = max(answers.choices, key=lambda choice: len(choice.message.content or ""))
    assert longest.finish_reason == "length"
    assert len(longest.message.content or "") == MAX_CONTEXT_TOKENS - len(RENDERED)


async def test_tools_are_in_the_prompt_unless_none_may_be_called(client: openai.AsyncOpenAI):
    params = {"model": BASE_MODEL, "messages": MESSAGES, "max_tokens": 1}
    prompts = {}
    for choice in ("auto", "none"):
        answer = await client.chat.completions.create(tools=[TOOL], tool_choice=choice, **params)
        assert answer.usage is not None
        prompts[choice] = answer.usage.prompt_tokens
    assert prompts == {"auto": len("!add" + RENDERED), "none": len(RENDERED)}


async def test_a_conversation_with_tool_calls_is_rendered(client: openai.AsyncOpenAI):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    answer = await client.chat.completions.create(model=BASE_MODEL, messages=messages, max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("u1+1?/a/t2/a")
