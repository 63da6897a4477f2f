"""An engine child whose engine is a toy that dies, hangs or runs out of memory when it is told to.

A forward_backward is JSON: `n` tells one from another, `do` is what happens at it.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.toy import ToyEngine

from luthier_core.errors import ConfigError
from luthier_core.ops import Kind, digest_of
from luthier_core.proto import wire_pb2
from luthier_trainer.engine_child import outlive_nobody, serve
from luthier_trainer.engine_host import EngineHost, PassOp, Tell
from luthier_trainer.frames import Message


def request(n: int, do: str = "", **fields: Any) -> bytes:
    """do: kill | hang | wait (for the file `go`) | memory (`fits` halvings) | replay (kills it)."""
    return json.dumps({"n": n, "do": do, **fields}).encode()


class MortalEngine(ToyEngine):
    """A gradient depends on how it was split, as it does with floats."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def forward_backward(
        self,
        run_id: str,
        request: bytes,
        *,
        backward: bool,
        clock_cycle: int,
        halvings: int = 0,
    ) -> bytes:
        order = json.loads(request)
        match order["do"]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)
            case "wait":
                self._wait()
            case "memory" if halvings < order["fits"]:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")
            case "replay" if (self.folder / "replay").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            case "replay":
                (self.folder / "replay").touch()
        kind = Kind.FORWARD_BACKWARD if backward else Kind.FORWARD
        op = request + b"/" * halvings
        state = self._apply(run_id, kind, op, self.states[run_id])
        output = wire_pb2.ForwardBackwardOutput(loss_fn_output_type=f"{digest_of(op)} {state}")
        encoded: bytes = output.SerializeToString()
        return encoded

    def forward_backward_many(
        self, ops: Sequence[PassOp]
    ) -> Iterator[tuple[int, bytes | Exception]]:
        with (self.folder / "shared").open("ab") as shared:
            shared.writelines(op.request for op in ops)
        yield from super().forward_backward_many(ops)

    def _wait(self) -> None:
        (self.folder / "waits").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.01)


class MortalHost(EngineHost):
    """The nth child dies at its nth call: by turns before it, and before it is answered."""

    def __init__(self, engine: MortalEngine, number: int) -> None:
        super().__init__(engine)
        self.number = number
        self.num_calls = 0

    def apply(self, call: Message, *tell: Tell) -> Message:
        self.num_calls += 1
        at_last = self.num_calls == self.number
        if at_last and self.number % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = super().apply(call, *tell)
        if at_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer


def load(hello: dict[str, Any]) -> tuple[EngineHost, dict[str, Any]]:
    folder = Path(hello["folder"])
    with (folder / "starts").open("a+") as starts:
        starts.write(f"{os.getpid()}\n")
        starts.seek(0)
        number = len(starts.readlines())
    match hello.get("do"):
        case "refuse":
            raise ConfigError("no such model")
        case "babble":
            os.write(int(sys.argv[1]), b"\xff" * 100)
            time.sleep(3600)
        case "die" if number <= hello["until"]:
            return MortalHost(MortalEngine(folder), number), {}
    return EngineHost(MortalEngine(folder)), {}


if __name__ == "__main__":
    outlive_nobody()
    serve(int(sys.argv[1]), load)
