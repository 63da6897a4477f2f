"""The operation log: calls the function library, reads logs, holds leases, moves sampling jobs.

Every call is idempotent, so it may be repeated after a lost reply; the client made by `connect`
does that by itself for some seconds, which hides a restart of Redis.
"""

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Self, cast

import redis.asyncio as redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from luthier_core import keys
from luthier_core.config import LimitsConfig
from luthier_core.ops import Gradient, Op, Outcome, SamplingJob, clone_of

OUTCOME_TTL_MS = 24 * 3600 * 1000
DELIVERED_TTL_MS = 3600 * 1000
JOIN_TTL_MS = 3_600_000
"""Far above what the SDK's retries under one idempotency key take."""
ACKNOWLEDGED_TTL_MS = 60 * 1000
MAX_CONNECTIONS = 32
READ_AHEAD = 64
"""Entries of one run that are read at once."""

ANY_SERVER = ""


class RedisRestarted(RedisConnectionError):
    """This is another server than the caller means: it may have gone back to an earlier state."""


REDIS_ERRORS = (RedisConnectionError, RedisTimeoutError, redis.ReadOnlyError, OSError)
"""Redis is not there just now. An error that it answers with is a bug of ours, and no such."""


IO_TIMEOUT_S = 10.0
"""How long a command may take to be sent, and again to be answered."""


class _TimedConnection(AbstractConnection):
    """Mixin: sends and replies that take IO_TIMEOUT_S fail; a cancellation always arrives.

    With redis-py's own socket_timeout a send runs under asyncio.wait_for, which on Python 3.11
    drops a cancellation that comes just as the send has ended: the task goes on, and whoever
    waits for its end at a stop waits for ever.
    """

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if not self.is_connected:
            # One try: who sends tries again anyhow, and retries of retries would take 24 times as
            # long as `connect` says. Not below: connecting has a limit of its own.
            await self.connect_check_health(check_health=False, retry_socket_connect=False)
        try:
            async with asyncio.timeout(IO_TIMEOUT_S):
                await super().send_packed_command(command, check_health)
        except TimeoutError:
            raise RedisTimeoutError(f"not sent within {IO_TIMEOUT_S:g} s") from None

    async def read_response(
        self, disable_decoding: bool = False, timeout: float | None = None, **options: Any
    ) -> Any:
        if timeout is not None:
            return await super().read_response(disable_decoding, timeout, **options)
        try:
            # A limit given to redis-py itself returns None, and keeps a connection on which the
            # reply is still to come: the next caller would take it for its own.
            async with asyncio.timeout(IO_TIMEOUT_S):
                return await super().read_response(disable_decoding, math.inf, **options)
        except TimeoutError:
            await self.disconnect(nowait=True)
            raise RedisTimeoutError(f"not answered within {IO_TIMEOUT_S:g} s") from None


def connect(url: str) -> redis.Redis:
    """A client that retries each call for about 10 s while Redis is away, then raises.

    Calls beyond MAX_CONNECTIONS at once wait for a connection; they are short, so it is soon free.
    """
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=20,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.01), 24),
        retry_on_error=[RedisConnectionError, RedisTimeoutError, ConnectionError],
        socket_timeout=None,
        socket_connect_timeout=5,
    )
    # The scheme of the URL has chosen a class: TCP, TLS or Unix.
    pool.connection_class = type("TimedConnection", (_TimedConnection, pool.connection_class), {})
    return redis.Redis.from_pool(pool)


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer of admit."""

    status: str
    """OK | DUP | MISMATCH | NORUN | FAR | BUSY | FULL | DEAD"""
    owner: str
    """name/incarnation of the worker that owns the run; empty if none does."""


@dataclass(frozen=True, slots=True)
class RunHeader:
    """What a run's header says, as far as readers need it."""

    tenant: str
    base_model: str
    facts: Mapping[str, Any]
    status: str
    epoch: int
    owner: str
    admitted: int
    committed: int
    told: int
    gap_since: int
    """Milliseconds since the epoch when the oldest gap was first seen; 0: there is none."""
    lost: int
    """A seq that the client has sent and that is not here; -1: none is known of."""
    cancelled_to: int = -1
    """The run's owner wants nothing up to this seq any more."""

    @property
    def pending(self) -> bool:
        """Whether something admitted has not been committed."""
        return self.admitted > self.committed

    @property
    def has_gap(self) -> bool:
        """Whether ops of a live run wait above one that has not arrived."""
        return self.status == "active" and self.gap_since > 0

    @classmethod
    def from_values(cls, values: Sequence[bytes | None]) -> Self:
        """From the values of HEADER_FIELDS, in their order."""
        text = [(value or b"").decode() for value in values]
        return cls(
            tenant=text[0],
            base_model=text[1],
            facts=json.loads(text[2]),
            status=text[3],
            epoch=int(text[4]),
            owner=text[5],
            admitted=int(text[6]),
            committed=int(text[7]),
            told=int(text[8]),
            gap_since=int(text[9] or 0),
            lost=int(text[10] or -1),
            cancelled_to=int(text[11] or -1),
        )


