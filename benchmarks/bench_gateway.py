"""Milliseconds per training step through the official SDK, beside what its parts cost alone.

One step is forward_backward of one datum of 16 tokens and optim_step, sent together, on the demo
model with a rank-16 adapter. Queue- and CPU-bound: a step is four HTTP requests, two ops through
the log and two commits that wait for the disk. The ceiling printed beside it is the sum of what
cannot be saved: the same training in process with transformers and PEFT, and the SDK against a
server that answers at once. The aim is that sum + 10 ms + 4 fsync, all measured in one run.

    python benchmarks/bench_gateway.py [--steps 200] [--data DIR]

Prints a table for people and one JSON line for machines.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from instant_stub import running_stub

NUM_TOKENS = 16
RANK = 16
LEARNING_RATE = 1e-4
ALLOWANCE_MS = 10.0
NUM_FSYNC = 4

Sample = list[float]
"""Milliseconds, one per repetition."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--data", type=Path, help="data folder of the stack (default: temporary)")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        data = arguments.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data.mkdir(parents=True, exist_ok=True)
        repeat = Repeat(arguments.steps, arguments.warmup)
        fsync = measure_fsync(data, repeat)
        with running_stub() as url:
            stub = measure_sdk(url, "tml-stub", repeat)
        model_folder = build_demo(data)
        in_process = measure_in_process(model_folder, repeat)
        engine = measure_engine(model_folder, repeat)
        log = asyncio.run(measure_log(data, repeat))
        with running_stack(data) as (url, key):
            luthier = measure_sdk(url, key, repeat)
            pipelined = measure_pipelined(url, key, arguments.steps)
    report(fsync, stub, in_process, engine, log, luthier, pipelined, arguments.steps)
    return 0


class Repeat:
    """Times a call some times, after a warm-up that is not counted."""

    def __init__(self, num_steps: int, num_warmup: int) -> None:
        self.num_steps, self.num_warmup = num_steps, num_warmup

    def __call__(self, call: Callable[[], object]) -> Sample:
        for _ in range(self.num_warmup):
            call()
        times = []
        for _ in range(self.num_steps):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times


# --- what a step is made of, each alone -----------------------------------------------------------


def measure_fsync(folder: Path, repeat: Repeat) -> Sample:
    """Append 200 bytes to a file and fsync it, as the operation log does."""
    with (folder / "fsync").open("wb", buffering=0) as file:

        def append() -> None:
            file.write(b"x" * 200)
            os.fsync(file.fileno())

        return repeat(append)


def token_ids() -> list[int]:
    return list(range(10, 11 + NUM_TOKENS))


def measure_in_process(model_folder: Path, repeat: Repeat) -> Sample:
    """The same step with transformers and PEFT in one process."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=32, target_modules=[*targets, "lm_head"])
    model = get_peft_model(base, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-12)
    tokens = torch.tensor([token_ids()])

    def step() -> None:
        logits = model(tokens[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum")
        losses.backward()
        optimizer.step()
        optimizer.zero_grad()

    return repeat(step)


def measure_engine(model_folder: Path, repeat: Repeat) -> Sample:
    """The same step on the trainer's engine, without the service around it."""
    from luthier_core.proto import wire_pb2 as wire
    from luthier_model.base import load_base_model
    from luthier_model.lora import LoraSpec
    from luthier_trainer.engine import Engine
    from luthier_trainer.optim import AdamParams

    model = load_base_model("demo", str(model_folder))
    engine = Engine(model, logprob_chunk_tokens=1024, num_threads=1)
    engine.create("run", LoraSpec(rank=RANK, seed=1))
    tokens = np.array(token_ids())
    datum = wire.Datum(
        model_input=[
            wire.Chunk(
                encoded_text=wire.EncodedTextChunk(tokens=tokens[:-1].astype("<i4").tobytes())
            )
        ],
        loss_fn_inputs={
            "target_tokens": wire.Tensor(
                dense=tokens[1:].astype("<i8").tobytes(), dtype=wire.DTYPE_INT64
            ),
            "weights": wire.Tensor(
                dense=np.ones(NUM_TOKENS, "<f4").tobytes(), dtype=wire.DTYPE_FLOAT32
            ),
        },
    )
    request = wire.ForwardBackwardRequest(
        model_id="run", seq_id=1, data=[datum], loss_fn="cross_entropy"
    ).SerializeToString()

    def step() -> None:
        engine.forward_backward("run", request, backward=True, clock_cycle=1)
        engine.optim_step("run", AdamParams(learning_rate=LEARNING_RATE))

    return repeat(step)


