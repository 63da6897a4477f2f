"""Helpers that need no server: data, tensors, metrics, chunks, back-pressure, the bar."""

import asyncio
import contextlib
import io
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

import luthier
from luthier import _loop, data, metrics, types, wire
from luthier.polling import CompletionPoller
from luthier.progress import StatusLine, progress
from luthier.session import Session
from luthier.settings import read_settings
from luthier.window import Window


class LetterTokenizer:
    """A token per character; its template writes <role>content; for each turn."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        text = "".join(f"<{message['role']}>{message['content']};" for message in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


def learnt(datum: types.Datum) -> str:
    """The characters that have weight."""
    targets = datum.loss_fn_inputs["target_tokens"].tolist()
    weights = datum.loss_fn_inputs["weights"].tolist()
    return "".join(chr(t) for t, w in zip(targets, weights, strict=True) if w)


CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]


@pytest.mark.parametrize(
    ("train_on", "expected"), [("last_assistant", "no;"), ("all_assistants", "yes;no;")]
)
def test_only_the_assistants_turns_are_learnt(train_on: Any, expected: str) -> None:
    tokenizer: Any = LetterTokenizer()
    datum = data.datum_from_messages(CHAT, tokenizer, train_on=train_on)
    assert learnt(datum) == expected
    assert len(data.datum_from_messages(CHAT, tokenizer, max_length=9).model_input.to_ints()) == 9


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    class Forgetful(LetterTokenizer):
        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return f"{len(messages)}" + super().apply_chat_template(messages, **options)

    tokenizer: Any = Forgetful()
    with pytest.raises(ValueError, match="template"):
        data.datum_from_messages(CHAT, tokenizer)


def test_a_completion_is_learnt_and_its_prompt_is_not() -> None:
    datum = data.datum_from_completion([1, 2, 3], [4, 5])
    assert datum.model_input.to_ints() == [1, 2, 3, 4]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [2, 3, 4, 5]
    assert datum.loss_fn_inputs["weights"].tolist() == [0.0, 0.0, 1.0, 1.0]


@given(st.lists(st.integers(2, 30)), st.integers(1, 40), st.integers(1, 5))
def test_batches_keep_the_order_and_the_limits(
    lengths: list[int], max_tokens: int, max_datums: int
) -> None:
    datums = [data.datum_from_tokens(list(range(length))) for length in lengths]
    made = list(data.batches(datums, max_tokens=max_tokens, max_datums=max_datums))
    assert [datum for batch in made for datum in batch] == datums
    for batch in made:
        assert 1 <= len(batch) <= max_datums
        assert len(batch) == 1 or sum(d.model_input.length for d in batch) <= max_tokens


def test_a_dry_run_counts_what_training_would_take() -> None:
    datums = [data.datum_from_completion([1] * 10, [2] * 5)] * 10
    told = data.estimate(datums, batch_tokens=30, num_epochs=3, price_per_million_tokens=2.0)
    assert (told.num_tokens, told.num_weighted_tokens, told.num_steps) == (140, 50, 15)
    assert told.cost == pytest.approx(420 / 1e6 * 2)


def test_metrics_survive_as_lines_and_nan_is_null(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "metrics.jsonl"
    with metrics.MetricsLog(path, config={"rank": 4}) as log:
        log.write({"loss": 0.5}, step=1)
        log.write({"loss": float("nan")}, step=2)
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert [(line["step"], line["loss"]) for line in metrics.read_metrics(path)] == [
        (1, 0.5),
        (2, None),
    ]


def test_a_mock_of_wandb_is_told_the_config_the_metrics_and_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Mock()  # the package is large, and sends what it is told
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    wanted = metrics.WandbConfig("project", name="run", tags=["a"])
    with metrics.MetricsLog(tmp_path / "m.jsonl", wandb=wanted, config={"rank": 4}) as log:
        log.write({"loss": 0.5}, step=1)
    told = {"project": "project", "name": "run", "group": None, "tags": ["a"]}
    assert wandb.mock_calls == [
        call.init(**told, config={"rank": 4}),
        call.init().log({"loss": 0.5}, step=1),
        call.init().finish(),
    ]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="WandbConfig needs wandb: pip install wandb"):
        metrics.MetricsLog(tmp_path / "n.jsonl", wandb=wanted)


# --- tensors --------------------------------------------------------------------------------------


def test_every_way_to_give_an_input_makes_the_same_tensor() -> None:
    given_as = [[1.0, 0.0], np.array([1.0, 0.0]), torch.tensor([1.0, 0.0], requires_grad=True)]
    prompt = types.ModelInput.from_ints([1, 2])
    made = [types.Datum(prompt, {"weights": value}).loss_fn_inputs["weights"] for value in given_as]
    assert made[0] == made[1] == made[2] == types.TensorData([1.0, 0.0], "float32", [2])


@given(st.lists(st.lists(st.sampled_from([0, 0, 0, 7, -1]), min_size=6, max_size=6), max_size=9))
def test_a_sparse_tensor_is_dense_again_bit_for_bit(rows: list[list[int]]) -> None:
    tensor = torch.tensor(rows, dtype=torch.int64).reshape(-1, 6)
    sparse = types.TensorData.from_torch_sparse(tensor)
    assert torch.equal(sparse.to_torch(), tensor)
    message = wire._tensor(sparse)
    assert wire._decode_tensor(message) == sparse


def test_target_tokens_may_be_a_model_input() -> None:
    prompt = types.ModelInput.from_ints([1, 2])
    made = types.Datum(prompt, {"target_tokens": types.ModelInput.from_ints([2, 3])})
    assert made.loss_fn_inputs["target_tokens"] == types.TensorData([2, 3], "int64", [2])


def test_what_is_no_tensor_is_named() -> None:
    prompt = types.ModelInput.from_ints([1, 2])
    with pytest.raises(TypeError, match="model_input"):
        types.Datum([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights"):
        types.Datum(prompt, {"weights": [[1.0], [1.0, 2.0]]})
    with pytest.raises(TypeError, match="advantages"):
        types.Datum(prompt, {"advantages": "none"})


def test_model_inputs_grow_token_by_token() -> None:
    grown = types.ModelInput.empty().append_int(1).append_int(2)
    image = types.ImageChunk(data=b"png", format="png", expected_tokens=9)
    assert grown.to_ints() == [1, 2]
    assert len(grown.chunks) == 1
    assert grown.append(image).append_int(3).length == 12


# --- wire -----------------------------------------------------------------------------------------


def test_metrics_of_chunks_are_reduced_by_their_suffix() -> None:
    chunks = [
        {"a:sum": 1.0, "a:mean": 1.0, "a:max": 1.0, "a:unique": 5.0, "a:slack": 1.0, "b:sum": 1.0},
        {"a:sum": 2.0, "a:mean": 4.0, "a:max": 3.0, "a:unique": 5.0, "a:slack": 4.0, "a:odd": 1.0},
    ]
    assert wire.reduce_metrics(chunks, [2, 1]) == {
        "a:sum": 3.0,
        "a:mean": 2.0,
        "a:max": 3.0,
        "a:unique": 5.0,
        "a:unique_1": 5.0,
        "a:slack": 2.0,
    }


@given(st.lists(st.integers(2, 50), max_size=30), st.integers(1, 6), st.integers(60, 400))
def test_chunks_keep_the_order_and_the_limits(
    lengths: list[int], max_datums: int, max_bytes: int
) -> None:
    datums = [wire.encode_datum(data.datum_from_tokens(list(range(n)))) for n in lengths]
    request = wire.loss_request("ppo", {"clip": 0.5, "name": "x"}, forward_only=True)
    chunks = wire.split(datums, request, max_datums=max_datums, max_bytes=max_bytes)
    assert [datum for chunk in chunks for datum in chunk.data] == datums
    for chunk in chunks:
        assert (chunk.loss_fn, chunk.forward_only) == ("ppo", True)
        assert chunk.loss_fn_config_v2["name"].text == "x"
        sizes = [datum.ByteSize() for datum in chunk.data]
        assert len(sizes) <= max_datums
        assert len(sizes) <= 1 or sum(sizes) <= max_bytes


def test_a_result_that_is_no_protobuf_is_shown() -> None:
    with pytest.raises(luthier.APIResponseValidationError, match="a proxy's page"):
        wire.decode_forward_backward(b"a proxy's page")
    with pytest.raises(luthier.APIResponseValidationError, match="SampleResponse"):
        wire.decode_sample(b"a proxy's page", ["s:0"])


# --- waiting --------------------------------------------------------------------------------------


async def test_a_refusal_halves_the_window_once_and_successes_open_it() -> None:
    window = Window(8, least=2, most=16)
    window.refused(0.01)
    window.refused(0.01)
    assert window.size == 4
    async with window.slot():  # waits for the pause
        pass
    for _ in range(200):
        window.succeeded()
    assert window.size == 16


async def test_a_cancelled_wait_gives_its_place_to_the_next() -> None:
    window = Window(1, least=1, most=1)
    order: list[str] = []

    async def take(name: str) -> None:
        async with window.slot():
            order.append(name)

    async with window.slot():
        tasks = [asyncio.create_task(take(name)) for name in "abc"]
        await asyncio.sleep(0)
        tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == ["a", "c"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_thousand_waits_are_one_line() -> None:
    terminal = Terminal()
    line = StatusLine(terminal)
    owners = [object() for _ in range(1000)]
    for owner in owners:
        line.show(owner, "waiting: for a \x1b[31mslot")
    for owner in owners:
        line.clear(owner)
    assert terminal.getvalue() == "\r\x1b[Kwaiting: for a  [31mslot\r\x1b[K"


def test_a_bar_counts_and_gives_the_results_in_order() -> None:
    async def value(n: int) -> int:
        return n

    terminal = Terminal()
    futures = [_loop.start(value(n)) for n in range(20)]
    assert list(progress(futures, "sampling", stream=terminal)) == list(range(20))
    assert "20/20" in terminal.getvalue()


async def test_a_timeout_does_not_end_a_request_and_a_cancelled_wait_does() -> None:
    release = asyncio.Event()

    async def wait() -> str:
        await release.wait()
        return "done"

    future = _loop.start(wait())
    with pytest.raises(TimeoutError):
        await future.result_async(0.01)
    with pytest.raises(TimeoutError):
        future.result(0.01)
    assert not future.done()
    waiting = asyncio.create_task(future.coroutine())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert future.done()


def test_errors_travel_between_processes() -> None:
    import copy

    failed = copy.copy(luthier.RequestFailedError("why", "run:3", "user"))
    assert (failed.message, failed.request_id, failed.category) == ("why", "run:3", "user")
    assert copy.copy(luthier.NotFoundError("404: gone", 404)).status_code == 404


@contextlib.asynccontextmanager
async def polling(
    retrieve_futures: Callable[[web.Request], Awaitable[web.Response]],
) -> AsyncIterator[CompletionPoller]:
    app = web.Application()
    app.router.add_post("/api/v1/retrieve_futures", retrieve_futures)
    async with TestServer(app) as server:
        session = Session(read_settings(str(server.make_url("")), "tml-any"))
        yield CompletionPoller(session, "s:sample:0", 0)
        await session.close("success")


async def test_nobody_polls_for_a_sample_that_is_there_and_its_result_is_acknowledged() -> None:
    asked: list[dict[str, Any]] = []

    async def retrieve_futures(request: web.Request) -> web.Response:
        asked.append(await request.json())
        completions = [{"state": "finished", "request_id": "one"}] if len(asked) == 1 else []
        return web.json_response({"completions": completions, "cursor": 1})

    async with polling(retrieve_futures) as poller:
        with poller.expecting():
            await poller.wait("one")
            poller.retrieved("one")
        assert poller._poll is not None
        await poller._poll
    assert [one.get("timeout") for one in asked] == [None, 0.0]
    assert asked[1]["retrieved_request_ids"] == ["one"]


async def test_a_completion_that_is_reported_before_its_id_is_known_is_kept() -> None:
    reports = [[{"state": "finished", "request_id": "early"}], []]

    async def retrieve_futures(request: web.Request) -> web.Response:
        completions = reports.pop(0) if reports else []
        return web.json_response({"completions": completions, "cursor": 2 - len(reports)})

    async with polling(retrieve_futures) as poller, asyncio.timeout(5):
        with poller.expecting():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):  # somebody else's sample drives the polling
                    await poller.wait("other")
            await poller.wait("early")
