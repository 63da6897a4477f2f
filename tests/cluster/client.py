"""A client of one run that retries as the official SDK does, and worse: on two gateways at once.

It sends waves of ops in any order, some of them twice at the same time, and asks both gateways for
every result.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import aiohttp
from tests.cluster.processes import API_KEY, BASE_MODEL
from tests.cluster.toy import LARGE_DATUM_TOKENS
from tests.contract.gateway_client import PROTOBUF, datum

from luthier_core.ops import Kind
from luthier_core.proto import wire_pb2

JSON = "application/json"
OP_S = 45.0
"""An op that is not through by then is stuck. Nothing here keeps one waiting for ten seconds."""
REQUEST_S = 4.0
RETRY_S = 0.05
MAX_OPEN = 12
"""Ops of a run that may be on their way at once."""
LORA = {"rank": 4, "seed": 1}


class Refused(Exception):
    """A request of ours was answered with an error that no retry mends."""


@dataclass(frozen=True, slots=True)
class Request:
    """One op as it is sent."""

    seq: int
    kind: Kind
    path: str
    content_type: str
    body: Callable[[], bytes]
    """A retry may send another body for the same op (reliability F5)."""
    valid: bool = True
    adam: Any = None


@dataclass(frozen=True, slots=True)
class Answered:
    """What a poll was answered with."""

    body: bytes
    content_type: str

    @property
    def error(self) -> dict[str, str] | None:
        """{error, category} of an op that failed."""
        value = json.loads(self.body) if self.content_type == JSON else {}
        return value if "error" in value else None


@dataclass(slots=True)
class Sent:
    """What became of one request."""

    request: Request
    ids: set[str] = field(default_factory=set)
    answers: list[Answered] = field(default_factory=list)


class Client:
    """One run. `sent` is all that was accepted, by seq."""

    def __init__(self, http: aiohttp.ClientSession, urls: list[str], seed: int) -> None:
        self.run_id = ""
        self.sent: dict[int, Sent] = {}
        self.stuck: list[int] = []
        self.seen: Counter[str] = Counter()
        self._http = http
        self._urls = urls
        self._rng = random.Random(seed)
        self._open = asyncio.Semaphore(MAX_OPEN)
        self._ephemeral = 0

    async def play(self, enough: asyncio.Event) -> None:
        """Create the run and train it until it is `enough`; returns once every op has ended."""
        await self._create()
        if any(answer.error for answer in self.sent[0].answers):
            return  # the ordered exception has met the creation: there is nothing to train
        async with asyncio.TaskGroup() as ops:
            while not enough.is_set():
                first = len(self.sent)
                wave = [self._next(first + i) for i in range(self._rng.randint(1, 6))]
                self.sent |= {request.seq: Sent(request) for request in wave}
                self._rng.shuffle(wave)
                for request in wave:
                    await self._open.acquire()
                    task = ops.create_task(self._carry(request))
                    task.add_done_callback(lambda _: self._open.release())

    async def ask_again(self) -> None:
        """Poll every op once more, at each gateway in turn."""
        for seq, sent in self.sent.items():
            if seq in self.stuck:
                continue
            sent.answers.append(await self._poll(seq, seq % len(self._urls)))

    async def _create(self) -> None:
        key = {"X-Idempotency-Key": str(self._rng.random())}
        session = await self._ask(0, "create_session", lambda: b"{}", JSON, key)
        session_id = json.loads(session.body)["session_id"]
        wanted = {"session_id": session_id, "model_seq_id": 0, "base_model": BASE_MODEL}
        body = json.dumps(wanted | {"lora_config": LORA}).encode()
        self.run_id = f"{session_id}:train:0"
        create = Request(0, Kind.CREATE_MODEL, "create_model", JSON, lambda: body)
        self.sent[0] = Sent(create)
        await self._carry(create)

    # --- one op -----------------------------------------------------------------------------------

    async def _carry(self, request: Request) -> None:
        """Send, poll, now and then send again much too late."""
        sent, seq = self.sent[request.seq], request.seq
        try:
            async with asyncio.timeout(OP_S):
                gateways = [0, 1] if self._rng.random() < 0.5 else [self._rng.randrange(2)]
                posts = (self._post(request, gateway) for gateway in gateways)
                sent.ids |= set(await asyncio.gather(*posts))
                first = self._rng.randrange(2)
                sent.answers.append(await self._poll(seq, first))
                sent.answers.append(await self._poll(seq, 1 - first))
                if self._rng.random() < 0.1:
                    sent.ids.add(await self._post(request, first))
        except TimeoutError:
            self.stuck.append(seq)

    async def _post(self, request: Request, gateway: int) -> str:
        answer = await self._ask(gateway, request.path, request.body, request.content_type)
        return str(json.loads(answer.body)["request_id"])

    async def _poll(self, seq: int, gateway: int) -> Answered:
        body = json.dumps({"request_id": f"{self.run_id}:{seq}"}).encode()
        accept = {"Accept": PROTOBUF}
        return await self._ask(gateway, "retrieve_future", lambda: body, JSON, accept)

    async def _ask(
        self,
        gateway: int,
        path: str,
        body: Callable[[], bytes],
        content_type: str,
        headers: dict[str, str] | None = None,
    ) -> Answered:
        """The answer with status 200, from one gateway or the other, however long it takes."""
        sending = {"X-API-Key": API_KEY, "Content-Type": content_type, **(headers or {})}
        while True:
            status = await self._try(gateway, path, body(), sending)
            if isinstance(status, Answered):
                return status
            gateway = 1 - gateway if status != 408 else gateway
            if status != 408:
                await asyncio.sleep(RETRY_S)

    async def _try(
        self, gateway: int, path: str, body: bytes, headers: dict[str, str]
    ) -> Answered | int:
        url = f"{self._urls[gateway]}/api/v1/{path}"
        try:
            async with self._http.post(url, data=body, headers=headers) as response:
                status, answer = response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError):
            self.seen["no answer"] += 1
            return 0
        if status == 200:
            return Answered(answer, response.content_type)
        self.seen[f"status {status}"] += 1
        if status not in (408, 429) and status < 500:
            raise Refused(f"{path} was answered with {status}: {answer.decode()}")
        return status

    # --- what is sent -----------------------------------------------------------------------------

    def _next(self, seq: int) -> Request:
        make: Callable[[int], Request] = self._rng.choices(
            [self._gradient, self._step, self._save, self._ephemeral_save], [60, 25, 8, 7]
        )[0]
        return make(seq)

    def _gradient(self, seq: int) -> Request:
        dice = self._rng.random()
        num_tokens = LARGE_DATUM_TOKENS if dice < 0.15 else 4
        valid = dice < 0.95
        tokens = [seq % 100, 1, 2, 3] * (num_tokens // 4)
        forward_only = 0.15 <= dice < 0.25
        message = wire_pb2.ForwardBackwardRequest(
            data=[datum(tokens if valid else [1, 10_000])],
            loss_fn="cross_entropy",
            model_id=self.run_id,
            seq_id=seq,
            forward_only=forward_only,
        )
        encoded = message.SerializeToString()
        kind = Kind.FORWARD if forward_only else Kind.FORWARD_BACKWARD
        return Request(seq, kind, "forward_backward", PROTOBUF, lambda: encoded, valid=valid)

    def _step(self, seq: int) -> Request:
        rate = seq * 1e-5
        adam = {"adam_params": {"learning_rate": rate}}
        request = self._json(seq, Kind.OPTIM_STEP, "optim_step", adam)
        return replace(request, adam=SimpleNamespace(learning_rate=rate))

    def _save(self, seq: int) -> Request:
        return self._json(seq, Kind.SAVE_WEIGHTS, "save_weights", {"path": f"state-{seq}"})

    def _ephemeral_save(self, seq: int) -> Request:
        """Each try names another sampling session, as the SDK does; the first one counts."""

        def body() -> bytes:
            self._ephemeral += 1
            number = {"sampling_session_seq_id": self._ephemeral}
            return json.dumps({"model_id": self.run_id, "seq_id": seq, **number}).encode()

        path = "save_weights_for_sampler"
        return Request(seq, Kind.SAVE_WEIGHTS_FOR_SAMPLER, path, JSON, body)

    def _json(self, seq: int, kind: Kind, path: str, fields: dict[str, Any]) -> Request:
        encoded = json.dumps({"model_id": self.run_id, "seq_id": seq, **fields}).encode()
        return Request(seq, kind, path, JSON, lambda: encoded)
