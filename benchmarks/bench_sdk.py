"""Our client beside the official one, same program, same server, in turns: ratios in one run.

Submit rate is the client's own work (CPU-bound: the ceiling is a request per encode and POST);
samples per second at `--samples` concurrent is bound by the server, so the ratio's ceiling is
near 1 unless a client holds it up. Memory is the client's peak resident size. Each client runs in
a process of its own, so that neither sees the other's imports.

    luthier up --run 'python benchmarks/bench_sdk.py'
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

SDKS = ("luthier", "tinker")
FIGURES = ("submits_per_s", "samples_per_s", "peak_mib")


def measure(sdk: str, num_steps: int, num_samples: int) -> dict[str, float]:
    """One client in this process: submit rate of training steps, samples per second, memory."""
    client: Any = importlib.import_module(sdk)
    types = client.types
    with client.ServiceClient() as service:
        model = service.get_server_capabilities().supported_models[0].model_name
        training = service.create_lora_training_client(model, rank=4, seed=1).result()
        inputs = {"target_tokens": list(range(1, 33)), "weights": [1.0] * 32}
        data = [types.Datum(types.ModelInput.from_ints(list(range(32))), inputs)]
        training.forward([data[0]], "cross_entropy").result()  # connections are open from here
        started = time.perf_counter()
        futures = [training.forward_backward(data, "cross_entropy") for _ in range(num_steps)]
        for future in futures:
            future.result()
        submits_per_s = num_steps / (time.perf_counter() - started)
        sampling = training.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints(list(range(8)))
        params = types.SamplingParams(max_tokens=4, stop=[])
        sampling.sample(prompt, 1, params).result()
        started = time.perf_counter()
        samples = [sampling.sample(prompt, 1, params) for _ in range(num_samples)]
        for sample in samples:
            sample.result()
        samples_per_s = num_samples / (time.perf_counter() - started)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return dict(zip(FIGURES, (submits_per_s, samples_per_s, peak_mib), strict=True))


def main() -> None:
    args = parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.steps, args.samples)))
        return
    runs: dict[str, list[dict[str, float]]] = {sdk: [] for sdk in SDKS}
    for _ in range(args.repeats):
        for sdk in SDKS:
            argv = [sys.executable, __file__, "--only", sdk]
            argv += ["--steps", str(args.steps), "--samples", str(args.samples)]
            told = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
            runs[sdk].append(json.loads(told.stdout.splitlines()[-1]))
    print(f"{'':16}{'luthier':>12}{'tinker':>12}{'ratio':>8}")
    report: dict[str, Any] = {"bench": "sdk", "steps": args.steps, "samples": args.samples}
    for figure in FIGURES:
        ours, official = (statistics.median(run[figure] for run in runs[sdk]) for sdk in SDKS)
        report[figure] = {"luthier": ours, "tinker": official, "ratio": ours / official}
        print(f"{figure:16}{ours:12.1f}{official:12.1f}{ours / official:8.2f}")
    print(json.dumps(report))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=SDKS, help="Measure one client here; for the benchmark.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
