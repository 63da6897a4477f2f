"""Virtual time: processes made of coroutines, servers that answer them, and what may go wrong.

A coroutine is a generator that yields Sleep, Call, Ask or Wait and is sent the answer. The next
event is the one with the smallest virtual time; equal times are ordered by the seed. Nothing else
decides: no wall clock, no threads, no other randomness.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

A = TypeVar("A")
Coroutine = Generator[Any, Any, A]


class Lost:
    """The answer to a request whose reply did not come in time: it may have been applied."""


LOST = Lost()


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The answer to a request on a connection that a restart of the server has ended."""

    generation: int


@dataclass(frozen=True, slots=True)
class Sleep:
    """-> None"""

    seconds: float


@dataclass(frozen=True, slots=True)
class Call:
    """Ask a server to do one atomic thing -> its answer, LOST or Reconnected."""

    server: "Server"
    do: Callable[[], Any]
    generation: int | None = None
    """That of the server when this connection was made; None: any."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask a process, which answers with what `handler()` returns -> that, or LOST."""

    process: "Process"
    handler: Callable[[], Coroutine[Any]]
    timeout_s: float


@dataclass(slots=True)
class Signal:
    """Wakes the tasks that wait for it."""

    waiting: "list[tuple[Task, int]]" = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Wait:
    """Until the signal or the timeout, whichever is first -> None"""

    signal: Signal
    timeout_s: float


@dataclass(slots=True)
class Server:
    """Something that answers at once and in one piece: Redis, the object store."""

    name: str
    latency_s: float
    timeout_s: float
    up: bool = True
    generation: int = 0


@dataclass(slots=True, eq=False)
class Process:
    """Coroutines that die and freeze together. `start` spawns them anew after a crash."""

    name: str
    start: Callable[[], None] = lambda: None
    life: int = 0
    alive: bool = True
    frozen_until: float = 0.0


@dataclass(slots=True, eq=False)
class Task:
    process: Process
    life: int
    steps: Coroutine[Any]
    at_end: Callable[[Any], None] | None
    token: int = 0
    """Counts requests: an answer to an earlier one is dropped."""
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Network:
    """Chances of what may happen to one request."""

    lose_request: float = 0.0
    lose_reply: float = 0.0
    late: float = 0.0
    """Applied only after the sender has given it up, perhaps after what it sent next."""
    slow: float = 0.0


class World:
    """The scheduler. `counts` says how often each fault happened, `seen` what the cluster did."""

    def __init__(self, seed: int, *, traced: bool = False) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.network = Network()
        self.counts: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.trace: list[str] | None = [] if traced else None
        self._events: list[tuple[float, float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:9.3f} {text}")

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.rng.random() < probability

    def after(self, delay_s: float, do: Callable[..., None], *args: Any) -> None:
        """Do something later."""
        event = (self.now + delay_s, self.rng.random(), next(self._order), do, args)
        heapq.heappush(self._events, event)

    def spawn(
        self,
        process: Process,
        steps: Coroutine[Any],
        at_end: Callable[[Any], None] | None = None,
    ) -> Task:
        """Run a coroutine in a process; `at_end` gets what it returns, unless the process dies."""
        task = Task(process, process.life, steps, at_end)
        self.after(0, self._step, task, 0, None)
        return task

    def cancel(self, task: Task) -> None:
        """What the task has sent already may still be applied."""
        task.ended = True

    def crash(self, process: Process, *, down_s: float) -> None:
        """kill -9: everything volatile is gone; the process starts anew after down_s."""
        if not process.alive:
            return
        self.note(f"{process.name} CRASHES")
        process.alive = False
        process.life += 1
        process.frozen_until = 0.0
        self.after(down_s, self._restart, process)

    def freeze(self, process: Process, *, for_s: float) -> None:
        self.note(f"{process.name} FREEZES for {for_s:.1f} s")
        process.frozen_until = max(process.frozen_until, self.now + for_s)

    def notify(self, signal: Signal) -> None:
        waiting, signal.waiting = signal.waiting, []
        for task, token in waiting:
            self.after(0, self._step, task, token, None)

    def run(self, until: float, finished: Callable[[], bool]) -> None:
        """Process events up to that time, or until `finished()`, asked once a second."""
        next_look = self.now
        while self._events and self._events[0][0] <= until:
            self.now, _, _, do, args = heapq.heappop(self._events)
            if self.now >= next_look:
                if finished():
                    return
                next_look = self.now + 1
            do(*args)

    def _restart(self, process: Process) -> None:
        self.note(f"{process.name} starts")
        process.alive = True
        process.start()

    def _step(self, task: Task, token: int, answer: Any) -> None:
        process = task.process
        if task.ended or task.life != process.life or token != task.token:
            return
        if process.frozen_until > self.now:
            delay = process.frozen_until - self.now
            self.after(delay + 0.001 * self.rng.random(), self._step, task, token, answer)
            return
        task.token += 1
        try:
            request = task.steps.send(answer)
        except StopIteration as end:
            task.ended = True
            if task.at_end is not None:
                task.at_end(end.value)
            return
        self._send(task, task.token, request)

    def _send(self, task: Task, token: int, request: Any) -> None:
        match request:
            case Sleep(seconds):
                self.after(seconds, self._step, task, token, None)
            case Wait(signal, timeout_s):
                signal.waiting.append((task, token))
                self.after(timeout_s, self._step, task, token, None)
            case Call(server, _, _):
                self._call(task, token, server, request)
            case Ask(process, handler, timeout_s):
                self.after(timeout_s, self._step, task, token, LOST)
                self.after(self._delay(0.01), self._ask, task, token, process, handler)

    def _delay(self, latency_s: float) -> float:
        delay = latency_s * (0.5 + self.rng.random())
        return delay * 20 if self.chance(self.network.slow) else delay

    def _call(self, task: Task, token: int, server: Server, call: Call) -> None:
        delay = self._delay(server.latency_s)
        if self.chance(self.network.lose_request):
            self.counts["request lost"] += 1
        elif self.chance(self.network.late):
            self.counts["request late"] += 1
            delay = server.timeout_s * (1 + 2 * self.rng.random())
            self.after(delay, self._arrive, task, -1, call)
        elif self.chance(self.network.lose_reply):
            self.counts["reply lost"] += 1
            self.after(delay, self._arrive, task, -1, call)
        else:
            self.after(delay, self._arrive, task, token, call)
            return
        self.after(server.timeout_s, self._step, task, token, LOST)

    def _arrive(self, task: Task, token: int, call: Call) -> None:
        server = call.server
        delay = self._delay(server.latency_s)
        if not server.up:
            self.after(delay, self._step, task, token, LOST)
        elif call.generation is not None and call.generation != server.generation:
            self.after(delay, self._step, task, token, Reconnected(server.generation))
        else:
            answer = call.do()
            if self.trace is not None:
                lost = " (reply lost)" if token < 0 else ""
                self.note(f"{task.process.name} {getattr(call.do, 'label', '?')} -> {answer}{lost}")
            self.after(delay, self._step, task, token, answer)

    def _ask(
        self, task: Task, token: int, process: Process, handler: Callable[[], Coroutine[Any]]
    ) -> None:
        if not process.alive:
            self.after(self._delay(0.01), self._step, task, token, LOST)
            return

        def answer(value: Any) -> None:
            if self.chance(self.network.lose_reply):
                self.counts["response lost"] += 1
            else:
                self.after(self._delay(0.01), self._step, task, token, value)

        self.spawn(process, handler(), answer)
