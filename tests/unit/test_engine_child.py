"""The engine's process and its supervisor: frames, death, deadlines, copies beside the work."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop
from tests.unit.mortal_engine import MortalEngine, request

from luthier_core.errors import BadRequest, ConfigError, LuthierError, NotFound
from luthier_core.records import LoraConfig
from luthier_trainer.engine_client import EngineClient, EngineDied, ThreadEngine
from luthier_trainer.engine_host import STATE_FILE, EngineHost
from luthier_trainer.frames import (
    PIECE_BYTES,
    PREFIX,
    Assembler,
    BadFrame,
    EngineFailed,
    Message,
    OutOfMemory,
    error_message,
    error_of,
    frames_of,
    lengths,
)
from luthier_trainer.supervisor import ChildEngine, Estimates

ROOT = Path(__file__).parents[2]
RUN, LORA = "run", LoraConfig(rank=2, seed=1)


def mortal_child(folder: Path, *, op_timeout_s: float = 60.0, **hello: Any) -> ChildEngine:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return ChildEngine(
        [sys.executable, "-m", "tests.unit.mortal_engine"],
        Message({"folder": str(folder), **hello}),
        environ=environ,
        op_timeout_s=op_timeout_s,
    )


@contextlib.asynccontextmanager
async def started(folder: Path, **options: Any) -> AsyncIterator[ChildEngine]:
    engine = mortal_child(folder, **options)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


async def gradient(engine: EngineClient, data: bytes) -> bytes:
    return await engine.forward_backward(RUN, data, backward=True, clock_cycle=1)


# --- frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [(), (b"",), (b"", b"x", b""), (b"a" * (2 * PIECE_BYTES + 1), b"b" * PIECE_BYTES, b"c")],
    ids=["none", "empty", "some", "large"],
)
def test_a_message_arrives_as_it_was_sent_in_frames_of_limited_size(data: tuple[bytes, ...]):
    assembler = Assembler()
    arrived = []
    for frame in frames_of(7, Message({"method": "x", "loss": float("inf")}, data)):
        header_bytes, body_bytes = lengths(frame[: PREFIX.size])
        assert body_bytes <= PIECE_BYTES
        header = frame[PREFIX.size : PREFIX.size + header_bytes]
        if (message := assembler.add(header, frame[PREFIX.size + header_bytes :])) is not None:
            arrived.append(message)
    assert [(number, tuple(message.data)) for number, message in arrived] == [(7, data)]
    assert arrived[0][1].fields == {"method": "x", "loss": float("inf")}


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"{", b""),
        (b"[]", b""),
        (b'{"id": 1, "last": true}', b""),
        (b'{"id": 1, "last": true, "fields": {}, "sizes": [2]}', b"x"),
        (b'{"id": 1, "last": true, "fields": {}, "sizes": [-1, 2]}', b"x"),
        (b'{"id": 1, "last": false, "fields": {}, "sizes": [99999999999999]}', b"x"),
    ],
)
def test_what_is_no_frame_is_refused(header: bytes, body: bytes):
    with pytest.raises(BadFrame):
        Assembler().add(header, body)


def test_lengths_beyond_the_limits_are_refused():
    with pytest.raises(BadFrame):
        lengths(PREFIX.pack(10, PIECE_BYTES + 1))
    with pytest.raises(BadFrame):
        lengths(PREFIX.pack(2**31, 0))


@pytest.mark.parametrize(
    "error",
    [BadRequest("rank"), NotFound("run"), LuthierError("x"), ValueError("y"), OutOfMemory("z")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_raised_as_it_was_at_the_other_end(error: Exception):
    raised = error_of(error_message(error))
    assert (type(raised), str(raised)) == (type(error), str(error))


def test_an_error_that_nobody_foresaw_is_told_as_such():
    raised = error_of(error_message(KeyError("run")))
    assert isinstance(raised, EngineFailed)
    assert "KeyError: 'run'" in str(raised)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_what_allocators_raise_is_known_as_out_of_memory(error: Exception):
    class Full:
        def clear_gradient(self, run_id: str) -> None:
            raise error

    freed: list[bool] = []
    host = EngineHost(Full(), free_memory=lambda: freed.append(True))
    with pytest.raises(OutOfMemory):
        host.apply(Message({"method": "clear_gradient", "run_id": RUN}))
    assert freed == [True]


# --- the process ----------------------------------------------------------------------------------


async def test_a_child_answers_as_the_engine_in_this_process_does(tmp_path: Path):
    async def use(engine: EngineClient) -> list[Any]:
        await engine.create(RUN, LORA)
        answers: list[Any] = [await gradient(engine, request(1)), await engine.checksum(RUN)]
        copy = await engine.copy_state(RUN)
        answers.append(await gradient(engine, request(2)))
        data = (await engine.fetch(copy))[STATE_FILE]
        await engine.take_state(RUN, LORA, data)
        files = await engine.fetch(await engine.copy_files(RUN, optimizer=True))
        return [*answers, data, files, await engine.checksum(RUN)]

    local = ThreadEngine(MortalEngine(tmp_path))
    async with started(tmp_path) as child:
        assert await use(child) == await use(local)
    await local.close()


async def test_the_bytes_of_a_copy_come_while_the_engine_works(tmp_path: Path):
    async with started(tmp_path) as engine:
        await engine.create(RUN, LORA)
        copy = await engine.copy_state(RUN)
        working = asyncio.create_task(gradient(engine, request(1, "wait")))
        while not (tmp_path / "waits").exists():
            await asyncio.sleep(0)
        assert await engine.fetch(copy)
        assert not working.done()
        (tmp_path / "go").touch()
        await working


async def test_a_copy_is_forgotten_with_its_run(tmp_path: Path):
    async with started(tmp_path) as engine:
        await engine.create(RUN, LORA)
        copy = await engine.copy_state(RUN)
        await engine.drop(RUN)
        with pytest.raises(EngineFailed):
            await engine.fetch(copy)


async def test_what_the_child_complains_of_at_its_start_is_raised(tmp_path: Path):
    engine = mortal_child(tmp_path, do="refuse")
    with pytest.raises(ConfigError, match="no such model"):
        await engine.start()
    await engine.close()


async def test_a_child_that_talks_nonsense_is_killed(tmp_path: Path):
    engine = mortal_child(tmp_path, do="babble")
    with pytest.raises(EngineDied, match="no frame"):
        await engine.start()
    await engine.close()


@pytest.mark.parametrize("do", ["kill", "hang"])
async def test_the_call_under_way_learns_of_the_death_and_later_ones_that_they_were_not(
    tmp_path: Path, do: str
):
    async with started(tmp_path, op_timeout_s=0.2) as engine:
        await engine.create(RUN, LORA)
        for n in range(3):  # until it is known that they take no time
            await gradient(engine, request(n))
        under_way = asyncio.create_task(gradient(engine, request(3, do)))
        waiting = asyncio.create_task(engine.checksum(RUN))
        deaths = await asyncio.gather(under_way, waiting, return_exceptions=True)
        assert [isinstance(d, EngineDied) and d.under_way for d in deaths] == [True, False]
        assert ("hung" in str(deaths[0])) == (do == "hang")
        await engine.died()
        await engine.start()
        await engine.create(RUN, LORA)  # the next one knows nothing, and works
    assert len((tmp_path / "starts").read_text().split()) == 2


def test_a_call_to_a_child_whose_connection_is_closed_learns_of_its_death(tmp_path: Path):
    async def call() -> None:
        async with started(tmp_path) as engine:
            os.kill(engine.pid, signal.SIGSTOP)  # it has not ended yet
            assert engine._child is not None
            engine._child.writer.close()
            await engine._child.writer.wait_closed()
            calling = asyncio.create_task(engine.create(RUN, LORA))
            await asyncio.wait({calling}, timeout=0)
            os.kill(engine.pid, signal.SIGCONT)
            with pytest.raises(EngineDied) as death:
                await calling
            assert not death.value.under_way

    # As the services do: asyncio's own transports would only log what is written after the end.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(call())


async def test_no_signal_of_a_terminal_ends_a_child(tmp_path: Path):
    async with started(tmp_path) as engine:
        os.kill(engine.pid, signal.SIGTERM)
        os.kill(engine.pid, signal.SIGINT)
        await engine.create(RUN, LORA)


async def test_a_child_is_gone_once_it_is_closed(tmp_path: Path):
    async with started(tmp_path) as engine:
        pid = engine.pid
    assert not psutil.pid_exists(pid)


def test_a_child_does_not_outlive_its_supervisor(tmp_path: Path):
    program = f"""
