"""How the requests of one run are numbered and sent, seen by a server that holds them back."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import luthier
from luthier import types
from luthier.run_requests import MAX_SENDING
from luthier.session import Session
from luthier.settings import read_settings
from luthier.tokenizer import tokenizer_of
from luthier.training import RunIds

INFO = types.GetInfoResponse.model_validate({"model_id": "s:train:0", "model_data": {}})
ADAM = types.AdamParams()


class HoldingServer:
    """Answers optimizer steps once `num_held` have arrived; a step's result is its number."""

    def __init__(self, num_held: int) -> None:
        self.seqs: list[int] = []
        self._num_held = num_held
        self._enough = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/api/v1/optim_step", self.optim_step)
        app.router.add_post("/api/v1/retrieve_future", self.retrieve_future)
        return app

    async def optim_step(self, request: web.Request) -> web.Response:
        seq = (await request.json())["seq_id"]
        self.seqs.append(seq)
        if len(self.seqs) == self._num_held:
            self._enough.set()
        async with asyncio.timeout(20):
            await self._enough.wait()
        return web.json_response({"request_id": f"s:train:0:{seq}"})

    async def retrieve_future(self, request: web.Request) -> web.Response:
        request_id: str = (await request.json())["request_id"]
        return web.json_response({"metrics": {"seq": int(request_id.rpartition(":")[2])}})


@pytest.fixture
async def holding() -> AsyncIterator[tuple[HoldingServer, luthier.TrainingClient]]:
    server = HoldingServer(MAX_SENDING)
    async with TestServer(server.app()) as running:
        session = Session(read_settings(str(running.make_url("")), "tml-any"))

        async def known() -> RunIds:
            return RunIds("s:train:0", INFO)

        yield server, luthier.TrainingClient(session, session.start(known()))
        await asyncio.wrap_future(luthier._loop.start(session.close("success")).future())


async def test_requests_of_a_run_travel_together_and_keep_the_order_of_the_calls(
    holding: tuple[HoldingServer, luthier.TrainingClient],
) -> None:
    server, training = holding
    futures = [training.optim_step(ADAM) for _ in range(2 * MAX_SENDING)]
    numbers = [(await future).metrics for future in futures]
    assert numbers == [{"seq": n} for n in range(1, 2 * MAX_SENDING + 1)]
    assert sorted(server.seqs[:MAX_SENDING]) == list(range(1, MAX_SENDING + 1))


async def test_a_request_that_is_given_up_is_sent_all_the_same(
    holding: tuple[HoldingServer, luthier.TrainingClient],
) -> None:
    server, training = holding
    futures = [training.optim_step(ADAM) for _ in range(MAX_SENDING)]
    assert futures[2].cancel()
    assert (await futures[-1]).metrics == {"seq": MAX_SENDING}
    assert sorted(server.seqs) == list(range(1, MAX_SENDING + 1))


def test_a_tokenizer_folder_of_another_machine_is_not_looked_for_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("luthier.tokenizer.load_tokenizer", asked.append)
    tokenizer_of("Qwen/Qwen3-8B", "/no/such/folder")
    tokenizer_of("Qwen/Qwen3-8B", "Qwen/Qwen3-8B:main")
    tokenizer_of("Qwen/Qwen3-8B", None)
    assert asked == ["Qwen/Qwen3-8B", "Qwen/Qwen3-8B:main", "Qwen/Qwen3-8B"]
    with pytest.raises(luthier.LuthierError, match="tokenizer"):
        tokenizer_of(None, None)
