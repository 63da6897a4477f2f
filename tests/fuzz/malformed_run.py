"""Sends malformed requests to a whole stack, with a good client beside them, and counts.

    python -m tests.fuzz.malformed_run --cases 6000 --seed 1

Exits with 0 only if every malformed request was refused with a 4xx or failed its future, if no
request of the good client failed, and if the gateway's memory did not grow by more than 100 MB.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from tests.contract.gateway_client import Answer, Api, Run, Sampler
from tests.contract.gateway_stack import KEYS, GatewayStack, running_gateway_stack
from tests.fuzz.malformed import Case, Target, cases

MAX_GROWTH_BYTES = 100 * 1024 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
NUM_SENDERS = 6
ANSWER_S = 45
"""A request that takes longer hangs: the SDK gives up then."""
WARM_UP = 0.1
"""Share of the cases after which the memory is measured for the first time."""
PROGRESS = 1000
"""Cases after which a line says how many there were, and the gateway's memory."""


class NotRefused(AssertionError):
    """A malformed request had another outcome than it may have."""


@dataclass(slots=True)
class Sender:
    """Sends cases one after the other, each under the next seq of a run of its own."""

    api: Api
    max_body_bytes: int
    outcomes: Counter[str] = field(default_factory=Counter)
    _run: Run | None = None
    _sampler: Sampler | None = None

    async def prepare(self) -> Target:
        """A run and a sampling session that can take the next case."""
        if self._run is None:
            self._run = await self.api.run()
            session_id = self._run.run_id.partition(":")[0]
            self._sampler = await self.api.sampler(session_id)
        assert self._sampler is not None
        return Target(
            session_id=self._run.run_id.partition(":")[0],
            run_id=self._run.run_id,
            seq=self._run.next_seq,
            sampling_session_id=self._sampler.session_id,
            sample_seq=self._sampler.next_seq,
            max_body_bytes=self.max_body_bytes,
        )

    async def send(self, name: str, case: Case) -> None:
        """NotRefused, with the case, if it is neither refused nor fails, though it may not pass."""
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._send(name, case)
        except TimeoutError:
            raise NotRefused(f"{name}: no outcome in {ANSWER_S} s: {_shown(case)}") from None

    async def _send(self, name: str, case: Case) -> None:
        target = await self.prepare()
        answer = await self.api.call(
            case.method,
            case.path,
            case.pieces() if case.piece_bytes else case.body,
            content_type=case.content_type,
            headers=case.headers,
        )
        outcome = await self._outcome(answer)
        self.outcomes[f"{name}: {outcome}"] += 1
        if outcome == "passed" and not case.may_pass:
            raise NotRefused(f"{name} passed: {_shown(case)}")
        if answer.status >= 500 or outcome == "5xx":
            raise NotRefused(f"{name}: {answer} {_shown(case)}")
        await self._go_on(target, answer)

    async def _outcome(self, answer: Answer) -> str:
        if answer.status >= 400:
            return "5xx" if answer.status >= 500 else str(answer.status)
        request_id = json.loads(answer.body).get("request_id") if answer.body else None
        if request_id is None or not self._is_next(request_id):
            return "passed"
        result = await self.api.outcome(request_id)
        if result.status >= 400:
            return "5xx" if result.status >= 500 else str(result.status)
        kind = result.headers["Content-Type"]
        failed = kind.startswith("application/json") and "error" in result.json()
        return "future failed" if failed else "passed"

    def _is_next(self, request_id: str) -> bool:
        """Not so: its seq is beyond a gap that nobody fills."""
        assert self._run is not None
        assert self._sampler is not None
        following = f"{self._run.run_id}:{self._run.next_seq}"
        return request_id in (following, f"{self._sampler.session_id}:{self._sampler.next_seq}")

    async def _go_on(self, target: Target, answer: Answer) -> None:
        """Counts the seqs that the case used up. A run that it disturbed is left alone."""
        assert self._run is not None
        assert self._sampler is not None
        used = [
            (await self.api.get(f"futures/{owner}:{seq}")).status == 200
            for owner, seq in (
                (target.run_id, target.seq),
                (target.sampling_session_id, target.sample_seq),
            )
        ]
        self._run.next_seq += used[0]
        self._sampler.next_seq += used[1]
        if answer.status == 200 and not any(used):
            self._run = None  # it may have reached a seq that the next cases would wait for


def _shown(case: Case) -> str:
    return f"{case.method} {case.path} {case.headers} {len(case.body)} bytes {case.body[:300]!r}"


