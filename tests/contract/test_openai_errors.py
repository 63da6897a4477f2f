"""What the OpenAI API refuses, and how: always in OpenAI's form, with the field named."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from tests.contract.gateway_client import BASE_MODEL
from tests.contract.gateway_stack import KEYS, MAX_CONTEXT_TOKENS, GatewayStack
from tests.contract.openai_client import connected, openai

USER = {"role": "user", "content": "Hi"}


@pytest.fixture
async def client(gateway_stack: GatewayStack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connected(gateway_stack) as made:
        yield made


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("top_p", 0),
        ("n", 0),
        ("max_tokens", MAX_CONTEXT_TOKENS + 1),
        ("max_tokens", 0),
        ("stop", [""]),
        ("stop", [1, 2]),
        ("logprobs", 101),
        ("seed", 2**63),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", [[1], [True]]),
        ("prompt", [10_000]),
        ("prompt", "x" * (MAX_CONTEXT_TOKENS + 1)),
        ("prompt", ["x"] * 129),
        ("suffix", "end"),
        ("best_of", 2),
        ("presence_penalty", 0.5),
        ("logit_bias", {"1": 5}),
    ],
)
async def test_a_wrong_or_unsupported_field_of_a_completion_is_named(
    client: openai.AsyncOpenAI, field: str, value: Any
):
    wanted = {"model": BASE_MODEL, "prompt": "Hi", "max_tokens": 1, field: value}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(**wanted)
    assert caught.value.param == field
    assert caught.value.type == "invalid_request_error"
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", [{"role": "wizard", "content": "Hi"}]),
        ("messages", [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{**USER, "content": "x" * MAX_CONTEXT_TOKENS}]),
        ("tools", [{"type": "custom", "custom": {"name": "x"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("top_logprobs", 2),
        ("frequency_penalty", 1),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("store", True),
        ("service_tier", "flex"),
        ("functions", [{"name": "x"}]),
    ],
)
async def test_a_wrong_or_unsupported_field_of_a_chat_is_named(
    client: openai.AsyncOpenAI, field: str, value: Any
):
    wanted = {"model": BASE_MODEL, "messages": [USER], field: value}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**wanted)
    assert caught.value.param == field


async def test_values_that_ask_for_nothing_and_unknown_fields_pass(client: openai.AsyncOpenAI):
    answer = await client.chat.completions.create(
        model=BASE_MODEL,
        messages=[USER],
        max_tokens=1,
        presence_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        modalities=["text"],
        store=False,
        service_tier="auto",
        user="me",
        extra_body={"of_another_server": {"a": 1}, "top_k": 5},
    )
    assert len(answer.choices) == 1


@pytest.mark.parametrize(
    ("model", "status"),
    [
        ("gpt-4o", 404),
        ("", 404),
        (f"tinker://{'0' * 32}:train:0/sampler_weights/x", 404),
        ("tinker://nonsense", 400),
        (f"tinker://{'0' * 32}:train:0/external_weights/x", 404),
    ],
)
async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI, model: str, status: int):
    with pytest.raises(openai.APIStatusError) as caught:
        await client.completions.create(model=model, prompt="Hi")
    assert caught.value.status_code == status
    assert caught.value.param == "model"


# --- access ---------------------------------------------------------------------------------------

PATHS = [("GET", "models"), ("GET", "models/x"), ("POST", "completions"), ("POST", "x")]


@pytest.mark.parametrize("prefix", ["/v1", "/oai/api/v1"])
@pytest.mark.parametrize(("method", "path"), [*PATHS, ("POST", "chat/completions")])
@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer tml-nobody"}, {"Authorization": "Basic x"}, {"X-API-Key": "no"}],
    ids=["none", "wrong bearer", "basic", "wrong key"],
)
async def test_without_a_key_nothing_is_answered(
    gateway_stack: GatewayStack,
    http: aiohttp.ClientSession,
    prefix: str,
    method: str,
    path: str,
    headers: dict[str, str],
):
    url = f"{gateway_stack.url}{prefix}/{path}"
    async with http.request(method, url, data=b"{}", headers=headers) as response:
        assert response.status == 401
        assert (await response.json())["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "headers", [{"Authorization": f"Bearer {KEYS['ann']}"}, {"X-API-Key": KEYS["ann"]}]
)
async def test_a_key_is_taken_as_bearer_token_or_in_its_header(
    gateway_stack: GatewayStack, http: aiohttp.ClientSession, headers: dict[str, str]
):
    async with http.get(f"{gateway_stack.url}/v1/models", headers=headers) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "no_such_thing", b"{}", 404),
        ("GET", "completions", None, 405),
        ("POST", "completions", b"{", 422),
        ("POST", "completions", b"[]", 422),
        ("POST", "completions", b'{"prompt": "' + b"x" * 300_000 + b'"}', 413),
    ],
)
async def test_every_error_has_openais_form(
    gateway_stack: GatewayStack,
    http: aiohttp.ClientSession,
    method: str,
    path: str,
    body: bytes | None,
    status: int,
):
    headers = {"X-API-Key": KEYS["ann"]}
    url = f"{gateway_stack.url}/v1/{path}"
    async with http.request(method, url, data=body, headers=headers) as response:
        assert response.status == status
        error = (await response.json())["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]


async def test_a_full_queue_is_a_rate_limit(
    gateway_stack: GatewayStack, second_gateway: Callable[..., Any], http: aiohttp.ClientSession
):
    limits = replace(gateway_stack.config.limits, max_queued_samples=0)
    full = await second_gateway(limits=limits)
    body = json.dumps({"model": BASE_MODEL, "prompt": "Hi"})
    headers = {"X-API-Key": KEYS["ann"]}
    async with http.post(f"{full.url}/v1/completions", data=body, headers=headers) as response:
        assert response.status == 429
        assert "Retry-After" in response.headers
        assert (await response.json())["error"]["code"] == "rate_limit_exceeded"
