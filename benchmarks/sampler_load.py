"""Thousands of short samples at once through the whole stack: exact, complete, in flat memory.

Rounds of 2,000 samples from one client and of 20 clients x 100, on the official SDK against a
`luthier up` of its own: base model and two adapters mixed, prompts that share prefixes, every
sample with its seed. Before them each distinct request runs once, alone; every answer must be
equal to that one, tokens and logprobs. Memory is resident size after each round. The first half of
the rounds fills what is bounded: connections of clients, the last 20,000 samples in the gateway,
products that oneDNN compiles for each size of a step, outcomes that Valkey keeps for a while. What
counts is the growth in the second half. Queue-bound: the rate is printed, and no aim.

    python benchmarks/sampler_load.py [--rounds 10] [--samples 2000] [--clients 20] [--each 100]

Prints a table for people and one JSON line for machines; exits with 1 if an answer differs, a
request fails, or sampler or gateway grow by more than 5 %.
"""

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tinker
from tinker import types

BASE_MODEL = "luthier/demo"
NUM_DISTINCT = 120
NUM_ADAPTERS = 2
PREFIX_TOKENS = 24
MAX_GROWTH = 0.05
ANSWER_S = 300.0

Answer = tuple[list[int], list[float]]
"""Tokens and logprobs of one sample."""

Samplers = dict[str, tinker.SamplingClient]
"""One client's, by weights: a tinker:// path, or empty for the base model."""


@dataclass(frozen=True, slots=True)
class Request:
    """One of the distinct requests; `weights` is a tinker:// path, or empty for the base model."""

    weights: str
    prompt: tuple[int, ...]
    params: types.SamplingParams


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="of each kind, from 2")
    parser.add_argument("--samples", type=int, default=2000, help="at once from one client")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--each", type=int, default=100, help="samples of each of the clients")
    parser.add_argument("--data", type=Path, help="data folder of the stack (default: temporary)")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: must be 2 or more, for the growth in the second half")
    with contextlib.ExitStack() as stack:
        data = options.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        report = measure(stack.enter_context(running_stack(data)), options)
    print(json.dumps({"bench": "sampler_load", "machine": platform.processor(), **report}))
    return 0 if report["ok"] else 1


@dataclass(frozen=True, slots=True)
class Stack:
    url: str
    api_key: str
    processes: dict[str, psutil.Process]
    """sampler, gateway and valkey"""

    def service(self) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.url, api_key=self.api_key)

    def watched(self) -> dict[str, psutil.Process]:
        return {**self.processes, "client": psutil.Process()}

    def memory_mib(self) -> dict[str, float]:
        return {name: p.memory_info().rss / 2**20 for name, p in self.watched().items()}

    def cpu_s(self) -> dict[str, float]:
        """Since each was started."""
        return {name: sum(p.cpu_times()[:2]) for name, p in self.watched().items()}


@contextlib.contextmanager
def running_stack(data: Path, *options: str) -> Iterator[Stack]:
    """A `luthier up` on a free port, ready."""
    command = [sys.executable, "-m", "luthier.cli", "up", "--port", "0", "--data", str(data)]
    command += options
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL) as up:
        try:
            while not (data / "endpoint").exists():
                if up.poll() is not None:
                    raise SystemExit("the stack did not start; see the logs in the data folder")
                time.sleep(0.05)
            parts = json.loads((data / "status.json").read_text())["parts"]
            pids = {part["name"].partition("-")[0]: part["pid"] for part in parts}
            yield Stack(
                url=(data / "endpoint").read_text().strip(),
                api_key=(data / "api-key").read_text().strip(),
                processes={n: psutil.Process(pids[n]) for n in ("sampler", "gateway", "valkey")},
            )
        finally:
            up.terminate()