@dataclass(frozen=True, slots=True, order=True)
class Published:
    """A run's in-flight sampler weights; a later save is larger."""

    epoch: int
    seq: int
    manifest_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What has become of one op of a run."""

    is_accepted: bool
    """Admitted, or parked above a gap."""
    is_committed: bool
    outcome: Outcome | None = None
    """None although committed: its time is over."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One entry of the list of samples that have ended."""

    position: int
    request_id: str
    state: str
    """finished | failed"""
    num_bytes: int
    """Size of the result."""

    @classmethod
    def from_entry(
        cls, sampling_session_id: str, entry_id: bytes, fields: Mapping[bytes, bytes]
    ) -> Self:
        return cls(
            position=int(entry_id.split(b"-")[0]),
            request_id=f"{sampling_session_id}:{fields[b'seq'].decode()}",
            state=fields[b"state"].decode(),
            num_bytes=int(fields[b"size"]),
        )


@dataclass(frozen=True, slots=True)
class Attempt:
    """The answer of begin and commit."""

    status: str
    """OK | ALREADY | FENCED | ORDER"""
    attempts: int = 0
    """Under how many epochs the op that was begun has been, this one included; 0 if none was."""
    deaths: int = 0
    """How many of those ended with the engine's death."""

    @classmethod
    def from_reply(cls, reply: Sequence[Any]) -> Self:
        return cls(reply[0].decode(), *(int(number) for number in reply[1:]))


@dataclass(frozen=True, slots=True)
class Recorded:
    """How committed ops have ended, as far as the log is not trimmed: what a replay follows."""

    failed: frozenset[int] = frozenset()
    """Seqs that failed."""
    digests: Mapping[int, str] = field(default_factory=dict)
    """seq -> digest of the run's state after it."""
    halvings: Mapping[int, int] = field(default_factory=dict)
    """seq -> how often its micro-batch was halved, also of an op that is not committed yet."""


HEADER_FIELDS = [item.name for item in dataclasses.fields(RunHeader)]


