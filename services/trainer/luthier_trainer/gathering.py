"""Calls that are made at the same time, as one engine call."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

Tell = Callable[[int, Answer | Exception], None]
"""Takes the index of what was asked, and its answer or error."""


class Gathering(Generic[Asked, Answer]):
    """Asks the engine for everything that waits, and again for what has come meanwhile."""

    def __init__(self, call: Callable[[Sequence[Asked], Tell[Answer]], Awaitable[None]]) -> None:
        """`call` tells every answer before it returns; what it raises is the others' answer."""
        self._call = call
        self._waiting: list[tuple[Asked, asyncio.Future[Answer]]] = []
        self._caller: asyncio.Task[None] | None = None

    async def ask(self, asked: Asked) -> Answer:
        """The answer, as soon as it is known, or the error."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, answer))
        if self._caller is None:
            self._caller = asyncio.create_task(self._work_off())
        return await answer

    async def _work_off(self) -> None:
        while True:
            # The others of this cycle are at the same point: let them come before the call.
            await asyncio.sleep(0)
            if not self._waiting:
                break
            together, self._waiting = self._waiting, []
            await self._ask_together(*zip(*together, strict=True))
        self._caller = None

    async def _ask_together(
        self, asked: Sequence[Asked], answers: Sequence[asyncio.Future[Answer]]
    ) -> None:
        try:
            await self._call(asked, lambda index, found: _resolve(answers[index], found))
        except Exception as error:
            for answer in answers:
                _resolve(answer, error)


def _resolve(answer: asyncio.Future[Answer], found: Answer | Exception) -> None:
    if answer.done():
        return  # told before, or its run was let go
    if isinstance(found, Exception):
        answer.set_exception(found)
    else:
        answer.set_result(found)
