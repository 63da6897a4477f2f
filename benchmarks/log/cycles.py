"""Full op cycles straight against the server, from processes that do nothing but send and read.

The commands are those of the library: they are taken down as it sends them, packed ahead of the
clock, and sent over several sockets at once, so that the server is what is measured.
"""

import contextlib
import multiprocessing
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import hiredis
import psutil
import redis

from luthier_core import keys
from luthier_core.config import LimitsConfig
from luthier_core.oplog import DELIVERED_TTL_MS, Oplog
from luthier_core.ops import Body, Kind, Op, Outcome, digest_of

Command = tuple[Any, ...]
TENANT = "bench"
OWNER = "bench/0"
LIMITS = LimitsConfig(max_pending_ops=2**30, max_pending_bytes=2**40)
HEADER = {"base_model": "toy", "facts": '{"session_id": "bench"}'}
START_TIMEOUT_S = 120.0


class Recorder:
    """Stands where the library has its client, and takes down what would be sent."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    async def fcall(self, name: str, num_keys: int, *arguments: Any) -> list[bytes]:
        self.commands.append(("FCALL", name, num_keys, *arguments))
        return [b"OK", b"0", b"0"]

    def take(self) -> list[Command]:
        taken, self.commands = self.commands, []
        return taken


def _at_once(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run what never waits: an event loop for each op would cost more than all the rest."""
    with contextlib.suppress(StopIteration):
        coroutine.send(None)


def run_ids(client: int, num_runs: int) -> list[str]:
    return [f"{client:016x}{index:016x}:train:0" for index in range(num_runs)]


def creations(runs: Iterable[str]) -> list[Command]:
    """Op 0 of every run, and its owner."""
    recorder = Recorder()
    log = Oplog(recorder)  # type: ignore[arg-type]

    async def send() -> None:
        for run_id in runs:
            op = _op(run_id, 0, b"{}")
            await log.admit(op, tenant=TENANT, limits=LIMITS, header=HEADER)
            await log.acquire(run_id, 1, OWNER)
            await log.commit(run_id, 1, 0, Outcome.completed(Body.of(b"{}")))

    _at_once(send())
    return recorder.take()


def cycles(run_id: str, seq: int, payload: bytes, result: bytes) -> list[Command]:
    """admit, commit, told of one op."""
    recorder = Recorder()
    log = Oplog(recorder)  # type: ignore[arg-type]

    async def send() -> None:
        await log.admit(_op(run_id, seq, payload), tenant=TENANT, limits=LIMITS)
        outcome = Outcome.completed(Body.of(result), "protobuf")
        await log.commit(run_id, 1, seq, outcome)
        await log.told(run_id, seq)

    _at_once(send())
    return recorder.take()


def cycles_with_reads(run_id: str, seq: int, payload: bytes, result: bytes) -> list[Command]:
    """What the service sends for one op: with the owner's read, the delivery and its record."""
    admit, commit, _ = cycles(run_id, seq, payload, result)
    outcome = keys.run_outcome(run_id, seq)
    session = ("HGET", keys.session_header("bench"), "status")
    read = ("XRANGE", keys.run_log(run_id), f"{seq}-0", "+", "COUNT", 64)
    deliver = ("PEXPIRE", outcome, DELIVERED_TTL_MS, "LT")
    return [session, admit, read, commit, ("HGETALL", outcome), deliver]


def plain_writes(run_id: str, seq: int, payload: bytes, result: bytes) -> list[Command]:
    """The same bytes in plain commands without any check: the ceiling."""
    op, outcome = _op(run_id, seq, payload), Outcome.completed(Body.of(result), "protobuf")
    key = keys.run_outcome(run_id, seq)
    return [
        ("XADD", keys.run_log(run_id), f"{seq}-0", *_flat(op.fields())),
        ("HSET", key, *_flat(outcome.fields())),
        ("HSET", keys.run_header(run_id), "admitted", seq, "committed", seq),
    ]


