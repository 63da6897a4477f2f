"""The vllm engine over a real vLLM server against the torch engine, on the same weights.

vLLM computes the same numbers in another order, so logprobs agree to TOLERANCE and tokens are
compared where they are greedy.
"""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from transformers import AutoTokenizer

from luthier_core.config import ModelConfig, SamplerConfig
from luthier_core.errors import Unsupported
from luthier_core.partials import decode_partials
from luthier_core.proto import wire_pb2
from luthier_model.base import BaseModel
from luthier_sampler.engine import Engine, Finished
from luthier_sampler.sequence import SampleRequest
from luthier_sampler.vllm_engine import VllmEngine, start_vllm_engine

TOLERANCE = 1e-5
"""Of a logprob, absolute, float32 on a CPU."""
Files = dict[str, dict[str, bytes]]

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["lm_head", "no lm_head"])
async def engine(
    request: pytest.FixtureRequest, folder: Path, vllm_python: str
) -> AsyncIterator[VllmEngine]:
    settings = SamplerConfig(
        engine="vllm",
        vllm_python=vllm_python,
        vllm_lm_head=request.param == "lm_head",
        vllm_max_loras=2,
        max_adapters=2,
        max_running=8,
    )
    model = ModelConfig(name="tiny", path=str(folder), dtype="float32")
    engine = await start_vllm_engine(model, settings, os.environ)
    yield engine
    await engine.close()


@pytest.fixture(scope="module")
def reference(model: BaseModel, folder: Path, adapters: Files) -> Engine:
    engine = Engine(model, AutoTokenizer.from_pretrained(folder), SamplerConfig())
    for key, files in adapters.items():
        engine.add_adapter(key, files)
    return engine


async def answers(
    engine: VllmEngine, specs: list[SampleRequest], adapters: Files
) -> list[wire_pb2.SampleResponse]:
    async def read_files(key: str) -> dict[str, bytes]:
        return adapters[key]

    for spec in specs:
        await engine.add(spec, read_files)
    ended: dict[str, Finished] = {}
    async with asyncio.timeout(400):
        while len(ended) < len(specs):
            finished, _ = await engine.step()
            ended |= {item.request_id: item for item in finished}
    return [_response(ended[spec.request_id]) for spec in specs]


def expected(engine: Engine, specs: list[SampleRequest]) -> list[wire_pb2.SampleResponse]:
    for spec in specs:
        engine.add(spec)
    ended: dict[str, Finished] = {}
    while engine.has_work:
        ended |= {item.request_id: item for item in engine.step()}
    return [_response(ended[spec.request_id]) for spec in specs]


def _response(finished: Finished) -> wire_pb2.SampleResponse:
    if finished.response is None:
        raise RuntimeError(finished.error)
    return wire_pb2.SampleResponse.FromString(finished.response)


def tokens(response: wire_pb2.SampleResponse, index: int = 0) -> list[int]:
    found: list[int] = np.frombuffer(response.sequences[index].tokens, "<i4").tolist()
    return found