async def measure_log(folder: Path, repeat: Repeat) -> Sample:
    """Two ops through the log with a worker that does nothing: admit, hint, read, commit, hint."""
    from luthier_core import keys
    from luthier_core.config import LimitsConfig
    from luthier_core.futures import FutureId, Futures
    from luthier_core.hints import Hints
    from luthier_core.oplog import Oplog, connect
    from luthier_core.ops import Body, Kind, Op, Outcome
    from luthier_core.testing import running_valkey

    run_id = "bench:train:0"
    with running_valkey(fsync="always", disk=folder) as url:
        gateway, worker = connect(url), connect(url)
        log, worker_log = Oplog(gateway), Oplog(worker)
        await log.load_library()
        futures = Futures(gateway, recheck_s=2.0)
        news = asyncio.Event()
        hints = Hints(worker, lambda channel, text: news.set())

        async def work() -> None:
            cursor = 0
            await worker_log.acquire(run_id, 1, "w/a")
            while True:
                for op in (await worker_log.read_log({run_id: cursor})).get(run_id, []):
                    await worker_log.commit(run_id, 1, op.seq, Outcome.completed(Body.of(b"{}")))
                    cursor = op.seq + 1
                await news.wait()
                news.clear()

        async def send(seq: int) -> None:
            op = Op(run_id=run_id, seq=seq, kind=Kind.FORWARD, digest="d", body=Body.of(b"x" * 200))
            header = {"base_model": "m", "facts": "{}"}
            await log.admit(op, tenant="t", limits=LimitsConfig(), header=header)

        await send(0)
        tasks = [asyncio.create_task(task) for task in (futures.listen(), hints.listen(), work())]
        await hints.subscribe(keys.run_new(run_id))
        times = []
        for step in range(repeat.num_warmup + repeat.num_steps):
            start = time.perf_counter()
            for seq in (2 * step + 1, 2 * step + 2):
                await send(seq)
            for seq in (2 * step + 1, 2 * step + 2):
                future = FutureId.parse(f"{run_id}:{seq}")
                assert future is not None
                assert await futures.wait(future, timeout_s=30) is not None
            times.append(1e3 * (time.perf_counter() - start))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await gateway.aclose()
        await worker.aclose()
    return times[repeat.num_warmup :]


# --- through the SDK ------------------------------------------------------------------------------


def measure_sdk(url: str, key: str, repeat: Repeat) -> Sample:
    """Both requests sent together, both results awaited."""
    with training_client(url, key) as (client, datum, adam):

        def step() -> None:
            gradient = client.forward_backward([datum], "cross_entropy")
            update = client.optim_step(adam)
            gradient.result()
            update.result()

        return repeat(step)


def measure_pipelined(url: str, key: str, num_steps: int) -> float:
    """Steps per second when every request is sent before the first result is awaited."""
    with training_client(url, key) as (client, datum, adam):
        client.forward_backward([datum], "cross_entropy").result()
        start = time.perf_counter()
        futures = []
        for _ in range(num_steps):
            futures.append(client.forward_backward([datum], "cross_entropy"))
            futures.append(client.optim_step(adam))
        for future in futures:
            future.result()
        return num_steps / (time.perf_counter() - start)


@contextlib.contextmanager
def training_client(url: str, key: str) -> Iterator[tuple[Any, Any, Any]]:
    import tinker
    from tinker import types

    os.environ["TINKER_TELEMETRY"] = "0"
    service = tinker.ServiceClient(base_url=url, api_key=key)
    name = service.get_server_capabilities().supported_models[0].model_name
    client = service.create_lora_training_client(base_model=name, rank=RANK, seed=1).result()
    tokens = token_ids()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:], np.int64),
            "weights": np.ones(NUM_TOKENS, np.float32),
        },
    )
    yield client, datum, types.AdamParams(learning_rate=LEARNING_RATE)
    service.close("success")


@contextlib.contextmanager
def running_stack(data: Path) -> Iterator[tuple[str, str]]:
    """URL and key of a `luthier up` on a free port, ready."""
    command = [sys.executable, "-m", "luthier.cli", "up", "--port", "0", "--data", str(data)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL) as process:
        try:
            wait_for(data / "endpoint", process)
            key = (data / "api-key").read_text().strip()
            yield (data / "endpoint").read_text().strip(), key
        finally:
            process.terminate()


def wait_for(path: Path, process: subprocess.Popen[bytes], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the stack did not start; see the logs in the data folder")
        time.sleep(0.05)


def build_demo(data: Path) -> Path:
    from luthier_model.demo import ensure_demo_model

    return ensure_demo_model(data / "models")


# --- report ---------------------------------------------------------------------------------------


def report(
    fsync: Sample,
    stub: Sample,
    in_process: Sample,
    engine: Sample,
    log: Sample,
    luthier: Sample,
    pipelined: float,
    num_steps: int,
) -> None:
    aim = p50(in_process) + p50(stub) + ALLOWANCE_MS + NUM_FSYNC * p50(fsync)
    rows = [
        ("through the SDK, Luthier", luthier),
        ("in process, transformers + PEFT", in_process),
        ("SDK against an instant stub", stub),
        ("engine alone (forward_backward + optim_step)", engine),
        ("operation log alone (two ops, fsync always)", log),
        ("one fsync of this disk", fsync),
    ]
    print(f"{num_steps} steps of {NUM_TOKENS} tokens, {os.cpu_count()} cores, {platform.machine()}")
    print(f"{'':46}{'p50 ms':>9}{'p99 ms':>9}")
    for name, sample in rows:
        print(f"{name:46}{p50(sample):9.2f}{p99(sample):9.2f}")
    rest = p50(luthier) - p50(stub) - p50(engine) - p50(log)
    print(f"{'not in the parts (hand-overs between processes)':46}{rest:9.2f}")
    print(f"{'aim: in process + SDK + 10 ms + 4 fsync':46}{aim:9.2f}")
    print(f"{'steps per second, pipelined':46}{pipelined:9.1f}")
    figures = {
        "bench": "gateway",
        "steps": num_steps,
        "luthier_ms_p50": p50(luthier),
        "luthier_ms_p99": p99(luthier),
        "in_process_ms_p50": p50(in_process),
        "sdk_stub_ms_p50": p50(stub),
        "engine_ms_p50": p50(engine),
        "log_ms_p50": p50(log),
        "fsync_ms_p50": p50(fsync),
        "aim_ms": aim,
        "pipelined_steps_per_s": pipelined,
    }
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}))


def p50(sample: Sample) -> float:
    return float(np.percentile(sample, 50))


def p99(sample: Sample) -> float:
    return float(np.percentile(sample, 99))


if __name__ == "__main__":
    sys.exit(main())
