"""Loads (d) and (e) of bench_sampler: the sampler behind the gateway, beside its engine alone."""

import asyncio
import contextlib
import http.client
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import tinker
import torch
from instant_stub import running_stub
from sampler_load import BASE_MODEL, Stack, running_stack
from tinker import types

from luthier_core.config import SamplerConfig
from luthier_model.base import load_base_model
from luthier_model.demo import ensure_demo_model
from luthier_model.packed_linear import pack_linears
from luthier_sampler.engine import Engine
from luthier_sampler.sequence import SampleRequest

MODEL = "bench"
NUM_QUEUED, PROMPT_TOKENS, NEW_TOKENS = 512, 32, 64
NUM_SINGLE, SINGLE_TOKENS = 100, 16
"""As many tokens as the stub answers with."""
PAUSE_S = 0.02
"""Before each lone request, the engine's too: the caches of one that never rests stay warm."""
ANSWER_S = 600.0
ALLOWANCE_MS = 10.0

Prompts = list[list[int]]


def measure_service(model_folder: Path, repeats: int) -> dict[str, float]:
    torch.set_num_threads(1)
    return measure_queue(model_folder, repeats) | measure_lone_requests()


def measure_queue(model_folder: Path, repeats: int) -> dict[str, float]:
    """Load (d). Both sides wait for the engine's core; what the others need is told beside it."""
    random = np.random.default_rng(3)
    # Another prompt each time, or the prefix cache would answer.
    queued = random.integers(0, 16384, (repeats + 1, NUM_QUEUED, PROMPT_TOKENS)).tolist()
    engine = make_engine(MODEL, model_folder)
    alone_s, first_s = min(queued_alone(engine, prompts) for prompts in queued[:repeats])
    with (
        tempfile.TemporaryDirectory() as folder,
        running_stack(Path(folder), "--model", f"{MODEL}={model_folder}") as stack,
    ):
        client = stack.service().create_sampling_client(base_model=MODEL).result()
        runs, memory = [], []
        for prompts in queued:
            runs.append(queued_through(stack, client, prompts))
            memory.append(stack.memory_mib())
        streamed_s = asyncio.run(first_tokens(stack, queued[-1][::-1]))
    queued_s, cpu_s = min(runs, key=lambda run: run[0])
    num_tokens = NUM_QUEUED * NEW_TOKENS
    return {
        f"(d) engine alone, {NUM_QUEUED} queued, 1 thread, tokens/s": num_tokens / alone_s,
        f"(d) SDK and service, {NUM_QUEUED} queued, tokens/s": num_tokens / queued_s,
        "(d) service / engine alone, at least 0.9": alone_s / queued_s,
        "(d) SDK and service, seconds": queued_s,
        **{f"(d) of these on a CPU, {name}": seconds for name, seconds in cpu_s.items()},
        "(d) engine alone, p99 time to first token, s": percentile(first_s, 99),
        "(d) 512 streams, p50 time to first token, s": percentile(streamed_s, 50),
        "(d) 512 streams, p99 time to first token, s": percentile(streamed_s, 99),
        **{f"(d) {n} after the first 512, MiB": memory[0][n] for n in ("sampler", "gateway")},
        **{f"(d) {n} after the last 512, MiB": memory[-1][n] for n in ("sampler", "gateway")},
    }


def measure_lone_requests() -> dict[str, float]:
    """Load (e), on the demo model: with a larger one the noise of the engine's own time, which is
    taken away, is above what is left. Engine and service take turns for the same reason."""
    prompts = np.random.default_rng(4).integers(1, 200, (2, NUM_SINGLE, PROMPT_TOKENS)).tolist()
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        model_folder = ensure_demo_model(folder)
        engine = make_engine(BASE_MODEL, model_folder)
        fsync_ms = [1e3 * fsync_s(folder) for _ in range(50)]
        url = opened.enter_context(running_stub())
        stub = tinker.ServiceClient(base_url=url, api_key="tml-stub")
        stub_client = stub.create_sampling_client(base_model=BASE_MODEL).result()
        model = ("--model", f"{BASE_MODEL}={model_folder}")
        stack = opened.enter_context(running_stack(folder / "data", *model))
        client = stack.service().create_sampling_client(base_model=BASE_MODEL).result()
        bare = BareClient(stack)
        ways: dict[str, Callable[[list[int]], None]] = {
            "engine": lambda prompt: run_alone(engine, prompt),
            "SDK against a stub that answers at once": lambda prompt: sample(
                stub_client, [prompt], SINGLE_TOKENS
            ),
            "SDK and service": lambda prompt: sample(client, [prompt], SINGLE_TOKENS),
            "bare HTTP and service": lambda prompt: bare.sample(prompt, SINGLE_TOKENS),
        }
        ms: dict[str, list[float]] = {name: [] for name in ways}
        for warm_up, counted in zip(*prompts, strict=True):
            for name, way in ways.items():
                way(warm_up)
                time.sleep(PAUSE_S)
                ms[name].append(1e3 * timed(lambda: way(counted)))  # noqa: B023
    p50 = {name: statistics.median(values) for name, values in ms.items()}
    beyond = p50["bare HTTP and service"] - p50["engine"]
    limit = ALLOWANCE_MS + 2 * statistics.median(fsync_ms)
    return {
        **{f"(e) {name}, {SINGLE_TOKENS} tokens, p50, ms": value for name, value in p50.items()},
        "(e) SDK and service, p99, ms": percentile(ms["SDK and service"], 99),
        "(e) fsync p50, ms": statistics.median(fsync_ms),
        "(e) SDK and service minus engine, p50, ms": p50["SDK and service"] - p50["engine"],
        "(e) service minus engine, p50, ms": beyond,
        "(e) the same / (10 ms + 2 fsync), at most 1": beyond / limit,
    }