def floats(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<f4")


def greedy(request_id: str, **fields: object) -> SampleRequest:
    prompt = np.random.default_rng([*request_id.encode()]).integers(1, 257, 20).tolist()
    spec = SampleRequest(request_id=request_id, prompt=prompt, temperature=0.0, max_tokens=24)
    return replace(spec, **fields)  # type: ignore[arg-type]


def with_lm_head(engine: VllmEngine) -> bool:
    return engine._lm_head


async def test_greedy_tokens_and_logprobs_are_those_of_the_torch_engine_for_every_adapter_at_once(
    engine: VllmEngine, reference: Engine, adapters: Files
) -> None:
    keys = ["", "rank 8", "rank 64"] + ["rank 16 with lm_head"] * with_lm_head(engine)
    specs = [greedy(f"{i} {key}", adapter=key, ignore_eos=True) for key in keys for i in range(3)]
    specs = [replace(spec, topk_sample_logprobs=3) for spec in specs]
    ours = expected(reference, specs)
    for spec, theirs, mine in zip(specs, await answers(engine, specs, adapters), ours, strict=True):
        one, other = theirs.sequences[0], mine.sequences[0]
        gap = np.abs(floats(one.logprobs) - floats(other.logprobs)).max()
        print(f"{spec.request_id}: logprobs of greedy tokens differ by {gap:.1e}")
        assert tokens(theirs) == tokens(mine), spec.adapter
        assert np.abs(floats(one.logprobs) - floats(other.logprobs)).max() < TOLERANCE
        top, other_top = one.topk_sampled_logprobs, other.topk_sampled_logprobs
        assert (top.k, top.length) == (other_top.k, other_top.length) == (3, 24)
        assert np.abs(floats(top.logprobs) - floats(other_top.logprobs)).max() < TOLERANCE
    assert len({tuple(tokens(response)) for response in ours}) > len(keys)


async def test_prompt_logprobs_are_those_of_the_torch_engine_or_refused(
    engine: VllmEngine, reference: Engine, adapters: Files
) -> None:
    specs = [
        greedy(
            f"scores {key}", adapter=key, prompt_logprobs=True, topk_prompt_logprobs=2, max_tokens=1
        )
        for key in ("", "rank 8")
    ]
    specs.append(replace(specs[0], request_id="last", prompt_logprobs_last_n=4))
    if with_lm_head(engine):
        with pytest.raises(Unsupported, match=r"prompt_logprobs: .*vllm_lm_head = false"):
            await answers(engine, specs[:1], adapters)
        return
    ours = expected(reference, specs)
    for theirs, mine in zip(await answers(engine, specs, adapters), ours, strict=True):
        for one, other in (
            (theirs.prompt_logprobs, mine.prompt_logprobs),
            (theirs.topk_prompt_logprobs.logprobs, mine.topk_prompt_logprobs.logprobs),
        ):
            np.testing.assert_allclose(floats(one), floats(other), atol=TOLERANCE, rtol=0)


async def test_samples_of_a_seeded_request_differ_and_come_again(
    engine: VllmEngine, reference: Engine, adapters: Files
) -> None:
    spec = greedy("a", temperature=0.9, seed=-1, num_samples=3, adapter="rank 8", ignore_eos=True)
    again = replace(spec, request_id="b")
    first, second = await answers(engine, [spec, again], adapters)
    drawn = [tokens(first, i) for i in range(3)]
    assert drawn == [tokens(second, i) for i in range(3)]
    assert len({tuple(row) for row in drawn}) == 3
    # Their logprobs are raw: what the torch engine says of the same tokens.
    scored = [
        replace(spec, request_id=str(i), prompt=[*spec.prompt, *row], num_samples=1)
        for i, row in enumerate(drawn)
    ]
    scored = [replace(item, prompt_logprobs=True, max_tokens=1) for item in scored]
    for i, mine in enumerate(expected(reference, scored)):
        wanted = floats(mine.prompt_logprobs)[len(spec.prompt) :]
        assert np.abs(floats(first.sequences[i].logprobs) - wanted).max() < TOLERANCE


async def test_stops_are_part_of_the_answer_as_in_the_torch_engine(
    engine: VllmEngine, reference: Engine, adapters: Files, folder: Path
) -> None:
    # The text of a random model is mostly no UTF-8: a prompt whose answer has two letters in a row.
    candidates = [greedy(f"free {i}", ignore_eos=True) for i in range(40)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn_by_all = map(tokens, expected(reference, candidates))
    free, drawn, found = next(
        (spec, drawn, found)
        for spec, drawn in zip(candidates, drawn_by_all, strict=True)
        if (found := re.search("[!-~]{2}", tokenizer.decode(drawn)[4:]))
    )
    specs = [
        replace(free, request_id="string", stop_strings=(found.group(),)),
        replace(free, request_id="id", stop_tokens=(drawn[9],)),
        replace(free, request_id="one", max_tokens=1),
        replace(free, request_id="three", num_samples=3),
    ]
    for theirs, mine in zip(
        await answers(engine, specs, adapters), expected(reference, specs), strict=True
    ):
        assert len(theirs.sequences) == len(mine.sequences)
        for i in range(len(mine.sequences)):
            assert tokens(theirs, i) == tokens(mine, i)
            assert theirs.sequences[i].stop_reason == mine.sequences[i].stop_reason


async def test_what_is_streamed_adds_up_to_the_answer(engine: VllmEngine, adapters: Files) -> None:
    spec = greedy("streamed", streams=True, ignore_eos=True, num_samples=2, temperature=1.0)
    spec = replace(spec, max_tokens=200)
    await engine.add(spec, lambda key: asyncio.sleep(0, adapters[key]))
    told: dict[int, list[int]] = {0: [], 1: []}
    finished: list[Finished] = []
    while not finished:
        finished, messages = await engine.step()
        for partial in decode_partials(messages.get("streamed", "[]")):
            told[partial.index][partial.offset :] = partial.tokens
    response = _response(finished[0])
    for index, seen in told.items():
        assert seen
        assert tokens(response, index)[: len(seen)] == seen


async def test_the_prefix_cache_is_shared_within_a_tenant_only(
    engine: VllmEngine, adapters: Files
) -> None:
    spec = greedy("first", prompt=[5] * 400, cache_scope="ann")
    hits = []
    for request_id, scope in (("first", "ann"), ("second", "ann"), ("third", "bob")):
        again = replace(spec, request_id=request_id, cache_scope=scope)
        hits.append((await answers(engine, [again], adapters))[0].prompt_cache_hit_tokens)
    assert hits[0] == hits[2] == 0
    assert hits[1] > 100


async def test_adapters_that_vllm_would_take_wrongly_are_refused(
    engine: VllmEngine, adapters: Files
) -> None:
    with pytest.raises(RuntimeError, match=r"rank 128.*up to 64"):
        await answers(engine, [greedy("wide", adapter="rank 128")], adapters)
    if not with_lm_head(engine):
        with pytest.raises(RuntimeError, match=r"lm_head .*vllm_lm_head = true"):
            await answers(engine, [greedy("head", adapter="rank 16 with lm_head")], adapters)


async def test_a_cancelled_request_leaves_vllm(engine: VllmEngine, adapters: Files) -> None:
    spec = greedy("long", max_tokens=400, ignore_eos=True, streams=True)
    await engine.add(spec, lambda key: asyncio.sleep(0, adapters[key]))
    while not (await engine.step())[1]:
        pass
    engine.cancel("long")
    async with asyncio.timeout(30):
        while await _num_running(engine):
            await asyncio.sleep(0)
    [after] = await answers(engine, [greedy("after")], adapters)
    assert tokens(after)


async def _num_running(engine: VllmEngine) -> float:
    async with engine._server._session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:num_requests_running"))


async def test_requests_outlive_a_server_that_is_killed(
    engine: VllmEngine, reference: Engine, adapters: Files
) -> None:
    specs = [greedy(f"{key} killed", adapter=key, max_tokens=450) for key in ("", "rank 8")]
    specs = [replace(spec, ignore_eos=True, streams=True) for spec in specs]
    incarnation = engine._server.incarnation
    answering = asyncio.create_task(answers(engine, specs, adapters))
    async with asyncio.timeout(400):
        while len(engine._streaming) < len(specs):  # both are being answered
            await asyncio.sleep(0)
    os.killpg(engine._server._pid, signal.SIGKILL)
    ours = expected(reference, specs)
    assert [tokens(response) for response in await answering] == [tokens(mine) for mine in ours]
    assert engine._server.incarnation == incarnation + 1