import asyncio, sys
from pathlib import Path
from tests.unit.test_engine_child import mortal_child
async def main():
    engine = mortal_child(Path({str(tmp_path)!r}))
    await engine.start()
    print(engine.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    give_up_at = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        while child.status() != psutil.STATUS_ZOMBIE:  # nobody may be there to reap it
            assert time.monotonic() < give_up_at


async def test_a_supervisor_says_that_a_child_is_overdue_once_it_cannot_kill_it(tmp_path: Path):
    now = 0.0
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    engine = ChildEngine(
        [sys.executable, "-m", "tests.unit.mortal_engine"],
        Message({"folder": str(tmp_path)}),
        environ=environ,
        op_timeout_s=60.0,
        clock=lambda: now,
    )
    try:
        await engine.start()
        await engine.create(RUN, LORA)
        working = asyncio.create_task(gradient(engine, request(1, "wait")))
        while not (tmp_path / "waits").exists():
            await asyncio.sleep(0)
        now = 60.0
        assert engine.in_time()
        now = 1000.0
        assert not engine.in_time()
        (tmp_path / "go").touch()
        await working
        assert engine.in_time()
    finally:
        await engine.close()


def test_an_estimate_follows_what_calls_took():
    estimates = Estimates()
    before = estimates.seconds("forward_backward", 10**6)
    for _ in range(20):
        estimates.note("forward_backward", 10**6, 2.0)
    assert before > 100  # nothing is known of the machine
    assert estimates.seconds("forward_backward", 10**6) == pytest.approx(2.0)
    assert estimates.seconds("forward_backward", 10**7) == pytest.approx(20.0, rel=0.01)
