"""The OpenAI API over HTTP: models, completions and chat completions.

A request becomes samples of the operation log, one per prompt, and waits for their outcomes.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
from aiohttp import web

from luthier_core import keys
from luthier_core.blobs import BlobMissing
from luthier_core.errors import NotFound, Unavailable
from luthier_core.types import read_object
from luthier_gateway.backends import BACKENDS, TENANT, Backends, Cache
from luthier_gateway.futures import check_room
from luthier_gateway.openai.exchange import Exchange
from luthier_gateway.openai.generation import generating
from luthier_gateway.openai.model_text import ModelText
from luthier_gateway.openai.partial_reader import PartialReader
from luthier_gateway.openai.requests import ChatRequest, CompletionRequest
from luthier_gateway.openai.samplers import Samplers
from luthier_gateway.submit import off_loop_if_large
from luthier_gateway.web_io import MAX_PAGE, json_response, read_body

PREFIXES = ("/oai/api/v1", "/v1")
GENERATING = frozenset(
    f"{p}/{name}" for p in PREFIXES for name in ("completions", "chat/completions")
)
"""Paths that are held open while a sampler works; they take their tenant's turn by themselves."""


def routes() -> list[web.RouteDef]:
    return [route for prefix in PREFIXES for route in _routes(prefix)]


def _routes(prefix: str) -> list[web.RouteDef]:
    return [
        web.get(f"{prefix}/models", list_models),
        web.get(f"{prefix}/models/{{model:.+}}", get_model),
        web.post(f"{prefix}/completions", completions),
        web.post(f"{prefix}/chat/completions", chat_completions),
    ]


def is_openai(path: str) -> bool:
    """Whether errors under this path have OpenAI's form, and a key may be a bearer token."""
    return path.startswith(tuple(f"{prefix}/" for prefix in PREFIXES))


def api_key(request: web.Request) -> str | None:
    """The key in `Authorization: Bearer`, else in X-API-Key."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else request.headers.get("X-API-Key")


@dataclass(frozen=True, slots=True)
class OpenAI:
    """What the handlers share beside the gateway's backends."""

    backends: Backends
    samplers: Samplers
    partials: PartialReader
    texts: Cache[ModelText]


OPENAI = web.AppKey("openai", OpenAI)


@contextlib.asynccontextmanager
async def open_openai(backends: Backends) -> AsyncIterator[OpenAI]:
    partials = PartialReader(backends.oplog.redis)
    listening = asyncio.create_task(partials.listen())

    async def load(base_model: str) -> ModelText:
        try:
            files = await backends.blobs.get(keys.model_text_object(base_model))
        except BlobMissing:
            raise Unavailable(f"the tokenizer of {base_model}: no sampler has loaded it") from None
        return await asyncio.to_thread(ModelText.load, orjson.loads(files))

    try:
        yield OpenAI(backends, Samplers(backends), partials, Cache(load))
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


# --- models ---------------------------------------------------------------------------------------


async def list_models(request: web.Request) -> web.Response:
    """Base models, then the caller's own sampler weights, latest first."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    page = await backends.registry.list_checkpoints(
        tenant, limit=MAX_PAGE, offset=0, external=False
    )
    models = [_model(name) for name in backends.config.model_names]
    models += [
        _model(row["tinker_path"], tenant, datetime.fromisoformat(row["time"]))
        for row in page["checkpoints"]
        if row["checkpoint_type"] == "sampler"
    ]
    return json_response({"object": "list", "data": models})


async def get_model(request: web.Request) -> web.Response:
    """A base model, or any weights that the caller may read."""
    backends, tenant = request.app[BACKENDS], request[TENANT]
    name = request.match_info["model"]
    if name in backends.config.model_names:
        return json_response(_model(name))
    if not name.startswith("tinker://"):
        raise NotFound(f"model={name[:300]!r}")
    record = await backends.registry.resolve(tenant, name)
    return json_response(_model(name, record.tenant, record.created_at))


def _model(name: str, owner: str = "luthier", created: datetime | None = None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(created.timestamp()) if created else 0,
        "owned_by": owner,
    }


# --- completions ----------------------------------------------------------------------------------


async def completions(request: web.Request) -> web.StreamResponse:
    """Text after each prompt; a list of prompts is answered with n choices for each."""
    value, size = await _read(request)
    return await _generate(request, CompletionRequest.of(value), size)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """The assistant's next message, n times."""
    value, size = await _read(request)
    return await _generate(request, ChatRequest.of(value), size)


async def _read(request: web.Request) -> tuple[dict[str, Any], int]:
    """The JSON object in the body, and how large it is."""
    raw = await read_body(request, request.app[BACKENDS].config.gateway.max_body_bytes)
    return await off_loop_if_large(len(raw), read_object, raw), len(raw)


async def _generate(
    request: web.Request, wanted: CompletionRequest | ChatRequest, size: int
) -> web.StreamResponse:
    openai, tenant = request.app[OPENAI], request[TENANT]
    backends = openai.backends
    check_room(backends)
    async with contextlib.AsyncExitStack() as stack:
        # A turn for the work, not for the wait.
        async with backends.turns.of(tenant):
            sampler = await openai.samplers.of(tenant, wanted.model)
            base_model = sampler.record.base_model
            text = await openai.texts.get(base_model)
            prompts = await off_loop_if_large(size, wanted.prompts, text)
            samples = wanted.samples(prompts, await backends.limits(base_model))
            generation = await stack.enter_async_context(
                generating(backends, openai.partials, sampler)
            )
            for sample in samples:
                await generation.submit(sample, streams=wanted.stream)
        exchange = Exchange(generation, wanted, text, prompts)
        return await (exchange.stream(request) if wanted.stream else exchange.answer(request))
