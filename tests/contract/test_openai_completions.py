"""Completions through the official `openai` client: what they say, and that they are asample's."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from tests.contract.gateway_client import BASE_MODEL, Api, floats_of, tokens_of
from tests.contract.gateway_stack import EOS, KEYS, LETTERS, LIMITS, GatewayStack
from tests.contract.openai_client import connected, openai, text_of, tokens_in

from luthier_core import keys
from luthier_core.blobs import open_blobs

PROMPT = "Hello,world"
TOKENS = tokens_in(PROMPT)


@pytest.fixture(params=["/v1", "/oai/api/v1"])
async def client(
    request: pytest.FixtureRequest, gateway_stack: GatewayStack
) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connected(gateway_stack, prefix=request.param) as made:
        yield made


async def sampled(api: Api, prompt: list[int], **fields: Any) -> Any:
    """The same through the Tinker API."""
    return await (await api.sampler()).sample(prompt, **fields)


async def test_a_seeded_completion_is_the_sample_of_the_same_seed(
    client: openai.AsyncOpenAI, api: Api
):
    params = {"seed": 7, "max_tokens": 20, "temperature": 0.8, "top_p": 0.9}
    answer = await client.completions.create(model=BASE_MODEL, prompt=PROMPT, n=3, **params)
    response = await sampled(api, TOKENS, num_samples=3, sampling_params=params)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    sequences = [tokens_of(sequence) for sequence in response.sequences]
    assert [choice.text for choice in answer.choices] == [text_of(tokens) for tokens in sequences]
    reasons = ["stop" if tokens[-1] == EOS else "length" for tokens in sequences]
    assert [choice.finish_reason for choice in answer.choices] == reasons
    assert answer.object == "text_completion"
    assert answer.model == BASE_MODEL


async def test_a_gateway_without_a_folder_of_the_model_reads_what_its_sampler_has_stored(
    gateway_stack: GatewayStack, second_gateway: Any
):
    models = tuple(replace(model, path="/nowhere") for model in gateway_stack.config.models)
    gateway: Api = await second_gateway(models=models)
    wanted = {"model": BASE_MODEL, "prompt": PROMPT, "max_tokens": 3}
    answer = await gateway.post(f"{gateway.url}/v1/completions", wanted)
    assert answer.status == 200, answer
    assert answer.json()["usage"]["prompt_tokens"] == len(TOKENS)


async def test_until_a_sampler_has_stored_the_tokenizer_a_text_is_a_503(
    gateway_stack: GatewayStack, second_gateway: Any
):
    key = keys.model_text_object(BASE_MODEL)
    async with open_blobs(gateway_stack.config) as blobs:
        stored = await blobs.get(key)
        await blobs.delete(key)
        try:
            gateway: Api = await second_gateway()
            wanted = {"model": BASE_MODEL, "prompt": PROMPT, "max_tokens": 3}
            answer = await gateway.post(f"{gateway.url}/v1/completions", wanted)
        finally:
            await blobs.put(key, stored)
    assert answer.status == 503
    assert BASE_MODEL in answer.json()["error"]["message"]


async def test_usage_counts_prompt_completion_and_what_was_cached(client: openai.AsyncOpenAI):
    wanted = {"model": BASE_MODEL, "prompt": "A" * 40, "max_tokens": 5, "seed": 1, "n": 2}
    await client.completions.create(**wanted)
    usage = (await client.completions.create(**wanted)).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (40, 10, 50)
    assert usage.prompt_tokens_details is not None
    # Whole blocks of 16; the last token is computed in any case.
    assert usage.prompt_tokens_details.cached_tokens == 32


async def test_logprobs_are_those_of_the_sample(client: openai.AsyncOpenAI, api: Api):
    params = {"temperature": 0, "max_tokens": 6}
    answer = await client.completions.create(model=BASE_MODEL, prompt=PROMPT, logprobs=2, **params)
    response = await sampled(api, TOKENS, sampling_params=params)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    tokens = tokens_of(response.sequences[0])
    assert logprobs.tokens == [LETTERS[token] for token in tokens]
    assert logprobs.token_logprobs == pytest.approx(floats_of(response.sequences[0].logprobs))
    assert logprobs.text_offset == list(range(6))
    assert logprobs.top_logprobs is not None
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs or [], logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 2  # greedy: the token is the first of them
        assert max(top.items(), key=lambda item: item[1]) == (token, pytest.approx(logprob))


async def test_a_list_of_prompts_is_answered_in_order_texts_and_tokens_alike(
    client: openai.AsyncOpenAI,
):
    params = {"model": BASE_MODEL, "temperature": 0, "max_tokens": 8}
    texts = ["abc", "xyz"]
    both = await client.completions.create(prompt=texts, n=2, **params)
    as_tokens = [tokens_in(text) for text in texts]
    same = await client.completions.create(prompt=as_tokens, n=2, **params)
    alone = [(await client.completions.create(prompt=t, **params)).choices[0].text for t in texts]
    assert [choice.text for choice in both.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert [choice.text for choice in same.choices] == [choice.text for choice in both.choices]
    assert [choice.index for choice in same.choices] == [0, 1, 2, 3]


async def test_a_stop_string_over_tokens_ends_the_text_before_it(client: openai.AsyncOpenAI):
    wanted = {"model": BASE_MODEL, "prompt": PROMPT, "seed": 3, "max_tokens": 30}
    whole = (await client.completions.create(**wanted)).choices[0].text
    stop = whole[10:13]
    choice = (await client.completions.create(**wanted, stop=[stop], logprobs=0)).choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list(choice.text)


async def test_echo_scores_the_prompt_and_generates_nothing_if_asked_so(
    client: openai.AsyncOpenAI, api: Api
):
    wanted = {"model": BASE_MODEL, "prompt": PROMPT, "echo": True, "logprobs": 1}
    answer = await client.completions.create(**wanted, max_tokens=0)
    response = await sampled(api, TOKENS, sampling_params={"max_tokens": 1}, prompt_logprobs=True)
    choice = answer.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.tokens == list(PROMPT)
    assert choice.logprobs.token_logprobs[0] is None
    expected = floats_of(response.prompt_logprobs)[1:]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-6)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    longer = (await client.completions.create(**wanted, max_tokens=3, temperature=0)).choices[0]
    assert longer.text.startswith(PROMPT)
    assert longer.logprobs is not None
    assert longer.logprobs.text_offset == list(range(len(PROMPT) + 3))


@pytest.mark.parametrize("prefix", ["/v1", "/oai/api/v1"])
def test_the_synchronous_client_works_as_well(gateway_stack: GatewayStack, prefix: str):
    url = gateway_stack.url + prefix
    with openai.OpenAI(base_url=url, api_key=KEYS["ann"], max_retries=0) as client:
        answer = client.completions.create(model=BASE_MODEL, prompt="abc", max_tokens=4, seed=1)
        assert len(answer.choices[0].text) <= 4
        chunks = client.completions.create(
            model=BASE_MODEL, prompt="abc", max_tokens=4, seed=1, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
        assert client.models.list().data[0].id == BASE_MODEL


async def test_a_checkpoint_is_a_model_for_who_may_read_it(
    client: openai.AsyncOpenAI, gateway_stack: GatewayStack, api: Api
):
    run = await api.run()
    for _ in range(3):
        await api.training_output(await run.forward_backward())
        await api.result(await run.step(learning_rate=0.1))
    saved = await api.result(await run.send("save_weights_for_sampler", path="chat"))
    path = saved["path"]
    params = {"max_tokens": 10, "temperature": 0}
    answer = await client.completions.create(model=path, prompt=PROMPT, **params)
    sampler = await api.sampler(model_path=path)
    response = await sampler.sample(TOKENS, sampling_params=params)
    assert answer.choices[0].text == text_of(tokens_of(response.sequences[0]))
    assert path in [model.id for model in (await client.models.list()).data]
    assert (await client.models.retrieve(path)).id == path

    async with connected(gateway_stack, "bob") as stranger:
        with pytest.raises(openai.NotFoundError) as caught:
            await stranger.completions.create(model=path, prompt=PROMPT)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert path not in [model.id for model in (await stranger.models.list()).data]
        with pytest.raises(openai.NotFoundError):
            await stranger.models.retrieve(path)


async def test_more_choices_than_the_server_allows_are_refused(client: openai.AsyncOpenAI):
    with pytest.raises(openai.BadRequestError, match=str(LIMITS.max_num_samples)) as caught:
        await client.completions.create(model=BASE_MODEL, prompt="a", n=LIMITS.max_num_samples + 1)
    assert caught.value.param == "n"