def make_engine(name: str, model_folder: Path) -> Engine:
    """As a sampler of `luthier up` has it."""
    model = load_base_model(name, model_folder)
    pack_linears(model)
    return Engine(model, None, SamplerConfig())  # type: ignore[arg-type]  # no stop strings


class BareClient:
    """A sampling session over one connection, with nothing around what the protocol needs."""

    def __init__(self, stack: Stack) -> None:
        address = urlsplit(stack.url)
        self._connection = http.client.HTTPConnection(str(address.hostname), address.port)
        self._headers = {"X-API-Key": stack.api_key, "Content-Type": "application/json"}
        session = self._post("create_session", {"tags": [], "sdk_version": "0.38.0"})
        wanted = {"session_id": session["session_id"], "base_model": BASE_MODEL}
        sampler = self._post("create_sampling_session", {**wanted, "sampling_session_seq_id": 0})
        self._wanted = {"sampling_session_id": sampler["sampling_session_id"], "num_samples": 1}
        self._num_sent = 0

    def sample(self, prompt: list[int], max_tokens: int) -> None:
        """Greedily; returns with the answer."""
        params = {"max_tokens": max_tokens, "temperature": 0.0, "stop": []}
        wanted = {**self._wanted, "prompt": {"chunks": [{"tokens": prompt}]}}
        future = self._post(
            "asample", {**wanted, "sampling_params": params, "seq_id": self._num_sent}
        )
        self._num_sent += 1
        answer = self._post("retrieve_future", {"request_id": future["request_id"]})
        assert len(answer["sequences"][0]["tokens"]) == max_tokens

    def _post(self, path: str, value: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(value)
        self._connection.request("POST", f"/api/v1/{path}", body, self._headers)
        response = self._connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
        assert response.status == 200, answer
        return answer


# --- the engine alone -----------------------------------------------------------------------------


def queued_alone(engine: Engine, prompts: Prompts) -> tuple[float, list[float]]:
    """Seconds until all have ended, and until each has its first token."""
    add(engine, prompts, NEW_TOKENS, streams=True)
    started, told = time.perf_counter(), dict[str, float]()
    while engine.has_work:
        engine.step()
        for request_id in engine.partials():
            told.setdefault(request_id, time.perf_counter() - started)
    return time.perf_counter() - started, list(told.values())


def run_alone(engine: Engine, prompt: list[int]) -> None:
    add(engine, [prompt], SINGLE_TOKENS, streams=False)
    while engine.has_work:
        engine.step()


def add(engine: Engine, prompts: Prompts, max_tokens: int, *, streams: bool) -> None:
    for i, prompt in enumerate(prompts):
        engine.add(
            SampleRequest(
                request_id=f"{i}",
                prompt=prompt,
                max_tokens=max_tokens,
                temperature=0.0,
                ignore_eos=True,
                streams=streams,
            )
        )


# --- through the service --------------------------------------------------------------------------


def queued_through(
    stack: Stack, client: tinker.SamplingClient, prompts: Prompts
) -> tuple[float, dict[str, float]]:
    """Seconds until all have ended, and the CPU seconds of each process meanwhile."""
    before = stack.cpu_s()
    seconds = timed(lambda: sample(client, prompts, NEW_TOKENS))
    return seconds, {name: total - before[name] for name, total in stack.cpu_s().items()}


def sample(client: tinker.SamplingClient, prompts: Prompts, max_tokens: int) -> None:
    """All at once, greedily; returns with the last answer."""
    params = types.SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=[])
    futures = [client.sample(types.ModelInput.from_ints(prompt), 1, params) for prompt in prompts]
    for future in futures:
        [sequence] = future.result(timeout=ANSWER_S).sequences
        assert len(sequence.tokens) == max_tokens


async def first_tokens(stack: Stack, prompts: Prompts) -> list[float]:
    """Seconds to the first token of each of so many streams, which are opened at once.

    The official SDK has none: over the OpenAI-compatible API.
    """
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def first_token(prompt: list[int]) -> float:
            started = time.perf_counter()
            wanted = {
                "model": MODEL,
                "prompt": prompt,
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
                "stream": True,
            }
            headers = {"Authorization": f"Bearer {stack.api_key}"}
            url = f"{stack.url}/v1/completions"
            async with session.post(url, json=wanted, headers=headers) as answer:
                assert answer.status == 200, await answer.text()
                await answer.content.readline()
                waited_s = time.perf_counter() - started
                await answer.read()
            return waited_s

        return await asyncio.gather(*map(first_token, prompts))


# --- plumbing -------------------------------------------------------------------------------------


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def fsync_s(folder: Path) -> float:
    """Of one short append."""
    with (folder / "fsync").open("ab", buffering=0) as file:
        started = time.perf_counter()
        file.write(b"x" * 512)
        os.fsync(file.fileno())
        return time.perf_counter() - started


def percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent))
