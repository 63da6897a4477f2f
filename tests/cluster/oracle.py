"""The judge: folds what each client sent, one op after the other, and compares all that was seen.

`Counters` are those of reliability 5.2; a sentence in `violations` is a broken promise.
"""

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tests.cluster.client import LORA, Answered, Client, Sent
from tests.cluster.history import RunHistory
from tests.cluster.processes import TENANT
from tests.cluster.toy import ToyEngine

from luthier_core import keys
from luthier_core.blobs import Blobs
from luthier_core.checkpoints import read_files
from luthier_core.ops import Kind
from luthier_core.proto import wire_pb2


@dataclass(slots=True)
class Counters:
    """Of one trial, or of many added up."""

    accepted: int = 0
    committed: int = 0
    executed: int = 0
    """Every execution, replays among them."""
    committed_twice: int = 0
    committed_without_admission: int = 0
    delivered_then_changed: int = 0
    stuck: int = 0
    refused_commits: int = 0
    """Of fenced zombies, and repeats."""
    take_overs: int = 0
    trims: int = 0
    failed_by_us: int = 0
    """Ops that ended with an error of the server: one for each exception that was ordered."""

    def add(self, other: "Counters") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Verdict:
    counters: Counters = field(default_factory=Counters)
    violations: list[str] = field(default_factory=list)

    def expect(self, holds: bool, violation: str) -> None:
        if not holds:
            self.violations.append(violation)


async def judge(client: Client, history: RunHistory, blobs: Blobs) -> Verdict:
    """Everything about one run, once it has ended. What was cut short is not folded."""
    verdict = Verdict()
    accepted = {seq for seq, sent in client.sent.items() if sent.ids}
    check_history(verdict, client.run_id, client.sent.keys(), history)
    verdict.counters.accepted = len(accepted)
    _check_answers(verdict, client)
    if all(sent.answers for sent in client.sent.values()):
        await _Fold(verdict, client, history, blobs).check()
    return verdict


def check_history(
    verdict: Verdict, run_id: str, sent: Collection[int], history: RunHistory
) -> None:
    """What Redis did to one run, whose ops `sent` have all ended."""
    counters = verdict.counters
    counters.committed = len(history.outcomes)
    counters.take_overs = len(history.owners)
    counters.trims = history.num_trims
    counters.refused_commits = history.num_refused
    times = Counter(seq for _, seq in history.commits)
    twice = {seq for seq in history.outcomes if max(times[seq], history.outcomes[seq]) > 1}
    counters.committed_twice = len(twice)
    verdict.expect(not twice, f"{run_id}: committed twice: {sorted(twice)}")
    never = history.outcomes.keys() - history.told.keys()
    counters.committed_without_admission = len(never)
    verdict.expect(not never, f"{run_id}: committed without admission: {sorted(never)}")
    seqs = [seq for _, seq in history.commits]
    verdict.expect(seqs == sorted(seqs), f"{run_id}: committed out of order")
    epochs = [epoch for epoch, _ in history.commits]
    verdict.expect(epochs == sorted(epochs), f"{run_id}: an older epoch committed")
    stale = history.stale_writes
    verdict.expect(not stale, f"{run_id}: written under an epoch that was taken over: {stale}")
    lost = set(sent) - history.outcomes.keys()
    verdict.expect(not lost, f"{run_id}: accepted and never committed: {sorted(lost)}")


def _check_answers(verdict: Verdict, client: Client) -> None:
    counters = verdict.counters
    counters.stuck = len(client.stuck)
    verdict.expect(not client.stuck, f"{client.run_id}: stuck: {client.stuck}")
    for seq, sent in client.sent.items():
        right = sent.ids <= {f"{client.run_id}:{seq}"}
        verdict.expect(right, f"{client.run_id}:{seq} was given the ids {sorted(sent.ids)}")
        if len(set(sent.answers)) > 1:
            counters.delivered_then_changed += 1
            verdict.expect(False, f"{client.run_id}:{seq}: the delivered answer changed")


class _Fold:
    """The sequential fold of one run."""

    def __init__(self, verdict: Verdict, client: Client, history: RunHistory, blobs: Blobs) -> None:
        self._verdict = verdict
        self._client = client
        self._told = history.told
        self._blobs = blobs
        self._engine = ToyEngine()
        self._missing: list[int] = []
        """forward_backwards that failed since the last optimizer step"""

    async def check(self) -> None:
        for seq in sorted(self._client.sent):
            sent = self._client.sent[seq]
            error = sent.answers[0].error
            if error is not None:
                self._fail(sent, error)
            else:
                await self._apply(sent)

    def _fail(self, sent: Sent, error: dict[str, str]) -> None:
        request, name = sent.request, f"{self._client.run_id}:{sent.request.seq}"
        if error["category"] == "server":
            self._verdict.counters.failed_by_us += 1
        elif request.valid:
            expected = request.kind is Kind.OPTIM_STEP and self._lacks_gradient(request.seq)
            self._verdict.expect(expected, f"{name} failed: {error['error']}")
        if request.kind is Kind.FORWARD_BACKWARD:
            self._missing.append(request.seq)
        elif request.kind is Kind.OPTIM_STEP:
            self._missing.clear()
            self._engine.clear_gradient(self._client.run_id)

    def _lacks_gradient(self, seq: int) -> bool:
        """Whether a gradient is missing that the client had not been told of."""
        return any(missing > self._told[seq] for missing in self._missing)

    async def _apply(self, sent: Sent) -> None:
        request, run_id = sent.request, self._client.run_id
        name = f"{run_id}:{request.seq} ({request.kind})"
        self._verdict.expect(request.valid, f"{name} completed, and is not valid")
        answer = sent.answers[0]
        match request.kind:
            case Kind.CREATE_MODEL:
                self._engine.create(run_id, SimpleNamespace(**LORA))
                right = json.loads(answer.body)["model_id"] == run_id
            case Kind.FORWARD | Kind.FORWARD_BACKWARD:
                right = self._gradient(request.kind, request.body(), answer)
            case Kind.OPTIM_STEP:
                lacks = self._lacks_gradient(request.seq)
                self._verdict.expect(not lacks, f"{name} applied an incomplete gradient")
                self._missing.clear()
                metrics: dict[str, Any] = json.loads(answer.body)["metrics"]
                folded = self._engine.optim_step(run_id, request.adam)
                right = metrics["state"] == folded["state"]
            case _:
                right = await self._saved(request.seq)
        self._verdict.expect(right, f"{name}: the result is not the fold's")

    def _gradient(self, kind: Kind, body: bytes, answer: Answered) -> bool:
        backward = kind is Kind.FORWARD_BACKWARD
        folded = self._engine.forward_backward(
            self._client.run_id, body, backward=backward, clock_cycle=0
        )
        read = wire_pb2.ForwardBackwardOutput.FromString
        return read(folded).loss_fn_output_type == read(answer.body).loss_fn_output_type

    async def _saved(self, seq: int) -> bool:
        run_id = self._client.run_id
        saved = await read_files(self._blobs, keys.checkpoint_manifest(TENANT, run_id, seq))
        return saved == self._engine.copy_files(run_id, optimizer=True)()
