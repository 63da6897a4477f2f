"""The official `openai` client on the contract tests' stack, and what its tests share."""

import contextlib
from collections.abc import AsyncIterator

import pytest
from tests.contract.gateway_stack import EOS, KEYS, LETTERS, GatewayStack

openai = pytest.importorskip("openai", reason="the openai client is not installed")


@contextlib.asynccontextmanager
async def connected(
    stack: GatewayStack, tenant: str = "ann", prefix: str = "/v1"
) -> AsyncIterator[openai.AsyncOpenAI]:
    """The client as one tenant; it repeats nothing by itself."""
    url = stack.url + prefix
    async with openai.AsyncOpenAI(base_url=url, api_key=KEYS[tenant], max_retries=0) as client:
        yield client


def tokens_in(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def text_of(tokens: list[int]) -> str:
    """What tokens decode to, without the end of the sequence."""
    return "".join(LETTERS[token] for token in tokens if token != EOS)
