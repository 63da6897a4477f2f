"""The engine as the worker sees it: typed calls, and what is to be known of its death.

Two engines are behind it: a child process (supervisor.ChildEngine), and one on a thread of this
process (ThreadEngine), for engines that are toys. Neither needs torch here.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from luthier_core.records import LoraConfig
from luthier_core.types import AdamParams
from luthier_trainer.engine_host import EngineHost, PassOp, Tell
from luthier_trainer.frames import Message, error_of


class EngineDied(Exception):
    """The engine has gone, and with it the state of every run."""

    def __init__(self, reason: str, *, under_way: bool) -> None:
        """`under_way`: it was carrying out this very call."""
        super().__init__(reason)
        self.under_way = under_way


class EngineClient(ABC):
    """Calls of one engine, one at a time in the order they came, whoever makes them.

    A call raises what the engine raises (LuthierError, ValueError), OutOfMemory, EngineFailed for
    an error that nobody foresaw, or EngineDied.
    """

    @abstractmethod
    async def call(
        self, message: Message, *, beside: bool = False, tell: Tell | None = None
    ) -> Message:
        """The engine's answer; with `beside`, without waiting for the calls before it.

        Parts of it are passed to `tell` as soon as they are known, all of them before it returns.
        """

    @abstractmethod
    async def start(self) -> None:
        """Have an engine, a new one if the last has died: it knows no run."""

    @abstractmethod
    async def close(self) -> None:
        """End it."""

    async def died(self) -> None:
        """Returns once the engine that was started last has died."""
        await asyncio.Event().wait()

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a run's bits depend on beside its ops."""
        return {}

    def in_time(self) -> bool:
        """Whether it makes progress, or is not yet due to have made some."""
        return True

    # --- one method per kind of call; engine.Engine says what they do -----------------------------

    async def create(self, run_id: str, lora: LoraConfig) -> None:
        await self._do("create", run_id, lora=lora.model_dump())

    async def forward_backward(
        self, run_id: str, request: bytes, *, backward: bool, clock_cycle: int, halvings: int = 0
    ) -> bytes:
        options = {"backward": backward, "clock_cycle": clock_cycle}
        if halvings:
            options["halvings"] = halvings
        return (await self._do("forward_backward", run_id, request, **options)).data[0]

    async def forward_backward_many(
        self, ops: Sequence[PassOp], tell: Callable[[int, bytes | Exception], None]
    ) -> None:
        """`tell` gets the index and the output, or error, of each op as soon as it is known."""
        wanted = [
            {"run_id": op.run_id, "backward": op.backward, "clock_cycle": op.clock_cycle}
            for op in ops
        ]
        await self.call(
            Message({"method": "forward_backward_many", "ops": wanted}, [op.request for op in ops]),
            tell=lambda part: tell(part.fields["part"], error_of(part) or part.data[0]),
        )

    async def optim_step(self, run_id: str, params: AdamParams) -> dict[str, float]:
        return _metrics(await self._do("optim_step", run_id, params=params.model_dump()))

    async def optim_step_many(
        self,
        steps: Sequence[tuple[str, AdamParams]],
        tell: Callable[[int, dict[str, float] | Exception], None],
    ) -> None:
        """`tell` gets the index and the metrics, or error, of each step as soon as it is done."""
        wanted = [(run_id, params.model_dump()) for run_id, params in steps]
        await self.call(
            Message({"method": "optim_step_many", "steps": wanted}),
            tell=lambda part: tell(part.fields["part"], error_of(part) or _metrics(part)),
        )

    async def clear_gradient(self, run_id: str) -> None:
        await self._do("clear_gradient", run_id)

    async def logprob_gap(self, run_id: str) -> dict[str, float]:
        metrics = (await self._do("logprob_gap", run_id)).fields["metrics"]
        return {str(name): float(value) for name, value in metrics.items()}

    async def load(self, run_id: str, files: Mapping[str, bytes], *, optimizer: bool) -> None:
        await self._do("load", run_id, *files.values(), names=list(files), optimizer=optimizer)

    async def copy_files(self, run_id: str, *, optimizer: bool) -> str:
        """The id of a copy of what a checkpoint is made of, kept until it is fetched."""
        return str((await self._do("copy_files", run_id, optimizer=optimizer)).fields["copy"])

    async def copy_state(self, run_id: str) -> str:
        """The id of a copy of the whole state as it is now, kept until it is fetched."""
        return str((await self._do("copy_state", run_id)).fields["copy"])

    async def fetch(self, copy: str) -> dict[str, bytes]:
        """The files of a copy, once; the engine goes on with other calls meanwhile."""
        answer = await self.call(Message({"method": "fetch", "copy": copy}), beside=True)
        return dict(zip(answer.fields["names"], answer.data, strict=True))

    async def take_state(self, run_id: str, lora: LoraConfig, data: bytes) -> None:
        await self._do("take_state", run_id, data, lora=lora.model_dump())

    async def checksum(self, run_id: str) -> str:
        return str((await self._do("checksum", run_id)).fields["checksum"])

    async def drop(self, run_id: str) -> None:
        """Forget the run, and the copies of it."""
        await self._do("drop", run_id)

    async def _do(self, method: str, run_id: str, *data: bytes, **fields: Any) -> Message:
        return await self.call(Message({"method": method, "run_id": run_id, **fields}, data))


def _metrics(answer: Message) -> dict[str, float]:
    return {str(name): float(value) for name, value in answer.fields["metrics"].items()}


class ThreadEngine(EngineClient):
    """An engine on a thread of this process, which it takes along when it dies."""

    def __init__(self, engine: Any, **host: Callable[..., Any]) -> None:
        """`engine` and `host`: see EngineHost."""
        self._host = EngineHost(engine, **host)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def call(
        self, message: Message, *, beside: bool = False, tell: Tell | None = None
    ) -> Message:
        if beside:
            return await asyncio.to_thread(self._host.apply, message)
        loop = asyncio.get_running_loop()

        def tell_there(part: Message) -> None:
            if tell is not None:
                loop.call_soon_threadsafe(tell, part)

        return await loop.run_in_executor(self._thread, self._host.apply, message, tell_there)

    async def start(self) -> None:
        """It has been there from the beginning."""

    async def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
