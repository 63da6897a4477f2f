"""A client: the official SDK's behaviour (reliability 0.1, F1-F8) with a small random program.

It posts the chunks of a forward_backward from the second on and the first one last, repeats a post
without an answer on any gateway, polls each future until it ends, and goes on after a failed op.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from tests.simulation.gateway import Gateway, Polled
from tests.simulation.oracle import Oracle
from tests.simulation.toy import ToyOp
from tests.simulation.world import LOST, Ask, Coroutine, Process, Signal, Sleep, Wait, World

from luthier_core.ops import Kind

TIMEOUT_S = 15.0
Group = tuple[ToyOp, ...]


def program(rng: Random, run_id: str) -> list[Group]:
    """What a user's script does: groups of ops that are sent together, seqs from 0 on."""
    groups: list[Group] = []
    trouble = rng.choice((0.0, 1.0, 1.0, 3.0))
    seq = 0

    def add(*kinds: Kind) -> None:
        nonlocal seq
        groups.append(
            tuple(_op(rng, run_id, seq + i, kind, trouble) for i, kind in enumerate(kinds))
        )
        seq += len(kinds)

    add(Kind.CREATE_MODEL)
    for _ in range(rng.randint(2, rng.choice((4, 6, 12)))):
        for _ in range(rng.choice((1, 1, 1, 2))):
            add(*[Kind.FORWARD_BACKWARD] * rng.choice((1, 2, 3, 3, 5, 9)))
        add(Kind.OPTIM_STEP)
        if rng.random() < 0.3:
            add(rng.choice((Kind.SAVE_WEIGHTS, Kind.SAVE_WEIGHTS_FOR_SAMPLER, Kind.FORWARD)))
    return groups


def _op(rng: Random, run_id: str, seq: int, kind: Kind, trouble: float) -> ToyOp:
    ends, problem = "completes", None
    if kind is not Kind.CREATE_MODEL:
        draw = rng.random()
        if draw < 0.04 * trouble:
            problem = "the request is not what it should be"
        elif draw < 0.08 * trouble:
            ends = "fails"
        elif draw < 0.09 * trouble:
            ends = "kills"
    return ToyOp(
        run_id,
        seq,
        kind,
        ends,
        problem,
        large=rng.random() < 0.15,
        large_result=kind is Kind.FORWARD_BACKWARD and rng.random() < 0.1,
    )


@dataclass(slots=True, eq=False)
class Client:
    """One run. `ended` once every future has ended, or the script has got a definite error."""

    world: World
    process: Process
    gateways: Sequence[Gateway]
    oracle: Oracle
    run_id: str
    groups: list[Group]
    depth: int
    """Groups whose futures may be open at once."""
    in_turn: bool
    """Whether a group is posted only after the one before was accepted."""
    duplicates: float
    """Chance that the network delivers a post a second time, perhaps much later."""
    num_open: int = 0
    definite_error: str = ""
    ended: bool = False
    news: Signal = field(default_factory=Signal)
    _accepted: set[int] = field(default_factory=set)
    _refused: set[int] = field(default_factory=set)

    def start(self) -> None:
        self.world.spawn(self.process, self._script())

    def _script(self) -> Coroutine[None]:
        for group in self.groups:
            while self.num_open >= self.depth and not self.definite_error:
                yield Wait(self.news, 60.0)
            if self.definite_error:
                break
            self.num_open += 1
            self.world.spawn(self.process, self._group(group))
            if self.in_turn or group[0].seq == 0:
                yield from self._until_accepted(group)
            else:
                yield Sleep(0.2 * self.world.rng.random())
        while self.num_open and not self.definite_error:
            yield Wait(self.news, 60.0)
        self.ended = True

    def _group(self, group: Group) -> Coroutine[None]:
        """Chunks 2..n at once, chunk 1 when they are accepted, then their futures."""
        for op in group[1:]:
            self.world.spawn(self.process, self._post(op))
        yield from self._until_accepted(group[1:])
        yield from self._post(group[0])
        open_seqs = {op.seq for op in group}
        for op in group:
            self.world.spawn(
                self.process, self._result(op), partial(self._ended, open_seqs, op.seq)
            )
        while open_seqs and not self.definite_error:
            yield Wait(self.news, 60.0)
        self.num_open -= 1
        self.world.notify(self.news)

    def _ended(self, open_seqs: set[int], seq: int, _: None) -> None:
        open_seqs.discard(seq)
        self.world.notify(self.news)

    def _until_accepted(self, ops: Sequence[ToyOp]) -> Coroutine[None]:
        while not self.definite_error and not all(op.seq in self._accepted for op in ops):
            yield Wait(self.news, 60.0)

    def _post(self, op: ToyOp) -> Coroutine[None]:
        backoff_s = 0.5
        while not self.definite_error:
            gateway = self.world.rng.choice(self.gateways)
            if self.world.chance(self.duplicates):
                self._deliver_again(op)
            answer = yield Ask(gateway.process, partial(gateway.post, op), TIMEOUT_S)
            if answer == 200:
                self.oracle.accepted(op)
                self._accepted.add(op.seq)
                self.world.notify(self.news)
                return
            if answer == 422:
                # Only a broken gateway says so: the seq is used up and there is no future.
                self._accepted.add(op.seq)
                self._refused.add(op.seq)
                self.world.notify(self.news)
                return
            if answer is not LOST and answer not in (429, 503):
                self._stop(f"the post of seq {op.seq} was answered {answer}")
                return
            yield Sleep(backoff_s * (0.5 + self.world.rng.random()))
            backoff_s = min(2 * backoff_s, 8.0)

    def _deliver_again(self, op: ToyOp) -> None:
        self.world.counts["duplicate post"] += 1
        gateway = self.world.rng.choice(self.gateways)
        late_s = self.world.rng.choice((0.0, 0.05, 1.0, 30.0)) * self.world.rng.random()

        def arrive() -> None:
            if gateway.process.alive:
                self.world.spawn(gateway.process, gateway.post(op))

        self.world.after(late_s, arrive)

    def _result(self, op: ToyOp) -> Coroutine[None]:
        """Poll until the future ends; repeated now and then after it has, as results stay."""
        while not self.definite_error and op.seq not in self._refused:
            gateway = self.world.rng.choice(self.gateways)
            answer = yield Ask(
                gateway.process, partial(gateway.poll, self.run_id, op.seq), TIMEOUT_S
            )
            if answer is LOST or answer.status == 503:
                yield Sleep(0.5 + self.world.rng.random())
            elif answer.status == 200:
                self._delivered(op, gateway, answer)
                if not self.world.chance(0.1):
                    return
                yield Sleep(5 * self.world.rng.random())
            elif answer.status != 408:
                self._stop(f"the poll of seq {op.seq} was answered {answer.status}")

    def _delivered(self, op: ToyOp, gateway: Gateway, polled: Polled) -> None:
        assert polled.outcome is not None
        self.oracle.delivered(op, polled.outcome, polled.body)
        if polled.outcome.failed and gateway.process.alive:
            self.world.spawn(gateway.process, gateway.told(self.run_id, op.seq))

    def _stop(self, error: str) -> None:
        self.world.note(f"{self.process.name} STOPS: {error}")
        self.definite_error = error
        self.ended = True
        self.world.notify(self.news)
