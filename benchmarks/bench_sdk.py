"""Our client beside the official one, same program, same server, in turns: ratios in one run.

Submit rate and the CPU time per request are the client's own work, measured against a server that
answers at once (instant_stub.py): the rate at which the requests of one run arrive there. Samples
per second at `--samples` concurrent come from the real server, which bounds them, so the ratio's
ceiling is near 1 unless a client holds it up. Memory is the client's peak resident size. Import is
in a fresh process; beside it, `floor_ms` is what aiohttp and pydantic alone take. Each client runs
in a process of its own, and they take turns in going first. A ratio is the median over the repeats
of ours / official; a busy machine moves the two figures of a repeat together.

    luthier up --run 'python benchmarks/bench_sdk.py'
"""

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import urllib.request
from typing import Any

SDKS = ("luthier", "tinker")
AIMS = {
    "submits_per_s": ">= 1.2",
    "step_cpu_ms": "",
    "samples_per_s": ">= 1.0",
    "sample_cpu_ms": "",
    "peak_mib": "<= 1.0",
    "import_ms": "",
}
"""Figure -> the aim of its ratio."""


def measure(sdk: str, stub: str, num_steps: int, num_samples: int) -> dict[str, float]:
    """One client in this process."""
    started = time.perf_counter()
    client: Any = importlib.import_module(sdk)
    import_ms = 1e3 * (time.perf_counter() - started)
    return {
        "import_ms": import_ms,
        **measure_steps(client, stub, num_steps),
        **measure_samples(client, num_samples),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure_steps(client: Any, stub: str, num_steps: int) -> dict[str, float]:
    """forward_backward of 32 tokens, all called before the first result is waited for."""
    types = client.types
    with client.ServiceClient(base_url=stub, api_key="tml-stub") as service:
        training = service.create_lora_training_client("stub", rank=4).result()
        inputs = {"target_tokens": list(range(1, 33)), "weights": [1.0] * 32}
        data = [types.Datum(types.ModelInput.from_ints(list(range(32))), inputs)]
        training.forward(data, "cross_entropy").result()  # connections are open from here
        _arrivals(stub)
        cpu_s = time.process_time()
        futures = [training.forward_backward(data, "cross_entropy") for _ in range(num_steps)]
        for future in futures:
            future.result()
        cpu_s = time.process_time() - cpu_s
        times = _arrivals(stub)
    return {
        "submits_per_s": (num_steps - 1) / (times[-1] - times[0]),
        "step_cpu_ms": 1e3 * cpu_s / num_steps,
    }


def _arrivals(stub: str) -> list[float]:
    with urllib.request.urlopen(f"{stub}/arrivals") as answer:
        times: list[float] = json.load(answer)
    return times


def measure_samples(client: Any, num_samples: int) -> dict[str, float]:
    """Four tokens each, all called at once, from the server of TINKER_BASE_URL."""
    types = client.types
    with client.ServiceClient() as service:
        model = client.RestClient().get_server_capabilities().result().supported_models[0]
        sampling = service.create_sampling_client(base_model=model.model_name)
        prompt = types.ModelInput.from_ints(list(range(8)))
        params = types.SamplingParams(max_tokens=4, stop=[])
        sampling.sample(prompt, 1, params).result()
        started, cpu_s = time.perf_counter(), time.process_time()
        samples = [sampling.sample(prompt, 1, params) for _ in range(num_samples)]
        for sample in samples:
            sample.result()
        return {
            "samples_per_s": num_samples / (time.perf_counter() - started),
            "sample_cpu_ms": 1e3 * (time.process_time() - cpu_s) / num_samples,
        }


def measure_floor() -> float:
    """Milliseconds that a fresh process takes to import aiohttp and pydantic."""
    program = (
        "import time; t = time.perf_counter(); import aiohttp, pydantic; "
        "print(1e3 * (time.perf_counter() - t))"
    )
    told = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)
    return float(told.stdout)


def main() -> None:
    args = parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.stub, args.steps, args.samples)))
        return
    from instant_stub import running_stub  # here: a measured process must not import aiohttp

    runs: list[dict[str, dict[str, float]]] = []
    floors = []
    with running_stub() as stub:
        for repeat in range(args.repeats):
            order = SDKS if repeat % 2 == 0 else SDKS[::-1]
            runs.append({sdk: measure_apart(sdk, stub, args) for sdk in order})
            floors.append(measure_floor())
    print(f"{'':16}{'luthier':>12}{'tinker':>12}{'ratio':>8}  aim")
    report: dict[str, Any] = {
        "bench": "sdk",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "steps": args.steps,
        "samples": args.samples,
        "floor_ms": statistics.median(floors),
    }
    for figure, aim in AIMS.items():
        ours, official = (statistics.median(run[sdk][figure] for run in runs) for sdk in SDKS)
        ratio = statistics.median(run["luthier"][figure] / run["tinker"][figure] for run in runs)
        report[figure] = {"luthier": ours, "tinker": official, "ratio": ratio}
        print(f"{figure:16}{ours:12.2f}{official:12.2f}{ratio:8.2f}  {aim}")
    print(f"{'floor_ms':16}{report['floor_ms']:12.2f}")
    print(json.dumps(report))


def measure_apart(sdk: str, stub: str, args: argparse.Namespace) -> dict[str, float]:
    """One client in a process of its own."""
    argv = [sys.executable, "-W", "ignore", __file__, "--only", sdk, "--stub", stub]
    argv += ["--steps", str(args.steps), "--samples", str(args.samples)]
    told = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    return figures


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=SDKS, help="Measure one client here; for the benchmark.")
    parser.add_argument("--stub", default="", help="URL of the stub, with --only.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
