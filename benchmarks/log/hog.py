"""A tenant that offers more than the service can do, and asks for the result of all that it took.

    python hog.py --urls URL,URL --tenant NAME --model NAME --rate 600 --runs 4

Open loop: it sends at its rate whatever is answered, a refused seq again in its turn. Prints `full`
at the first refusal; at the end of its standard input it stops sending, waits for every accepted
op, and prints a JSON line. For bench_log.py.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import deque
from dataclasses import dataclass, field

from log.rig import allow_many_files
from log.traffic import Client, Run, open_gateways

MAX_IN_FLIGHT = 2000
"""Posts without an answer; beyond it the gateway's backlog would be measured."""


@dataclass(slots=True)
class Hog:
    client: Client
    runs: list[Run]
    refused: dict[str, deque[int]] = field(default_factory=dict)
    """Run -> seqs to send again."""
    results: list[asyncio.Task[None]] = field(default_factory=list)
    in_flight: set[asyncio.Task[None]] = field(default_factory=set)
    num_offered: int = 0
    num_not_sent: int = 0

    async def offer(self, rate: float, stop: asyncio.Event) -> None:
        """Posts at that rate, runs in turn, gateways in turn."""
        start = time.perf_counter()
        while not stop.is_set():
            due = int(rate * (time.perf_counter() - start))
            for index in range(self.num_offered + self.num_not_sent, due):
                if len(self.in_flight) >= MAX_IN_FLIGHT:
                    self.num_not_sent += 1
                    continue
                self.num_offered += 1
                task = asyncio.create_task(self._send(self.runs[index % len(self.runs)], index))
                self.in_flight.add(task)
                task.add_done_callback(self.in_flight.discard)
            await asyncio.sleep(0.005)
        await asyncio.gather(*self.in_flight)

    async def _send(self, run: Run, index: int) -> None:
        again = self.refused.setdefault(run.run_id, deque())
        seq = again.popleft() if again else run.take_seq()
        gateway = index // len(self.runs)
        if await run.send(seq, gateway) == 200:
            self.results.append(asyncio.create_task(run.result(seq, gateway + 1)))
            return
        if not any(self.refused.values()) and len(self.client.refusals) == 1:
            print("full", flush=True)
        again.append(seq)

    async def fill_gaps(self) -> None:
        """What was accepted above a refused seq waits for it: send those until they are in."""
        for run in self.runs:
            for seq in sorted(self.refused.get(run.run_id, ())):
                while await run.send(seq) != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
                self.results.append(asyncio.create_task(run.result(seq)))


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--urls", required=True)
    parser.add_argument("--tenant", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rate", type=float, required=True, help="posts per second")
    parser.add_argument("--runs", type=int, required=True)
    arguments = parser.parse_args()
    allow_many_files()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stop.set)
    async with open_gateways(arguments.urls.split(","), arguments.tenant) as client:
        session = await client.session()
        runs = [await client.run(arguments.model, session, i) for i in range(arguments.runs)]
        hog = Hog(client, runs)
        start = time.perf_counter()
        await hog.offer(arguments.rate, stop)
        took = time.perf_counter() - start
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        refusals = dict(client.refusals)
        accepted = len(hog.results)
        await hog.fill_gaps()
        ended = await asyncio.gather(*hog.results, return_exceptions=True)
    errors = [str(error) for error in ended if error is not None]
    print(
        json.dumps(
            {
                "offered_per_s": hog.num_offered / took,
                "not_sent": hog.num_not_sent,
                "accepted_per_s": accepted / took,
                "accepted": len(hog.results),
                "ended": len(ended) - len(errors),
                "refusals": refusals,
                "errors": errors[:3],
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    asyncio.run(main())
