"""The engine's thread, with an engine whose steps last as long as the test wants."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from luthier_sampler.engine import Finished
from luthier_sampler.engine_thread import EngineThread
from luthier_sampler.sequence import SampleRequest

NUM_STEPS = 3


class HeldEngine:
    """Each step waits to be let go; a request ends with its third."""

    def __init__(self) -> None:
        self.in_step = threading.Semaphore(0)
        self.let_go = threading.Semaphore(0)
        self.num_together: list[int] = []
        """Requests of each step."""
        self.error: Exception | None = None
        self._left: dict[str, int] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def has_adapter(self, adapter: str) -> bool:
        return True

    def add(self, request: SampleRequest) -> None:
        self._left[request.request_id] = NUM_STEPS

    def step(self) -> list[Finished]:
        self.num_together.append(len(self._left))
        self.in_step.release()
        self.let_go.acquire()
        if self.error:
            raise self.error
        self._left = {name: left - 1 for name, left in self._left.items()}
        ended = [name for name, left in self._left.items() if not left]
        for name in ended:
            del self._left[name]
        return [Finished(name, b"") for name in ended]

    def partials(self) -> dict[str, str]:
        return {}


async def no_files(key: str) -> dict[str, bytes]:
    raise AssertionError(key)


def request(name: str) -> SampleRequest:
    return SampleRequest(request_id=name, prompt=(1,), adapter="one for all")


@pytest.fixture
def engine() -> HeldEngine:
    return HeldEngine()


@pytest.fixture
async def thread(engine: HeldEngine) -> AsyncIterator[EngineThread]:
    thread = EngineThread(engine)  # type: ignore[arg-type]
    yield thread
    engine.let_go.release(1000)
    await thread.close()


async def test_all_that_come_during_a_step_join_the_next(
    engine: HeldEngine, thread: EngineThread
) -> None:
    await thread.add(request("first"), no_files)
    told = asyncio.create_task(thread.step())
    await asyncio.to_thread(engine.in_step.acquire)

    adding = [asyncio.create_task(thread.add(request(f"{i}"), no_files)) for i in range(20)]
    await asyncio.sleep(0)  # each has put its call in line
    engine.let_go.release(1000)
    await asyncio.gather(told, *adding)

    assert engine.num_together[:2] == [1, 21]


async def test_steps_follow_each_other_until_there_is_something_to_tell(
    engine: HeldEngine, thread: EngineThread
) -> None:
    engine.let_go.release(NUM_STEPS)
    await thread.add(request("a"), no_files)

    finished, _ = await thread.step()

    assert ([item.request_id for item in finished], engine.num_together) == (["a"], [1, 1, 1])


async def test_an_error_of_a_step_reaches_who_waits_for_it(
    engine: HeldEngine, thread: EngineThread
) -> None:
    engine.error = RuntimeError("a bug")
    engine.let_go.release(NUM_STEPS)
    await thread.add(request("a"), no_files)

    with pytest.raises(RuntimeError, match="a bug"):
        async with asyncio.timeout(10):
            await thread.step()
