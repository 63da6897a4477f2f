"""What a crash costs the user, and what it costs to be ready for one.

    python benchmarks/bench_recovery.py [--rounds 3] [--model FOLDER] [--seed 0]

recovery: the quickstart on `luthier up` with one trainer, which is killed with SIGKILL at five
random ones of the steps that it reports: in some rounds the whole trainer, in others its engine
alone. What it learns must equal the undisturbed quickstart. A wait is the longest silence between
two reported steps; most of it is the start of a process with torch and the model.

snapshots: how long an engine stands still for a copy of a run's state, how large the copy is, and
how much a training step adds to the operation log. The copy is bound by memory, the log by what
the client sends.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import redis
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.acceptance.quickstart import run_quickstart  # noqa: E402
from tests.acceptance.stack import BASE_MODEL, Stack, running_stack  # noqa: E402

from luthier_core import keys  # noqa: E402
from luthier_core.config import load_config  # noqa: E402
from luthier_core.proto import wire_pb2  # noqa: E402
from luthier_core.types import AdamParams  # noqa: E402
from luthier_model.base import load_base_model  # noqa: E402
from luthier_model.demo import ensure_demo_model  # noqa: E402
from luthier_model.lora import LoraSpec  # noqa: E402
from luthier_trainer.engine import Engine  # noqa: E402

NUM_KILLS = 5
AIMS_S = {"trainer": 25.0, "engine": 10.0}
RANK = 32
NUM_COPIES = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=ROOT / ".pytest_cache" / "d" / "demo-model")
    parser.add_argument("--parts", default="snapshots,recovery")
    arguments = parser.parse_args()
    model = ensure_demo_model(arguments.model)
    print(f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}\n")
    is_equal = True
    with tempfile.TemporaryDirectory(prefix="lu-bench-") as folder:
        if "snapshots" in arguments.parts:
            measure_snapshots(model)
        if "recovery" in arguments.parts:
            rng = random.Random(arguments.seed)
            is_equal = measure_recovery(Path(folder), model, arguments.rounds, rng)
    return int(not is_equal)


# --- recovery -------------------------------------------------------------------------------------


def measure_recovery(folder: Path, model: Path, rounds: int, rng: random.Random) -> bool:
    """Whether every quickstart learnt what the undisturbed one had learnt."""
    is_equal = True
    with running_stack(folder / "data", model) as stack:
        began = time.monotonic()
        expected = run_quickstart(stack, stack.api_key, folder)
        reported = sorted({line.step for line in expected.lines})[1:-1]
        log_bytes, num_steps = log_of(stack)
        print(f"quickstart undisturbed: {time.monotonic() - began:.1f} s")
        print(f"log: {log_bytes / num_steps:.0f} bytes per training step, payloads included")
        hurts: dict[str, Callable[[], None]] = {
            "trainer": lambda: stack.kill("trainer-0"),
            "engine": lambda: stack.kill_engine("trainer-0"),
        }
        for cause, hurt in hurts.items():
            waits, replayed = [], []
            for _ in range(rounds):
                steps = sorted(rng.sample(reported, NUM_KILLS))

                def on_step(step: int, steps: list[int] = steps, hurt: Any = hurt) -> None:
                    if step in steps:
                        hurt()

                ended = run_quickstart(stack, stack.api_key, folder, on_step=on_step)
                if ended.exit_code or ended.learnt != expected.learnt:
                    is_equal = False
                    print(f"DIFFERENT after kills at {steps}: {ended.output[-2000:]}")
                    continue
                waits += [ended.longest_wait_s(step) for step in steps]
                replayed += [event["to_seq"] - event["from_seq"] for event in recoveries(stack)]
                stack.wait_ready()
            report(cause, waits, replayed, is_equal)
    return is_equal


def report(cause: str, waits: list[float], replayed: list[int], is_equal: bool) -> None:
    figures = {
        "wait_s_p50": _percentile(waits, 50),
        "wait_s_p99": _percentile(waits, 99),
        "replayed_ops_p50": _percentile(replayed, 50),
        "replayed_ops_max": max(replayed, default=0),
        "recoveries": len(replayed),
    }
    print(
        f"{cause} killed {len(waits)} times: wait p50 {figures['wait_s_p50']:.1f} s, "
        f"p99 {figures['wait_s_p99']:.1f} s (aim {AIMS_S[cause]:g} s); "
        f"{figures['recoveries']} recoveries, each replayed {figures['replayed_ops_p50']:.0f} ops "
        f"(median), {figures['replayed_ops_max']} at most; output {'un' * is_equal}changed"
    )
    print(json.dumps({"bench": "recovery", "cause": cause, **figures, "equal": is_equal}))


def recoveries(stack: Stack) -> list[dict[str, Any]]:
    """Of the latest run."""
    listed = stack.request("GET", "training_runs?limit=1", api_key=stack.api_key)
    (run,) = json.loads(listed.body)["training_runs"]
    path = f"training_runs/{run['training_run_id']}"
    found: list[dict[str, Any]] = json.loads(
        stack.request("GET", path, api_key=stack.api_key).body
    )["recovered"]
    return found


def log_of(stack: Stack) -> tuple[int, int]:
    """(bytes of the log of the latest run with its payloads, optimizer steps in it)"""
    listed = stack.request("GET", "training_runs?limit=1", api_key=stack.api_key)
    (run,) = json.loads(listed.body)["training_runs"]
    client = redis.Redis.from_url(load_config(stack.data / "luthier.toml", {}).redis_url)
    entries: Any = client.xrange(keys.run_log(run["training_run_id"]))
    client.close()
    num_bytes = num_steps = 0
    for _, fields in entries:
        num_bytes += sum(len(name) + len(value) for name, value in fields.items())
        num_bytes += int(fields.get(b"size", 0)) if b"body" not in fields else 0
        num_steps += fields[b"kind"] == b"optim_step"
    return num_bytes, max(num_steps, 1)


# --- snapshots ------------------------------------------------------------------------------------


def measure_snapshots(model: Path) -> None:
    engine = Engine(
        load_base_model(BASE_MODEL, model, dtype="float32"),
        logprob_chunk_tokens=1024,
        num_threads=1,
    )
    engine.create("run", LoraSpec(rank=RANK, seed=0))
    request = _request()
    steps, copies, checksums, sizes = [], [], [], []
    for _ in range(NUM_COPIES):
        began = time.perf_counter()
        engine.forward_backward("run", request, backward=True, clock_cycle=0)
        engine.optim_step("run", AdamParams(learning_rate=1e-4))
        steps.append(time.perf_counter() - began)
        began = time.perf_counter()
        copy = engine.copy_state("run")
        copies.append(time.perf_counter() - began)
        began = time.perf_counter()
        engine.checksum("run")
        checksums.append(time.perf_counter() - began)
        sizes.append(len(copy.to_bytes()))
    stall_ms, step_ms = 1000 * _percentile(copies, 50), 1000 * _percentile(steps, 50)
    checksum_ms, num_bytes = 1000 * _percentile(checksums, 50), sizes[-1]
    print(
        f"rank {RANK} on {BASE_MODEL}: a copy of the state holds the engine up for "
        f"{stall_ms:.2f} ms (p50), a step of 8 x 64 tokens takes {step_ms:.0f} ms; "
        f"{num_bytes} bytes per snapshot; the checksum of every op {checksum_ms:.2f} ms"
    )
    figures = {"stall_ms_p50": stall_ms, "step_ms_p50": step_ms, "snapshot_bytes": num_bytes}
    figures["checksum_ms_p50"] = checksum_ms
    print(json.dumps({"bench": "snapshots", "rank": RANK, **figures}))


def _request() -> bytes:
    tokens = np.random.default_rng(0).integers(0, 200, 65)
    text = wire_pb2.EncodedTextChunk(tokens=tokens[:-1].astype("<i4").tobytes())
    inputs = {
        "target_tokens": wire_pb2.Tensor(
            dense=tokens[1:].astype("<i8").tobytes(), dtype=wire_pb2.DTYPE_INT64
        ),
        "weights": wire_pb2.Tensor(
            dense=np.ones(64, "<f4").tobytes(), dtype=wire_pb2.DTYPE_FLOAT32
        ),
    }
    datum = wire_pb2.Datum(model_input=[wire_pb2.Chunk(encoded_text=text)], loss_fn_inputs=inputs)
    message = wire_pb2.ForwardBackwardRequest(seq_id=1, loss_fn="cross_entropy", data=[datum] * 8)
    encoded: bytes = message.SerializeToString()
    return encoded


def _percentile(values: list[Any], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else 0.0


if __name__ == "__main__":
    sys.exit(main())
