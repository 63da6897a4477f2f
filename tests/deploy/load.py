"""Steps and samples at a steady rate through the official SDK, until standard input closes.

Then waits for every answer and prints one JSON line: how many were sent and answered, how many a
second in the worst ten, what failed. A run that waits is waited for: up to MAX_AHEAD steps of it
are sent ahead.
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass, field

import tinker
from tinker import types

BASE_MODEL = "luthier/demo"
NUM_RUNS = 4
MAX_AHEAD = 100
"""Steps of one run, and ten times as many samples, that may wait for their result."""
WINDOW_S = 10.0


@dataclass
class Tally:
    """What became of one kind of request."""

    sent: list[float] = field(default_factory=list)
    """When, in seconds since the start."""
    answered: list[float] = field(default_factory=list)
    longest_s: float = 0.0
    failed: list[str] = field(default_factory=list)

    def note(self, began_s: float, now_s: float) -> None:
        self.answered.append(now_s)
        self.longest_s = max(self.longest_s, now_s - began_s)

    def summary(self, loaded_s: float) -> dict[str, object]:
        return {
            "sent": len(self.sent),
            "answered": len(self.answered),
            "sent_per_s": _slowest_window(self.sent, loaded_s),
            "answered_per_s": _slowest_window(self.answered, loaded_s),
            "longest_wait_s": round(self.longest_s, 1),
            "failed": self.failed[:5],
            "num_failed": len(self.failed),
        }


def _slowest_window(times: list[float], loaded_s: float) -> float:
    """How many a second there were in the worst WINDOW_S of the load."""
    num_windows = max(int(loaded_s / WINDOW_S), 1)
    counts = [0] * num_windows
    for at in times:
        if at < num_windows * WINDOW_S:
            counts[int(at / WINDOW_S)] += 1
    return round(min(counts) / WINDOW_S, 1)


class Load:
    """The load of one program."""

    def __init__(self, steps_per_s: float, samples_per_s: float) -> None:
        self.steps, self.samples = Tally(), Tally()
        self._steps_per_s, self._samples_per_s = steps_per_s, samples_per_s
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = 0.0

    async def run(self, service: tinker.ServiceClient) -> dict[str, object]:
        runs = [
            await service.create_lora_training_client(base_model=BASE_MODEL, rank=4)
            for _ in range(NUM_RUNS)
        ]
        sampler = await service.create_sampling_client(base_model=BASE_MODEL)
        print("loading", flush=True)
        self._began = time.monotonic()
        reading = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        reading.add_done_callback(lambda _: self._stop.set())
        await asyncio.gather(*(self._train(run) for run in runs), self._sample(sampler))
        loaded_s = self._now()
        await asyncio.gather(*self._tasks)
        return {
            "loaded_s": round(loaded_s, 1),
            "steps": self.steps.summary(loaded_s),
            "samples": self.samples.summary(loaded_s),
        }

    async def _train(self, run: tinker.TrainingClient) -> None:
        tokens = [5, 6, 7, 8]
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 3},
        )
        room = asyncio.Semaphore(MAX_AHEAD)

        async def wait(gradient: object, update: object, sent_s: float) -> None:
            try:
                await gradient  # type: ignore[misc]
                await update  # type: ignore[misc]
                self.steps.note(sent_s, self._now())
            except Exception as error:
                self.steps.failed.append(repr(error)[:300])
            finally:
                room.release()

        async for _ in self._ticks(self._steps_per_s / NUM_RUNS):
            await room.acquire()
            self.steps.sent.append(sent_s := self._now())
            gradient = run.forward_backward([datum], "cross_entropy")
            update = run.optim_step(types.AdamParams(learning_rate=1e-4))
            self._start(wait(gradient, update, sent_s))

    async def _sample(self, sampler: tinker.SamplingClient) -> None:
        room = asyncio.Semaphore(10 * MAX_AHEAD)
        prompt, params = types.ModelInput.from_ints([5, 6, 7]), types.SamplingParams(max_tokens=2)

        async def sample(sent_s: float) -> None:
            try:
                result = await sampler.sample(prompt, 1, params)
                assert len(result.sequences) == 1
                self.samples.note(sent_s, self._now())
            except Exception as error:
                self.samples.failed.append(repr(error)[:300])
            finally:
                room.release()

        async for _ in self._ticks(self._samples_per_s):
            await room.acquire()
            self.samples.sent.append(sent_s := self._now())
            self._start(sample(sent_s))

    async def _ticks(self, per_s: float):  # type: ignore[no-untyped-def]
        """At this rate; what was missed while there was no room is made up for."""
        number = 0
        while not self._stop.is_set():
            await asyncio.sleep(max(number / per_s - self._now(), 0))
            number += 1
            yield number

    def _start(self, coroutine) -> None:  # type: ignore[no-untyped-def]
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _now(self) -> float:
        return time.monotonic() - self._began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--steps-per-s", type=float, required=True)
    parser.add_argument("--samples-per-s", type=float, required=True)
    arguments = parser.parse_args()

    async def run() -> dict[str, object]:
        service = tinker.ServiceClient(base_url=arguments.url, api_key=arguments.key)
        return await Load(arguments.steps_per_s, arguments.samples_per_s).run(service)

    print(json.dumps(asyncio.run(run())), flush=True)


if __name__ == "__main__":
    main()
