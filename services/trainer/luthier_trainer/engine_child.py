"""The engine's process: python -m luthier_trainer.engine_child FD

It loads what the first message on that socket says, answers the calls that follow, one after the
other, and ends when the other end is closed.
"""

import contextlib
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from luthier_core.telemetry import setup_logging
from luthier_trainer.engine_host import EngineHost
from luthier_trainer.frames import Channel, Message, error_message

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1

Load = Callable[[dict[str, Any]], tuple[EngineHost, dict[str, Any]]]
"""From the first message's fields: the engine, and what the worker is to know of it."""
Calls = queue.SimpleQueue[tuple[int, Message]]


def outlive_nobody() -> None:
    """Leave it to the worker when to end: no signal of a terminal does, the worker's death does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        # The end of the socket is not noticed in the midst of a kernel that holds the interpreter.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(fd: int, load: Load) -> None:
    """Answer calls for ever; the process ends with the other end of the socket."""
    os.set_inheritable(fd, False)
    channel = Channel(socket.socket(fileno=fd))
    calls, copies = Calls(), Calls()
    threading.Thread(target=_receive, args=(channel, calls, copies), daemon=True).start()
    number, hello = calls.get()
    try:
        host, ready = load(hello.fields)
    except Exception as error:
        log.exception("cannot load")
        channel.send(number, error_message(error))
        return
    channel.send(number, Message(ready))
    threading.Thread(target=_work_off, args=(channel, host, copies), daemon=True).start()
    _work_off(channel, host, calls)


def _receive(channel: Channel, calls: Calls, copies: Calls) -> None:
    """Copies are fetched beside the calls, and need not wait for them."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            number, call = channel.receive()
            beside = call.fields.get("method") == "fetch"
            (copies if beside else calls).put((number, call))
    os._exit(0)  # nobody is left to compute for, whatever the other threads are in


def _work_off(channel: Channel, host: EngineHost, calls: Calls) -> None:
    while True:
        number, call = calls.get()
        try:
            answer = host.apply(call, partial(channel.send, number))
        except Exception as error:
            answer = error_message(error)
            if answer.fields["error"] == "EngineFailed":
                log.exception("%s of %s", call.fields["method"], call.fields.get("run_id"))
        channel.send(number, answer)


def load_engine(hello: dict[str, Any]) -> tuple[EngineHost, dict[str, Any]]:
    """The engine on a base model."""
    import platform

    import torch

    from luthier_model.base import load_base_model
    from luthier_model.lora import LoraSpec, shapes_by_switch
    from luthier_trainer.engine import Engine

    model = load_base_model(
        hello["name"], hello["path"], device=hello["device"], dtype=hello["dtype"]
    )
    engine = Engine(
        model,
        logprob_chunk_tokens=hello["logprob_chunk_tokens"],
        num_threads=hello["num_threads"],
        device_runs=hello["device_runs"],
        applies_nonfinite=hello["applies_nonfinite"],
    )
    ready = {
        "facts": {
            **model.facts.to_json(),
            "tokenizer_id": hello["tokenizer_id"],
            "lora_modules": shapes_by_switch(model.lora_shapes),
        },
        "fingerprint": {
            "torch": torch.__version__,
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "machine": platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "num_threads": str(hello["num_threads"]),
        },
    }
    return EngineHost(engine, make_spec=LoraSpec, free_memory=engine.free_memory), ready


def main() -> None:
    outlive_nobody()
    name, fd = sys.argv[1:]
    setup_logging(name)
    serve(int(fd), load_engine)


if __name__ == "__main__":
    main()
