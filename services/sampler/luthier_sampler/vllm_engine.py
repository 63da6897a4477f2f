"""VllmEngine: the SamplerEngine protocol over a vLLM server.

What vLLM does by itself (batching, its cache, preemption) is not here. In-flight weights: a request
ends with the weights that it began with, as vLLM cannot change them in mid-generation; the next one
begins with the newest.
"""

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import torch

from luthier_core.config import ModelConfig, SamplerConfig
from luthier_core.errors import BadRequest, LuthierError
from luthier_core.oplog import Published
from luthier_model.base import ModelFacts, describe_base_model
from luthier_sampler.admission import Limits, check
from luthier_sampler.engine import Finished
from luthier_sampler.engine_thread import ReadFiles
from luthier_sampler.partials import new_tokens
from luthier_sampler.response import response_bytes
from luthier_sampler.sequence import Request, SampleRequest
from luthier_sampler.vllm_adapters import VllmAdapters
from luthier_sampler.vllm_api import body_of, check_supported, complete, put
from luthier_sampler.vllm_server import ServerGone, VllmServer, start_arguments, start_environ

log = logging.getLogger(__name__)

MAX_TRIES = 3
"""A request that so many servers died with fails: it may be what kills them."""


class VllmEngine:
    """One HTTP request per sampling request; cancelling it is closing its connection."""

    def __init__(
        self,
        server: VllmServer,
        adapters: VllmAdapters,
        facts: ModelFacts,
        *,
        max_model_len: int,
        lm_head: bool,
        base_as_adapter: bool,
        news: asyncio.Event,
        close: Callable[[], Awaitable[None]],
    ) -> None:
        self._server = server
        self._adapters = adapters
        self._facts = facts
        self._limits = Limits(facts.vocab_size, facts.max_context_tokens, max_model_len)
        self._lm_head = lm_head
        self._base_as_adapter = base_as_adapter
        self._news = news
        self._close = close
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._streaming: dict[str, Request] = {}
        self._finished: list[Finished] = []

    async def add(self, spec: SampleRequest, read_files: ReadFiles) -> None:
        if spec.request_id in self._tasks:
            return
        check(spec, self._limits)
        check_supported(spec, self._limits, lm_head=self._lm_head)
        self._tasks[spec.request_id] = asyncio.create_task(self._run(spec, read_files))

    async def step(self) -> tuple[list[Finished], dict[str, str]]:
        await self._news.wait()
        self._news.clear()
        self._server.check()
        finished, self._finished = self._finished, []
        messages = ((key, new_tokens(request)) for key, request in self._streaming.items())
        return finished, {request_id: message for request_id, message in messages if message}

    def cancel(self, request_id: str) -> None:
        if task := self._tasks.pop(request_id, None):
            task.cancel()

    async def move(self, run_id: str, newest: Published, read_files: ReadFiles) -> None:
        """What runs ends with the weights that it began with."""

    async def forget_runs(self, in_use: Collection[str]) -> None:
        """Nothing is kept of them."""

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await self._close()

    async def _run(self, spec: SampleRequest, read_files: ReadFiles) -> None:
        try:
            finished = await self._answered(spec, read_files)
        except LuthierError as error:
            finished = Finished(spec.request_id, None, error.message, error.category)
        except Exception as error:
            log.exception("request %s", spec.request_id)
            finished = Finished(spec.request_id, None, f"the sampler failed: {error!r}")
        finally:
            self._streaming.pop(spec.request_id, None)
        del self._tasks[spec.request_id]
        self._finished.append(finished)
        self._news.set()

    async def _answered(self, spec: SampleRequest, read_files: ReadFiles) -> Finished:
        """The end of the request, asked again where a server dies with it."""
        for _ in range(MAX_TRIES):
            incarnation = await self._server.up()
            try:
                async with self._name_of(spec.adapter, read_files) as name:
                    request = self._request(spec)
                    await self._ask(request, name)
            except ServerGone as error:
                log.error("the vLLM server has gone: %s", error)
                self._server.kill(incarnation)
            except BadRequest:
                # Another server than the one that the adapter was loaded into does not know it.
                if incarnation == self._server.incarnation:
                    raise
            else:
                complete(request)
                return Finished(
                    spec.request_id,
                    response_bytes(request),
                    num_prompt_tokens=len(request.prompt),
                    num_cached_tokens=request.num_cached_tokens or 0,
                    num_sampled_tokens=sum(len(s.new_tokens) for s in request.sequences),
                )
        raise LuthierError(f"the vLLM server died {MAX_TRIES} times while it had this request")

    @contextlib.asynccontextmanager
    async def _name_of(self, adapter: str, read_files: ReadFiles) -> AsyncIterator[str]:
        if adapter or self._base_as_adapter:
            async with self._adapters.use(adapter, read_files) as name:
                yield name
        else:
            yield self._facts.name

    def _request(self, spec: SampleRequest) -> Request:
        stops = () if spec.ignore_eos else self._facts.eos_token_ids
        return Request(
            spec,
            arrival=0,
            seed=spec.seed or 0,
            max_new_tokens=self._limits.max_new_tokens(spec),
            adapter=None,
            stop_tokens=frozenset((*spec.stop_tokens, *stops)),
        )

    async def _ask(self, request: Request, name: str) -> None:
        body = body_of(request, name)
        async with self._server.post("/v1/completions", body) as response:
            if not body.get("stream"):
                put(request, orjson.loads(await response.read()))
                return
            self._streaming[request.spec.request_id] = request
            async for event in _events(response):
                put(request, event)
                self._news.set()


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[Mapping[str, Any]]:
    """The JSON of each server-sent event; LuthierError if one is an error."""
    async for line in response.content:
        data = line.removeprefix(b"data:").strip()
        if not data or data == b"[DONE]":
            continue
        event = orjson.loads(data)
        if error := event.get("error"):
            raise LuthierError(f"vLLM: {error.get('message')}")
        yield event


async def start_vllm_engine(
    model: ModelConfig, settings: SamplerConfig, environ: Mapping[str, str]
) -> VllmEngine:
    """An engine whose server is up. ConfigError says why it does not come up."""
    facts, shapes = await asyncio.to_thread(describe_base_model, model.name, model.path)
    news = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        # A short path: that of a socket may have 107 bytes.
        made = stack.enter_context(tempfile.TemporaryDirectory(prefix="luthier-vllm-"))
        folder, socket_path = Path(made), Path(made) / "server.sock"
        has_gpu = torch.cuda.is_available()
        argv = await start_arguments(model, settings, socket_path, has_gpu=has_gpu)
        server = VllmServer(
            argv,
            environ=start_environ(environ, folder, num_threads=settings.num_threads),
            socket_path=socket_path,
        )
        stack.push_async_callback(server.close)
        await server.start(news)
        [described] = (await server.get("/v1/models"))["data"]
        adapters = VllmAdapters(
            server,
            folder,
            shapes,
            max_adapters=settings.max_adapters,
            lm_head=settings.vllm_lm_head,
        )
        return VllmEngine(
            server,
            adapters,
            facts,
            max_model_len=described["max_model_len"],
            lm_head=settings.vllm_lm_head,
            # In vLLM 0.32 on a CPU what has no adapter is computed with the one in the last slot.
            base_as_adapter=not has_gpu,
            news=news,
            close=stack.pop_all().aclose,
        )
    raise AssertionError("unreachable")
