"""Forward and forward_backward ops that are executed at the same time, as one engine call."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from luthier_trainer.engine import Engine, PassOp


class Passes:
    """The engine's passes over the ops of all runs."""

    def __init__(
        self, engine: Engine, on_engine: Callable[..., Awaitable[Any]], *, fused: bool
    ) -> None:
        self._engine = engine
        self._on_engine = on_engine
        self._fused = fused
        self._waiting: list[tuple[PassOp, asyncio.Future[bytes]]] = []
        self._clock_cycle = 0
        self._caller: asyncio.Task[None] | None = None

    async def carry_out(self, op: PassOp, clock_cycle: int) -> bytes:
        """The op's output, or its error; not `fused`, it is an engine call of its own."""
        if not self._fused:
            output: bytes = await self._on_engine(
                *(self._engine.forward_backward, op.run_id, op.request),
                backward=op.backward,
                clock_cycle=clock_cycle,
            )
            return output
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append((op, answer))
        self._clock_cycle = clock_cycle
        if self._caller is None:
            self._caller = asyncio.create_task(self._call_engine())
        return await answer

    async def _call_engine(self) -> None:
        """Calls with all ops that wait, and again with those that came meanwhile."""
        loop = asyncio.get_running_loop()
        while True:
            # The others of this cycle are at the same point: let them come before the call.
            await asyncio.sleep(0)
            if not self._waiting:
                break
            together, self._waiting = self._waiting, []

            def call(together: list[tuple[PassOp, asyncio.Future[bytes]]] = together) -> None:
                ops = [op for op, _ in together]
                for index, output in self._engine.forward_backward_many(
                    ops, clock_cycle=self._clock_cycle, fused=True
                ):
                    loop.call_soon_threadsafe(_resolve, together[index][1], output)

            try:
                await self._on_engine(call)
            except Exception as error:
                for _, answer in together:
                    _resolve(answer, error)
        self._caller = None


def _resolve(answer: asyncio.Future[bytes], output: bytes | Exception) -> None:
    if answer.done():
        return  # its run was let go
    if isinstance(output, Exception):
        answer.set_exception(output)
    else:
        answer.set_result(output)