async def good_client(api: Api, latencies_s: list[float], stop: asyncio.Event) -> None:
    """Trains and samples until told to stop; an assertion fails if something does not work."""
    run = await api.run()
    sampler = await api.sampler()
    while not stop.is_set():
        begun = time.monotonic()
        gradient = await run.forward_backward()
        # So little that the loss of the one datum does not reach 0 after thousands of steps.
        update = await run.step(learning_rate=1e-6)
        sample = await sampler.send()
        assert (await api.training_output(gradient)).metrics["loss:sum"] > 0
        assert (await api.result(update))["metrics"]["grad_norm"] > 0
        assert len((await api.samples(sample)).sequences) == 1
        latencies_s.append(time.monotonic() - begun)


async def send_all(stack: GatewayStack, options: argparse.Namespace) -> Counter[str]:
    """How many of each sort had which outcome."""
    pid = gateway_pid()
    latencies_s: list[list[float]] = [[], []]
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        bad = [
            Sender(Api(http, stack.url, KEYS["ann"]), MAX_BODY_BYTES) for _ in range(NUM_SENDERS)
        ]
        for latencies, num_cases in ((latencies_s[0], 0), (latencies_s[1], options.cases)):
            stop = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(good_client(Api(http, stack.url, KEYS["bob"]), latencies, stop))
                if num_cases == 0:
                    await asyncio.sleep(options.quiet_s)
                else:
                    await _send_with(bad, options, pid)
                stop.set()
    for name, latencies in zip(("before", "beside them"), latencies_s, strict=True):
        latencies.sort()
        p50, p99 = (latencies[int(len(latencies) * part)] for part in (0.5, 0.99))
        print(f"good client {name}: {len(latencies)} steps, p50 {p50:.3f} s, p99 {p99:.3f} s")
    return sum((sender.outcomes for sender in bad), Counter())


async def _send_with(senders: list[Sender], options: argparse.Namespace, pid: int) -> None:
    """The cases, dealt to the senders; the gateway's memory after the first few and at the end."""
    todo: asyncio.Queue[int] = asyncio.Queue()
    for index in range(options.cases):
        todo.put_nowait(index)
    peak = 0
    first = 0

    async def work(sender: Sender, seed: int) -> None:
        nonlocal peak, first
        target = await sender.prepare()
        stream = cases(seed, lambda: target)
        while not todo.empty():
            index = todo.get_nowait()
            if index and index % PROGRESS == 0:
                rss = psutil.Process(pid).memory_info().rss
                print(f"{index} sent, the gateway has {rss // 2**20} MiB", flush=True)
            target = await sender.prepare()
            await sender.send(*next(stream))
            rss = psutil.Process(pid).memory_info().rss
            peak = max(peak, rss)
            if first == 0 and index >= options.cases * WARM_UP:
                first = rss

    async with asyncio.TaskGroup() as tasks:
        for index, sender in enumerate(senders):
            tasks.create_task(work(sender, options.seed * 1000 + index))
    last = psutil.Process(pid).memory_info().rss
    megabytes = [value // 2**20 for value in (first, last, peak)]
    print(
        "gateway's memory: {} MiB after a tenth, {} MiB at the end, {} MiB at most".format(
            *megabytes
        )
    )
    if last - first > MAX_GROWTH_BYTES:
        raise AssertionError(f"the gateway grew from {megabytes[0]} to {megabytes[1]} MiB")


def gateway_pid(config: str = "") -> int:
    """Of the gateway that this process has started, with this text in its command line."""
    (pid,) = [
        child.pid
        for child in psutil.Process().children()
        if "luthier_gateway" in " ".join(child.cmdline()) and config in " ".join(child.cmdline())
    ]
    return pid


@contextlib.contextmanager
def stack_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lu-mf-") as folder:
        yield Path(folder)


def check_objects(folder: Path) -> None:
    """AssertionError if a request has put a file where none belongs."""
    blobs = folder / "objects" / "blobs"
    tops = {path.name for path in blobs.iterdir()}
    tenants = {path.name for path in (blobs / "t").iterdir()}
    assert tops <= {"keys", "sys", "t", "usage"}, tops
    assert tenants <= set(KEYS), tenants


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quiet-s", type=float, default=10.0, help="the good client alone, first")
    options = parser.parse_args()
    with (
        stack_folder() as folder,
        running_gateway_stack(folder, max_body_bytes=MAX_BODY_BYTES) as stack,
    ):
        outcomes = asyncio.run(send_all(stack, options))
        for name, count in sorted(outcomes.items()):
            print(f"{count:7d}  {name}")
        print(f"{outcomes.total()} malformed requests, seed {options.seed}")
        check_objects(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