def measure(stack: Stack, options: argparse.Namespace) -> dict[str, object]:
    with stack.service() as service:
        requests = make_requests(make_adapters(service))
        started = time.perf_counter()
        samplers = make_samplers(service, requests)
        alone = [sample_all(samplers, [request])[0] for request in requests]
        alone_s = (time.perf_counter() - started) / len(requests)
        print(f"{len(requests)} distinct requests alone: {1e3 * alone_s:.1f} ms each")
    # Not closed: closing one of SDK 0.38 can hang if it begins to poll at that moment.
    clients = [make_samplers(stack.service(), requests) for _ in range(max(1, options.clients))]
    memory, rates, num_wrong = [], [], 0
    for number in range(options.rounds):
        for chosen, each in ((clients[:1], options.samples), (clients, options.each)):
            order = np.random.default_rng(number).integers(0, len(requests), (len(chosen), each))
            started = time.perf_counter()
            answers = sample_from_clients(chosen, requests, order.tolist())
            rates.append(order.size / (time.perf_counter() - started))
            num_wrong += sum(
                answer != alone[index]
                for indices, found in zip(order.tolist(), answers, strict=True)
                for index, answer in zip(indices, found, strict=True)
            )
            memory.append(stack.memory_mib())
            told = ", ".join(f"{name} {mib:.1f}" for name, mib in memory[-1].items())
            rate = f"{len(chosen):3} x {each:5}: {rates[-1]:6.1f} samples/s"
            print(f"{rate}, {num_wrong} differ, MiB: {told}", flush=True)
    before, after = memory[options.rounds // 2 * 2 - 1], memory[-1]
    growth = {name: after[name] / before[name] - 1 for name in before}
    print("growth in the second half:", {n: f"{100 * g:.1f} %" for n, g in growth.items()})
    return {
        "ok": num_wrong == 0 and max(growth["sampler"], growth["gateway"]) <= MAX_GROWTH,
        "num_wrong": num_wrong,
        "samples_per_s": [round(rate, 1) for rate in rates],
        "growth": {name: round(part, 4) for name, part in growth.items()},
        "memory_mib": {name: round(mib, 1) for name, mib in after.items()},
    }


def make_adapters(service: tinker.ServiceClient) -> list[str]:
    """tinker:// paths of adapters that answer differently from the base model."""
    paths = []
    for seed in range(NUM_ADAPTERS):
        training = service.create_lora_training_client(BASE_MODEL, rank=8, seed=seed).result()
        targets = [17 + seed] * 32
        inputs = {"target_tokens": targets, "weights": [1.0] * len(targets)}
        datum = types.Datum(types.ModelInput.from_ints(list(range(len(targets)))), inputs)
        for _ in range(2):
            training.forward_backward([datum], "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=2e-3)).result()
        paths.append(training.save_weights_for_sampler(f"load-{seed}").result().path)
    return paths


def make_requests(paths: Sequence[str]) -> list[Request]:
    """Half of them begin alike, so that cached and computed prompts are in one step."""
    random = np.random.default_rng(7)
    prefix = random.integers(1, 200, PREFIX_TOKENS).tolist()
    requests = []
    for i in range(NUM_DISTINCT):
        own = random.integers(1, 200, random.integers(1, 24)).tolist()
        params = types.SamplingParams(
            max_tokens=int(random.integers(1, 17)),
            seed=i,
            temperature=(0.0, 1.0, 0.7)[i % 3],
            top_k=(-1, 20)[i % 2],
            stop=[],
        )
        prompt = tuple((prefix if i % 2 else []) + own)
        requests.append(Request(["", *paths][i % (len(paths) + 1)], prompt, params))
    return requests


def sample_from_clients(
    clients: Sequence[Samplers], requests: Sequence[Request], order: list[list[int]]
) -> list[list[Answer]]:
    """The answers that each client gets, all at work at once."""

    def one(client: Samplers, indices: list[int]) -> list[Answer]:
        return sample_all(client, [requests[index] for index in indices])

    with ThreadPoolExecutor(len(order)) as pool:
        return list(pool.map(one, clients, order))


def make_samplers(service: tinker.ServiceClient, requests: Sequence[Request]) -> Samplers:
    paths = {request.weights for request in requests} - {""}
    base = service.create_sampling_client(base_model=BASE_MODEL).result()
    return {"": base} | {
        path: service.create_sampling_client(model_path=path).result() for path in paths
    }


def sample_all(samplers: Samplers, requests: Sequence[Request]) -> list[Answer]:
    """All at once; an exception of any of them is raised."""
    futures = [
        samplers[request.weights].sample(
            prompt=types.ModelInput.from_ints(list(request.prompt)),
            num_samples=1,
            sampling_params=request.params,
        )
        for request in requests
    ]
    answers = []
    for future in futures:
        [sequence] = future.result(timeout=ANSWER_S).sequences
        answers.append((list(sequence.tokens), list(sequence.logprobs)))
    return answers


if __name__ == "__main__":
    sys.exit(main())