CYCLES: dict[str, Callable[[str, int, bytes, bytes], list[Command]]] = {
    "library": cycles,
    "service": cycles_with_reads,
    "plain": plain_writes,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one client process sends: a batch is one cycle of each run of a socket."""

    kind: str
    """A key of CYCLES."""
    num_sockets: int = 32
    runs_per_socket: int = 2
    num_rounds: int = 100
    payload_bytes: int = 400
    result_bytes: int = 200

    @property
    def num_ops(self) -> int:
        return self.num_sockets * self.runs_per_socket * self.num_rounds


def ops_per_second(url: str, load: Load, num_clients: int) -> tuple[float, float]:
    """(op cycles per second, cores that the server kept busy) with that many client processes."""
    with redis.Redis.from_url(url) as direct:
        server = psutil.Process(int(direct.info("server")["process_id"]))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(num_clients + 1)
    clients = [
        context.Process(target=_client, args=(url, index, load, barrier), daemon=True)
        for index in range(num_clients)
    ]
    for process in clients:
        process.start()
    barrier.wait(START_TIMEOUT_S)
    start, busy = time.perf_counter(), server.cpu_times()
    barrier.wait(START_TIMEOUT_S)
    took, ended = time.perf_counter() - start, server.cpu_times()
    for process in clients:
        process.join()
    cores = (ended.user + ended.system - busy.user - busy.system) / took
    return num_clients * load.num_ops / took, cores


def run_load(url: str, client: int, load: Load) -> None:
    """One client, without a clock."""
    sockets, batches = _prepare(url, client, load)
    _send_all(sockets, batches)


def _client(url: str, client: int, load: Load, barrier: Barrier) -> None:
    sockets, batches = _prepare(url, client, load)
    barrier.wait(START_TIMEOUT_S)
    _send_all(sockets, batches)
    barrier.wait(START_TIMEOUT_S)


@dataclass(slots=True)
class Batch:
    data: bytes
    num_replies: int


def _prepare(url: str, client: int, load: Load) -> tuple[list["Link"], list[list[Batch]]]:
    """Connected sockets with their runs created, and for each round a batch per socket."""
    links = [Link(url) for _ in range(load.num_sockets)]
    payload, result = b"x" * load.payload_bytes, b"y" * load.result_bytes
    runs = run_ids(client, load.num_sockets * load.runs_per_socket)
    if load.kind != "plain":
        links[0].send(_pack(creations(runs)))
        links[0].read()
    make = CYCLES[load.kind]
    rounds = []
    for seq in range(1, load.num_rounds + 1):
        of_run = [make(run_id, seq, payload, result) for run_id in runs]
        per_socket = [of_run[index :: load.num_sockets] for index in range(load.num_sockets)]
        rounds.append([_pack([one for run in own for one in run]) for own in per_socket])
    return links, rounds


def _send_all(links: list["Link"], rounds: list[list[Batch]]) -> None:
    for batches in rounds:
        for link, batch in zip(links, batches, strict=True):
            link.send(batch)
        for link in links:
            link.read()


class Link:
    """One connection that sends packed batches and checks their replies."""

    def __init__(self, url: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(url.removeprefix("unix://"))
        self._reader = hiredis.Reader()
        self._due = 0

    def send(self, batch: Batch) -> None:
        self._socket.sendall(batch.data)
        self._due = batch.num_replies

    def read(self) -> None:
        """Every reply that is due; RuntimeError for one that says that something went wrong."""
        while self._due:
            self._reader.feed(self._socket.recv(1 << 16))
            while (reply := self._reader.gets()) is not False:
                self._due -= 1
                status = reply[0] if isinstance(reply, list) and reply else reply
                if isinstance(reply, Exception) or status in (b"BUSY", b"FENCED", b"ORDER"):
                    raise RuntimeError(f"the server answered {reply!r}")


def _pack(commands: list[Command]) -> Batch:
    data = b"".join(hiredis.pack_command(command) for command in commands)
    return Batch(data, len(commands))


def _op(run_id: str, seq: int, payload: bytes) -> Op:
    kind = Kind.FORWARD_BACKWARD if seq else Kind.CREATE_MODEL
    digest = digest_of(f"{run_id} {seq}".encode())
    return Op(run_id=run_id, seq=seq, kind=kind, digest=digest, body=Body.of(payload))


def _flat(fields: Any) -> list[Any]:
    return [item for pair in fields.items() for item in pair]
