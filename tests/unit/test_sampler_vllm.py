"""The vllm engine against a mock of vLLM's HTTP API, a process; the real one is in tests/vllm."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from tests.tiny_qwen3 import save_tiny_qwen3
from tests.unit.mock_vllm import DIES, FAILS, NAN, WAITS

from luthier_core.config import ModelConfig, SamplerConfig
from luthier_core.errors import BadRequest, ConfigError, Unsupported
from luthier_core.partials import decode_partials
from luthier_core.prompt_targets import PromptTargets
from luthier_core.proto import wire_pb2
from luthier_model.base import BaseModel, describe_base_model, load_base_model
from luthier_model.lora import LoraSpec, init_adapter, target_modules
from luthier_model.peft_io import adapter_files, adapter_from_files
from luthier_sampler import vllm_server
from luthier_sampler.engine import Finished
from luthier_sampler.sequence import SampleRequest
from luthier_sampler.vllm_adapters import VllmAdapters
from luthier_sampler.vllm_engine import VllmEngine, start_vllm_engine
from luthier_sampler.vllm_server import VllmServer, start_arguments, start_environ

pytestmark = pytest.mark.asyncio(loop_scope="module")

MOCK = Path(__file__).with_name("mock_vllm.py")
MAX_MODEL_LEN, MAX_ADAPTERS = 64, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    tokens = {"vocab_size": 200, "eos_token_id": 3, "bos_token_id": None}
    save_tiny_qwen3(folder, seed=4, max_position_embeddings=128, **tokens)
    return load_base_model("tiny", folder)


class Setup:
    """An engine over a mock, and what the mock was asked."""

    def __init__(self, model: BaseModel, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.log = folder / "log"
        self.num_reads = 0

    async def start(self) -> None:
        socket = self.folder / "s"
        self.news = asyncio.Event()
        self.server = VllmServer(
            [sys.executable, str(MOCK), str(socket), str(self.log)], environ={}, socket_path=socket
        )
        await self.server.start(self.news)
        self.use()

    def use(self, *, lm_head: bool = False, base_as_adapter: bool = False) -> None:
        """An engine with or without lm_head, with no adapters yet."""
        self.engine = VllmEngine(
            self.server,
            VllmAdapters(
                self.server,
                self.folder,
                self.model.lora_shapes,
                max_adapters=MAX_ADAPTERS,
                lm_head=lm_head,
            ),
            self.model.facts,
            max_model_len=MAX_MODEL_LEN,
            lm_head=lm_head,
            base_as_adapter=base_as_adapter,
            news=self.news,
            close=self.server.close,
        )

    async def read_files(self, key: str) -> dict[str, bytes]:
        """Of an adapter whose key says its rank, and whether it is on lm_head."""
        self.num_reads += 1
        rank, _, head = key.partition(" ")
        spec = LoraSpec(rank=int(rank), seed=1, train_unembed=head == "lm_head")
        shapes = self.model.lora_shapes
        shapes = {name: shapes[name] for name in target_modules(shapes, spec)}
        return adapter_files(init_adapter(spec, shapes, "cpu"), "tiny")

    async def ends(self, *specs: SampleRequest) -> list[Finished]:
        for spec in specs:
            await self.engine.add(spec, self.read_files)
        ended: dict[str, Finished] = {}
        async with asyncio.timeout(30):
            while len(ended) < len(specs):
                ended |= {item.request_id: item for item in (await self.engine.step())[0]}
        return [ended[spec.request_id] for spec in specs]

    async def asked(self, what: str, *, at_least: int = 0) -> list[dict[str, object]]:
        async with asyncio.timeout(30):
            while True:
                lines = map(json.loads, self.log.read_text().splitlines())
                found = [body for name, body in lines if name == what]
                if len(found) >= at_least:
                    return found
                await asyncio.sleep(0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_mock(
    model: BaseModel, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Setup]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_server, "START_PAUSES_S", (0.0,) * 5)
        mocked = Setup(model, tmp_path_factory.mktemp("mock"))
        await mocked.start()
        yield mocked
        await mocked.engine.close()


@pytest.fixture
def mocked(one_mock: Setup) -> Setup:
    """Of all tests: it starts in half a second. What it was asked is of each test."""
    one_mock.log.write_text("")
    one_mock.num_reads = 0
    return one_mock


def asks(request_id: str = "a", first: int = 1, **fields: object) -> SampleRequest:
    spec = SampleRequest(request_id=request_id, prompt=[first, 2, 4], max_tokens=2)
    return replace(spec, **fields)  # type: ignore[arg-type]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def response_of(finished: Finished) -> wire_pb2.SampleResponse:
    assert finished.response is not None, finished.error
    return wire_pb2.SampleResponse.FromString(finished.response)


def tokens_of(finished: Finished) -> list[list[int]]:
    found = response_of(finished).sequences
    return [np.frombuffer(sequence.tokens, "<i4").tolist() for sequence in found]


async def test_a_models_description_without_its_weights_is_that_with_them(model: BaseModel) -> None:
    described = describe_base_model("tiny", model.facts.path)
    assert described == (model.facts, model.lora_shapes)


async def test_mocked_a_request_is_translated_field_by_field(mocked: Setup) -> None:
    spec = asks(
        temperature=0.5,
        top_k=5,
        top_p=0.9,
        seed=-1,
        num_samples=2,
        stop_strings=("x",),
        stop_tokens=(9,),
        topk_sample_logprobs=2,
    )
    [finished] = await mocked.ends(spec)
    [body] = await mocked.asked("complete")
    assert body.pop("cache_salt")
    assert body == {
        "model": "tiny",
        "prompt": [1, 2, 4],
        "max_tokens": 2,
        "n": 2,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "seed": 2**62 - 1,
        "stop": ["x"],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "stop_token_ids": [3, 9],
        "ignore_eos": True,
        "logprobs": 2,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }
    assert tokens_of(finished) == [[3, 4], [4, 5]]
    first = response_of(finished).sequences[0]
    assert first.stop_reason == wire_pb2.STOP_REASON_LENGTH
    assert np.frombuffer(first.logprobs, "<f4").tolist() == [-0.5, -0.5]
    top = first.topk_sampled_logprobs
    assert np.frombuffer(top.token_ids, "<i4").tolist() == [9, 3, 9, 4]  # most likely first
    assert finished.num_cached_tokens == response_of(finished).prompt_cache_hit_tokens == 7
    assert finished.num_sampled_tokens == 4


async def test_mocked_greedy_samples_are_asked_for_once(mocked: Setup) -> None:
    [finished] = await mocked.ends(asks(temperature=0.0, num_samples=3))
    assert [body["n"] for body in await mocked.asked("complete")] == [1]
    assert tokens_of(finished) == [[3, 4]] * 3


async def test_mocked_prompt_logprobs_come_from_the_place_of_each_token(mocked: Setup) -> None:
    spec = asks(prompt_logprobs=True, topk_prompt_logprobs=1, prompt_logprobs_last_n=1)
    response = response_of((await mocked.ends(spec))[0])
    logprobs = np.frombuffer(response.prompt_logprobs, "<f4")
    np.testing.assert_array_equal(logprobs, np.array([np.nan, np.nan, -1], "<f4"))
    assert np.frombuffer(response.topk_prompt_logprobs.token_ids, "<i4").tolist() == [0, 0, 9]


async def test_mocked_a_streamed_request_tells_its_tokens(mocked: Setup) -> None:
    await mocked.engine.add(asks(streams=True), mocked.read_files)
    told, finished = [], []
    while not finished:
        finished, messages = await mocked.engine.step()
        told += [p.tokens for message in messages.values() for p in decode_partials(message)]
    assert told in ([], [[3, 4]])  # the outcome may overtake the hint
    assert tokens_of(finished[0]) == [[3, 4]]
    [body] = await mocked.asked("complete")
    assert body["stream"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_prompt_logprobs": PromptTargets}, "target_prompt_logprobs"),
        ({"prompt_alt_tokens_k": 1}, "prompt_alt_tokens_k"),
        ({"temperature": 0.001}, r"temperature=0\.001"),
        ({"prompt": [1] * MAX_MODEL_LEN}, "up to 63"),
    ],
)
async def test_mocked_what_vllm_cannot_do_is_refused_by_name(
    mocked: Setup, fields: dict[str, object], says: str
) -> None:
    with pytest.raises(BadRequest, match=says):
        await mocked.engine.add(asks(**fields), mocked.read_files)
    assert not await mocked.asked("complete")


async def test_mocked_with_lm_head_prompt_logprobs_are_refused_and_such_adapters_are_not(
    mocked: Setup,
) -> None:
    [refused] = await mocked.ends(asks(adapter="4 lm_head"))
    assert refused.category == "user"
    assert "sampler.vllm_lm_head = true" in (refused.error or "")
    mocked.use(lm_head=True)
    tokens_of((await mocked.ends(asks(adapter="4 lm_head")))[0])
    for field in ({"prompt_logprobs": True}, {"topk_prompt_logprobs": 1}):
        with pytest.raises(Unsupported, match="vllm_lm_head = false"):
            await mocked.engine.add(asks("b", **field), mocked.read_files)
    mocked.use()


async def test_mocked_the_base_model_on_a_cpu_is_an_adapter_that_changes_nothing(
    mocked: Setup,
) -> None:
    mocked.use(base_as_adapter=True)
    tokens_of((await mocked.ends(asks()))[0])
    mocked.use()
    [body] = await mocked.asked("load")
    assert [body["lora_name"]] == [asked["model"] for asked in await mocked.asked("complete")]
    files = files_in(Path(str(body["lora_path"])))
    adapter = adapter_from_files(files, mocked.model.lora_shapes, "cpu")
    assert all(not pair.b.any() for pair in adapter.pairs.values())


async def test_mocked_an_adapter_of_rank_128_is_refused(mocked: Setup) -> None:
    [refused] = await mocked.ends(asks(adapter="128"))
    assert "rank 128" in (refused.error or "")
    assert not await mocked.asked("load")


async def test_mocked_a_version_is_loaded_once_under_a_name_of_its_own(mocked: Setup) -> None:
    specs = [asks(str(i), adapter="4 one" if i % 2 else "4 two") for i in range(6)]
    await mocked.ends(*specs)
    loads = [body["lora_name"] for body in await mocked.asked("load")]
    assert len(loads) == len(set(loads)) == mocked.num_reads == 2
    used = [body["model"] for body in await mocked.asked("complete")]
    assert sorted(used) == sorted(loads * 3)


async def test_mocked_the_least_recently_used_adapter_is_unloaded(mocked: Setup) -> None:
    for key in ("4 a", "4 b", "4 a", "4 c", "4 b"):
        await mocked.ends(asks(key, adapter=key))
    names = [body["lora_name"] for body in await mocked.asked("load")]
    a, b, c, again = names
    assert again == b
    assert [body["lora_name"] for body in await mocked.asked("unload")][-2:] == [b, a]
    assert [(mocked.folder / name).is_dir() for name in (a, b, c)] == [False, True, True]


async def test_mocked_cancelling_closes_the_request_and_reports_nothing(mocked: Setup) -> None:
    await mocked.engine.add(asks("waits", WAITS), mocked.read_files)
    await mocked.asked("complete", at_least=1)
    mocked.engine.cancel("waits")
    await mocked.asked("aborted", at_least=1)
    assert [item.request_id for item in await mocked.ends(asks("next"))] == ["next"]


async def test_mocked_a_request_is_asked_again_when_the_server_is_killed_with_its_adapter(
    mocked: Setup,
) -> None:
    ending = asyncio.create_task(mocked.ends(asks("a", WAITS, adapter="4 again")))
    await mocked.asked("complete", at_least=1)
    mocked.server._kill()
    await mocked.asked("up", at_least=1)
    await mocked.asked("load", at_least=2)  # the new server has been given it too
    await mocked.asked("complete", at_least=2)
    mocked.engine.cancel("a")
    ending.cancel()
    assert mocked.num_reads == 2


async def test_mocked_a_request_that_three_servers_die_of_fails_and_the_next_one_does_not(
    mocked: Setup,
) -> None:
    [finished] = await mocked.ends(asks("poison", DIES))
    assert finished.error == "the vLLM server died 3 times while it had this request"
    assert len(await mocked.asked("complete")) == 3
    tokens_of((await mocked.ends(asks("next")))[0])


async def test_mocked_an_error_of_vllm_fails_its_request_only(mocked: Setup) -> None:
    incarnation = mocked.server.incarnation
    failed, nan, fine = await mocked.ends(asks("f", FAILS), asks("n", NAN), asks("fine"))
    assert (failed.error, failed.category) == ("vLLM: out of luck", "server")
    assert nan.error
    tokens_of(fine)
    assert mocked.server.incarnation == incarnation


async def test_a_server_that_never_comes_up_is_an_error_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "START_PAUSES_S", (0.0,))
    server = VllmServer(["sh", "-c", "exit 7"], environ={}, socket_path=tmp_path / "s")
    with pytest.raises(ConfigError, match="exit code is 7"):
        await server.start(asyncio.Event())


async def test_an_interpreter_without_vllm_is_refused_by_its_name() -> None:
    model = ModelConfig(name="tiny", path="/tiny")
    for python in (sys.executable, "/no/such/python"):
        settings = SamplerConfig(engine="vllm", vllm_python=python)
        with pytest.raises(ConfigError, match=f"vllm_python: {python}"):
            await start_arguments(model, settings, Path("/s"), has_gpu=False)


async def test_the_servers_environment_has_no_credentials(tmp_path: Path) -> None:
    environ = {"AWS_SECRET_ACCESS_KEY": "s", "PATH": "/bin", "PYTHONPATH": "/ours"}
    assert start_environ(environ, tmp_path, num_threads=1) == {
        "PATH": "/bin",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_RPC_BASE_PATH": str(tmp_path),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


async def test_a_folder_that_is_no_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        await start_vllm_engine(
            ModelConfig(name="tiny", path=str(tmp_path)), SamplerConfig(engine="vllm"), {}
        )