class Oplog:
    """Typed calls on one Redis."""

    def __init__(self, client: redis.Redis, clock: Callable[[], float] = time.time) -> None:
        """`clock` in seconds since the epoch: what is stamped on entries, for people to read."""
        self.redis = client
        self._clock = clock

    async def load_library(self) -> None:
        """Load the function library; every service does at its start."""
        source = files("luthier_core").joinpath("oplog.lua").read_text()
        await self.redis.function_load(source, replace=True)

    # --- training runs ----------------------------------------------------------------------------

    async def admit(
        self,
        op: Op,
        *,
        tenant: str,
        limits: LimitsConfig,
        header: Mapping[str, str] | None = None,
    ) -> Admission:
        """Dedupe by (run, seq) and append, or park above a gap. `header` creates the run (op 0)."""
        now_ms = self._now_ms()
        reply = await self._call(
            "admit",
            [
                keys.run_header(op.run_id),
                keys.run_log(op.run_id),
                keys.run_parked(op.run_id),
                keys.run_new(op.run_id),
            ],
            [
                tenant,
                op.seq,
                op.digest,
                op.body.num_bytes,
                limits.max_seq_ahead,
                limits.max_pending_ops,
                limits.max_pending_bytes,
                limits.max_parked_bytes,
                now_ms,
                json.dumps(header) if header else "",
                *_flat({**op.fields(), "at": str(now_ms)}),
            ],
        )
        return Admission(reply[0].decode(), reply[1].decode())

    async def reject_run(
        self, run_id: str, *, tenant: str, digest: str, header: Mapping[str, str], outcome: Outcome
    ) -> str:
        """Admit and fail op 0 in one step. OK | DUP | MISMATCH | NORUN."""
        reply = await self._call(
            "reject_run",
            [keys.run_header(run_id), keys.run_outcome(run_id, 0)],
            [tenant, digest, json.dumps(header), OUTCOME_TTL_MS, *_flat(outcome.fields())],
        )
        return cast(bytes, reply[0]).decode()

    # `server` of the calls below: see `server_id`. RedisRestarted if it is another by now.

    async def server_id(self, run_id: str) -> str:
        """The server process that holds this run: another after each restart or failover.

        An owner reads it before HEAD and names it in its calls. So a Redis that was rolled back,
        and takes an old epoch for the newest, is heard only once HEAD has been read again.
        """
        return cast(bytes, await self._call("server", [keys.run_header(run_id)], [])).decode()

    async def acquire(
        self, run_id: str, epoch: int, owner: str, *, server: str = ANY_SERVER
    ) -> tuple[int, int] | None:
        """(admitted, committed) if `owner` now holds the run under `epoch`; None if it lost."""
        reply = await self._call("acquire", [keys.run_header(run_id)], [epoch, server, owner])
        return (int(reply[1]), int(reply[2])) if reply[0] == b"OK" else None

    async def release(self, run_id: str, epoch: int, *, server: str = ANY_SERVER) -> bool:
        """Whether the run, held under `epoch` and with nothing pending, has no owner now."""
        reply = await self._call("release", [keys.run_header(run_id)], [epoch, server])
        return bool(reply == b"OK")

    async def begin(
        self, run_id: str, epoch: int, seq: int, *, server: str = ANY_SERVER
    ) -> Attempt:
        """Note that the owner is about to execute this op: OK | ALREADY | FENCED | ORDER."""
        reply = await self._call("begin", [keys.run_header(run_id)], [epoch, server, seq])
        return Attempt.from_reply(reply)

    async def commit(
        self,
        run_id: str,
        epoch: int,
        seq: int,
        outcome: Outcome,
        *,
        gradient: Gradient = Gradient.KEPT,
        digest: str = "",
        begin_next: bool = False,
        server: str = ANY_SERVER,
    ) -> Attempt:
        """Store the outcome and move the run's cursor: OK | ALREADY | FENCED | ORDER.

        `gradient` says what became of it, `digest` is that of the run's state now. With
        `begin_next` an OK also begins seq + 1 if it is admitted: one write instead of two.
        """
        reply = await self._call(
            "commit",
            [
                keys.run_header(run_id),
                keys.run_outcome(run_id, seq),
                keys.run_done(run_id),
            ],
            [
                *(epoch, server, seq, OUTCOME_TTL_MS, seq + 1 if begin_next else -1),
                *(gradient, digest, *_flat(outcome.fields())),
            ],
        )
        return Attempt.from_reply(reply)

    async def blame(self, run_id: str, epoch: int, seq: int, *, server: str = ANY_SERVER) -> int:
        """How often the engine has died of this op, now included; negative if it is not ours.

        Each attempt that was begun counts once.
        """
        return int(await self._call("blame", [keys.run_header(run_id)], [epoch, server, seq]))

    async def halve(
        self, run_id: str, epoch: int, seq: int, halvings: int, *, server: str = ANY_SERVER
    ) -> str:
        """Note how an op is going to be executed, which a replay repeats. OK | FENCED | ORDER."""
        args = [epoch, server, seq, halvings]
        return cast(bytes, await self._call("halve", [keys.run_header(run_id)], args)).decode()

    async def trim(self, run_id: str, epoch: int, seq: int, *, server: str = ANY_SERVER) -> str:
        """Drop the log up to seq: a snapshot at or after it is confirmed. OK | FENCED | ORDER."""
        call_keys = [keys.run_header(run_id), keys.run_log(run_id)]
        return cast(bytes, await self._call("trim", call_keys, [epoch, server, seq])).decode()

    async def ffwd(self, run_id: str, epoch: int, seq: int, *, server: str = ANY_SERVER) -> str:
        """Use up every id to seq, which a snapshot has: OK | ALREADY | FENCED.

        The log has no entries for the ids that it had not admitted.
        """
        call_keys = [
            keys.run_header(run_id),
            keys.run_log(run_id),
            keys.run_parked(run_id),
            keys.run_new(run_id),
        ]
        return cast(bytes, await self._call("ffwd", call_keys, [epoch, server, seq])).decode()

    async def publish(
        self, run_id: str, epoch: int, seq: int, key: str, *, server: str = ANY_SERVER
    ) -> str:
        """Move the in-flight sampler weights forward, never back. OK | STALE | FENCED."""
        reply = await self._call("publish", [keys.run_header(run_id)], [epoch, server, seq, key])
        return cast(bytes, reply).decode()

    async def published(self, run_id: str) -> Published | None:
        """The in-flight sampler weights of a run; None if it has saved none."""
        fields = ("published_epoch", "published_seq", "published")
        found = await cast(Any, self.redis.hmget(keys.run_header(run_id), fields))
        if found[2] is None:
            return None
        return Published(int(found[0]), int(found[1]), found[2].decode())

    async def fail_range(
        self,
        run_id: str,
        epoch: int,
        seqs: range,
        outcome: Outcome,
        *,
        server: str = ANY_SERVER,
    ) -> str:
        """Give up the gap at committed + 1: fail the seqs from it on, and with them the run.

        OK | ALREADY | FENCED | ORDER. The range must reach every parked op: ORDER says that one
        has arrived meanwhile, or what was missing, so look again.
        """
        reply = await self._call(
            "fail_range",
            [
                keys.run_header(run_id),
                keys.run_parked(run_id),
                keys.run_done(run_id),
                *(keys.run_outcome(run_id, seq) for seq in seqs),
            ],
            [epoch, server, seqs.start, OUTCOME_TTL_MS, *_flat(outcome.fields())],
        )
        return cast(bytes, reply).decode()

    async def lost(self, run_id: str, seq: int) -> None:
        """The client asks for a seq that is not here: its admission is lost (reliability 2.5)."""
        await self._call("lost", [keys.run_header(run_id), keys.run_parked(run_id)], [seq])

    async def told(self, run_id: str, seq: int) -> None:
        """The client has been given the error of this seq."""
        await self._call("told", [keys.run_header(run_id)], [seq])

    async def cancel_queued(self, run_id: str) -> int:
        """Let every op that is queued now and not begun fail; how many those are at most.

        The worker sees it within a second. Ops that come later are executed.
        """
        header = await self.header(run_id)
        if header is None or not header.pending:
            return 0
        key = keys.run_header(run_id)
        await cast(Any, self.redis.hset(key, "cancelled_to", header.admitted))
        return header.admitted - header.committed

    async def header(self, run_id: str) -> RunHeader | None:
        """The run's header, or None if there is no such run."""
        return (await self.headers([run_id])).get(run_id)

    async def headers(self, run_ids: Sequence[str]) -> dict[str, RunHeader]:
        """The headers of those runs that there are."""
        pipe = self.redis.pipeline(transaction=False)
        for run_id in run_ids:
            pipe.hmget(keys.run_header(run_id), HEADER_FIELDS)
        replies = await pipe.execute()
        return {
            run_id: RunHeader.from_values(values)
            for run_id, values in zip(run_ids, replies, strict=True)
            if values[0] is not None
        }

    async def admitted_at(self, run_id: str, seq: int) -> int | None:
        """When an op was admitted, in milliseconds since the epoch; None once it is trimmed."""
        known = await cast(Any, self.redis.hget(keys.run_header(run_id), f"d:{seq}"))
        return int(known.split()[2]) if known else None

    async def standing(self, run_id: str, seq: int) -> Standing:
        """What has become of one op, in one round trip.

        Parking, header, outcome, in this order: an op leaves the parking for the log only, and its
        outcome is there when the header says so. So one that moves meanwhile is never missed.
        """
        pipe = self.redis.pipeline(transaction=False)
        pipe.hexists(keys.run_parked(run_id), str(seq))
        pipe.hmget(keys.run_header(run_id), ["admitted", "committed"])
        pipe.hgetall(keys.run_outcome(run_id, seq))
        is_parked, (admitted, committed), fields = await pipe.execute()
        if admitted is None:
            return Standing(is_accepted=False, is_committed=False)
        return Standing(
            is_accepted=bool(is_parked) or seq <= int(admitted),
            is_committed=seq <= int(committed),
            outcome=Outcome.from_fields(fields) if fields else None,
        )

    async def is_parked(self, run_id: str, seq: int) -> bool:
        return bool(await cast(Any, self.redis.hexists(keys.run_parked(run_id), str(seq))))

    async def last_parked(self, run_id: str) -> int:
        """The highest seq that waits above a gap; -1: none does."""
        return max(map(int, await cast(Any, self.redis.hkeys(keys.run_parked(run_id)))), default=-1)

    async def session_has_ended(self, run_id: str) -> bool:
        """Whether the client session of this run was finished."""
        session = keys.session_header(run_id.partition(":")[0])
        return await cast(Any, self.redis.hget(session, "status")) not in (None, b"active")

    async def recorded(self, run_id: str) -> Recorded:
        """How the ops have ended that a replay executes again."""
        fields = await cast(Any, self.redis.hgetall(keys.run_header(run_id)))
        return Recorded(
            failed=frozenset(int(name[2:]) for name in fields if name.startswith(b"x:")),
            digests={
                int(name[2:]): value.decode()
                for name, value in fields.items()
                if name.startswith(b"s:")
            },
            halvings={
                int(name[2:]): int(value)
                for name, value in fields.items()
                if name.startswith(b"m:")
            },
        )

    async def read_log(self, cursors: Mapping[str, int]) -> dict[str, list[Op]]:
        """For each run the next ops with seq >= its cursor, in order, READ_AHEAD at most."""
        pipe = self.redis.pipeline(transaction=False)
        for run_id, cursor in cursors.items():
            start = f"{cursor}-0" if cursor else "0-1"
            pipe.xrange(keys.run_log(run_id), min=start, count=READ_AHEAD)
        replies = await pipe.execute()
        return {
            run_id: [Op.from_entry(run_id, entry_id, fields) for entry_id, fields in entries]
            for run_id, entries in zip(cursors, replies, strict=True)
            if entries
        }

    async def training_outcome(self, run_id: str, seq: int) -> Outcome | None:
        fields = await cast(Any, self.redis.hgetall(keys.run_outcome(run_id, seq)))
        return Outcome.from_fields(fields) if fields else None

    # --- finding and waking workers ---------------------------------------------------------------

    async def announce_run(self, base_model: str, run_id: str, now_s: float) -> None:
        """Put a run without an owner where workers look, and hint them.

        The owner of a run is hinted by admit itself, in the run's own slot. Every hint may be lost:
        workers look for themselves once a second.
        """
        pipe = self.redis.pipeline(transaction=False)
        pipe.zadd(keys.live_runs(base_model), {run_id: now_s})
        pipe.spublish(keys.model_wake(base_model), run_id)
        await pipe.execute()

    async def retire_run(self, base_model: str, run_id: str) -> None:
        """Take a released run off the list of live runs, if nobody has to look at it any more.

        It stays if it has got work meanwhile, or waits above a gap that somebody has to give up.
        """
        await cast(Any, self.redis.zrem(keys.live_runs(base_model), run_id))
        header = await self.header(run_id)
        if header is not None and (header.pending or header.has_gap):
            await self.announce_run(base_model, run_id, self._clock())

    async def live_runs(self, base_model: str) -> list[str]:
        members = await cast(Any, self.redis.zrange(keys.live_runs(base_model), 0, -1))
        return [member.decode() for member in members]

    async def live_workers(self) -> dict[str, dict[str, str]]:
        """name -> lease fields (role, base_model, state, incarnation, pid) of every live worker."""
        names = sorted(await cast(Any, self.redis.smembers(keys.WORKERS)))
        leases = [keys.worker_lease(name.decode()) for name in names]
        values = await self.redis.mget(leases) if leases else []
        return {
            name.decode(): json.loads(value)
            for name, value in zip(names, values, strict=True)
            if value
        }

    async def register_worker(self, name: str) -> None:
        await cast(Any, self.redis.sadd(keys.WORKERS, name))

    async def hold_lease(self, key: str, incarnation: str, value: str, ttl_ms: int) -> bool:
        return bool(await self._call("hold_lease", [key], [incarnation, value, ttl_ms]))

    async def release_lease(self, key: str, incarnation: str) -> None:
        await self._call("release_lease", [key], [incarnation])

    # --- sampling jobs ----------------------------------------------------------------------------

    async def enqueue(
        self,
        *,
        tenant: str,
        base_model: str,
        sampling_session_id: str,
        seq: str,
        digest: str,
        job: Mapping[str, str | bytes],
        max_jobs: int,
        header: Mapping[str, str],
    ) -> str:
        """Dedupe by (sampling session, seq) and append a job.

        OK | DUP | MISMATCH | NOSESSION | BUSY. A `job` that is an outcome's fields (it begins with
        `state`) is a refused request.
        """
        clone = clone_of(seq)
        call_keys = _sample_keys(sampling_session_id, seq, clone, base_model)[:4]
        reply = await self._call(
            "enqueue",
            call_keys,
            [
                *(tenant, seq, digest, clone, max_jobs, OUTCOME_TTL_MS, self._now_ms()),
                *(json.dumps(header), *_flat(job)),
            ],
        )
        return cast(bytes, reply).decode()

    async def cancel(
        self, sampling_session_id: str, seq: str, base_model: str, outcome: Outcome
    ) -> str:
        """End a queued or running sample with `outcome`. OK | ALREADY: unknown, or it has ended."""
        clone = clone_of(seq)
        reply = await self._call(
            "cancel",
            [
                *_sample_keys(sampling_session_id, seq, clone, base_model),
                keys.sampling_cancelled(base_model, keys.sampling_shard(sampling_session_id)),
            ],
            [
                *(seq, clone, keys.SAMPLING_GROUP, OUTCOME_TTL_MS, f"{sampling_session_id}:{seq}"),
                *_flat(outcome.fields()),
            ],
        )
        return cast(bytes, reply).decode()

    async def join(self, sampling_session_id: str, idempotency_key: str | None) -> int:
        """A number for one more handle of the sampling session: from 1, each given out once.

        Who asks again under the same idempotency key has not got the answer, and gets the same.
        """
        header = keys.sampling_header(sampling_session_id)
        number = int(await cast(Any, self.redis.hincrby(header, "joined", 1)))
        if idempotency_key is None:
            return number
        key = keys.sampling_join(sampling_session_id, idempotency_key)
        first = await self.redis.set(key, number, nx=True, get=True, px=JOIN_TTL_MS)
        return number if first is None else int(first)

    async def completions(
        self, sampling_session_id: str, clone: int, *, after: int, max_entries: int = 1000
    ) -> list[Completion]:
        """Samples of one clone that ended after that position of its list, in order."""
        stream = keys.sampling_completions(sampling_session_id, clone)
        entries: Any = await self.redis.xrange(stream, min=f"{after + 1}-0", count=max_entries)
        return [Completion.from_entry(sampling_session_id, *entry) for entry in entries]

    async def last_completion(self, sampling_session_id: str, clone: int) -> int:
        """The position of the latest completion there has been, which Redis' clock gave it.

        0 if none is known of.
        """
        header = keys.sampling_header(sampling_session_id)
        last = await cast(Any, self.redis.hget(header, f"completed:{clone}"))
        return int(last or 0)

    async def acknowledge(
        self, sampling_session_id: str, clone: int, *, to: int, seqs: Sequence[str]
    ) -> None:
        """The client has read its completions to this position, and holds the results of `seqs`."""
        pipe = self.redis.pipeline(transaction=False)
        if to > 0:
            stream = keys.sampling_completions(sampling_session_id, clone)
            pipe.xtrim(stream, minid=f"{to + 1}-0", approximate=False)
        for seq in seqs:
            outcome = keys.sampling_outcome(sampling_session_id, seq)
            pipe.pexpire(outcome, ACKNOWLEDGED_TTL_MS, lt=True)
        await pipe.execute()

    async def delivered(self, outcome_key: str) -> None:
        """An outcome has been given out whole: keep it for a while in case that was lost."""
        await self.redis.pexpire(outcome_key, DELIVERED_TTL_MS, lt=True)

    async def open_jobs(self, base_model: str) -> None:
        """Create the stream and its group if they are absent."""
        try:
            await self.redis.xgroup_create(
                keys.sampling_jobs(base_model), keys.SAMPLING_GROUP, id="0", mkstream=True
            )
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def claim_own(self, base_model: str, consumer: str) -> list[SamplingJob]:
        """Jobs that an earlier incarnation of this consumer claimed and did not settle."""
        return await self._read_group(base_model, consumer, after="0", count=1000, block_ms=None)

    async def claim(
        self, base_model: str, consumer: str, *, max_jobs: int, block_ms: int | None
    ) -> list[SamplingJob]:
        """New jobs, each for this consumer until it settles them; [] after block_ms."""
        return await self._read_group(
            base_model, consumer, after=">", count=max_jobs, block_ms=block_ms
        )

    async def claim_abandoned(
        self, base_model: str, consumer: str, *, idle_ms: int, max_jobs: int
    ) -> list[SamplingJob]:
        """Jobs that no consumer touched for idle_ms."""
        reply = await self._in_group(
            base_model,
            lambda: self.redis.xautoclaim(
                keys.sampling_jobs(base_model),
                keys.SAMPLING_GROUP,
                consumer,
                min_idle_time=idle_ms,
                count=max_jobs,
            ),
        )
        return _jobs(reply[1])

    async def deliveries(self, base_model: str, consumer: str) -> dict[bytes, int]:
        """How often each job that this consumer holds has been claimed."""
        jobs = keys.sampling_jobs(base_model)
        pending = await self._in_group(
            base_model,
            lambda: self.redis.xpending_range(jobs, keys.SAMPLING_GROUP, "-", "+", 1000, consumer),
        )
        return {item["message_id"]: item["times_delivered"] for item in pending}

    async def touch(self, base_model: str, consumer: str, entry_ids: Sequence[bytes]) -> None:
        """Keep claimed jobs of a long generation from counting as abandoned."""
        await self._in_group(
            base_model,
            lambda: self.redis.xclaim(
                keys.sampling_jobs(base_model),
                keys.SAMPLING_GROUP,
                consumer,
                min_idle_time=0,
                message_ids=list(entry_ids),
                justid=True,
            ),
        )

    async def settle(self, job: SamplingJob, base_model: str, outcome: Outcome) -> str:
        """Store the outcome of a job unless one is stored, and take the job off. OK | ALREADY."""
        reply = await self._call(
            "settle",
            [
                *_sample_keys(job.sampling_session_id, job.seq, job.clone, base_model),
                keys.sampling_usage(keys.sampling_shard(job.sampling_session_id)),
            ],
            [
                *(job.seq, job.clone, keys.SAMPLING_GROUP, job.entry_id, OUTCOME_TTL_MS),
                *_flat(outcome.fields()),
            ],
        )
        return cast(bytes, reply).decode()

    async def _read_group(
        self, base_model: str, consumer: str, *, after: str, count: int, block_ms: int | None
    ) -> list[SamplingJob]:
        reply = await self._in_group(
            base_model,
            lambda: self.redis.xreadgroup(
                keys.SAMPLING_GROUP,
                consumer,
                {keys.sampling_jobs(base_model): after},
                count=count,
                block=block_ms,
            ),
        )
        if not reply:
            return []
        entries = next(iter(reply.values()))[0] if isinstance(reply, dict) else reply[0][1]
        return _jobs(entries)

    # --- plumbing ---------------------------------------------------------------------------------

    async def _in_group(self, base_model: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """The reply; the group is made again if Redis has been wiped since it was opened."""
        try:
            return await call()
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
        await self.open_jobs(base_model)
        return await call()

    def _now_ms(self) -> int:
        return int(1000 * self._clock())

    async def _call(self, function: str, call_keys: Sequence[str], args: Sequence[Any]) -> Any:
        try:
            return await cast(
                Any, self.redis.fcall(f"lu1_{function}", len(call_keys), *call_keys, *args)
            )
        except ResponseError as error:
            if str(error).startswith("RESTARTED"):
                raise RedisRestarted(str(error)) from None
            raise


def _jobs(entries: Iterable[tuple[bytes, Mapping[bytes, bytes]]]) -> list[SamplingJob]:
    # A deleted entry that is still pending comes back without fields.
    return [SamplingJob.from_entry(entry_id, fields) for entry_id, fields in entries if fields]


def _sample_keys(session: str, seq: str, clone: int, base_model: str) -> list[str]:
    """Header, outcome, jobs, completions and channel of one sample: all in one slot."""
    return [
        keys.sampling_header(session),
        keys.sampling_outcome(session, seq),
        keys.sampling_jobs(base_model, keys.sampling_shard(session)),
        keys.sampling_completions(session, clone),
        keys.sampling_done(session),
    ]


def _flat(fields: Mapping[str, str | bytes]) -> list[str | bytes]:
    return [item for pair in fields.items() for item in pair]
