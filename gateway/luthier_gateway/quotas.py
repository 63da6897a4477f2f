"""Limits of keys and organisations: rates, queues, runs, tokens, storage, money.

A rate or a full queue is refused with 429: it is over soon. Of an op of a run that is more than a
budget allows the future fails instead, with the reason: the client counts its seqs on, and a run
must not wait for one that was refused (reliability F3). What was used is counted every
`housekeeping.usage_s`, so a budget holds to within that.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import redis.asyncio as redis
from aiohttp import web
from aiohttp.typedefs import Handler

from luthier_core import keys
from luthier_core.caller import REFUSAL, Caller
from luthier_core.config import Config
from luthier_core.errors import BadRequest, TooManyRequests
from luthier_core.oplog import Oplog
from luthier_core.records import NO_LIMITS, Limits
from luthier_core.usage import Prices, Use, day_of, month_of, read_uses
from luthier_gateway import checkpoints, forward_backward, sampling, training, uploads
from luthier_gateway.openai import handlers as openai

T = TypeVar("T")

BELIEVED_S = 1.0
"""How long what was found out about a tenant is used again."""
MAX_REMEMBERED = 1000
SOON_S = 5
LATER_S = 60

_TRAIN: frozenset[Handler] = frozenset(
    {forward_backward.forward_backward, forward_backward.forward}
)
_SAMPLE: frozenset[Handler] = frozenset(
    {sampling.asample, openai.completions, openai.chat_completions}
)
_SAVE: frozenset[Handler] = frozenset(
    {
        training.save_weights,
        training.save_weights_for_sampler,
        training.save_weights_external,
        uploads.create_upload,
        checkpoints.copy_weights,
    }
)


class OverBudget(BadRequest):
    """A limit of this account, or of this API key, is used up."""


class Quotas:
    """What each caller has left. One per gateway process; the counts are shared in Redis."""

    def __init__(self, config: Config, oplog: Oplog, counters: redis.Redis) -> None:
        self._config = config
        self._oplog = oplog
        self._counters = counters
        self._prices = Prices(config)
        self._believed: dict[str, tuple[float, Any]] = {}
        self._spent: dict[str, int] = {}
        """Subject -> the window in which it has sent as much as it may."""

    async def check(self, request: web.Request, caller: Caller) -> None:
        """TooManyRequests if this must wait; REFUSAL is set if it must not be."""
        REFUSAL.set(None)
        handler = request.match_info.handler
        for subject, key_id, limits in (
            (f"{caller.tenant}/{caller.key_id}", caller.key_id, caller.key_limits),
            (caller.tenant, None, caller.tenant_limits),
        ):
            if limits == NO_LIMITS:
                continue
            await self._check_rate(subject, limits)
            if handler in _TRAIN:
                await self._check_queue(caller.tenant, key_id, limits)
                await self._check_trained(caller.tenant, key_id, limits)
            elif handler in _SAMPLE:
                await self._check_sampled(caller.tenant, key_id, limits)
            elif handler in _SAVE:
                await self._check_stored(caller.tenant, key_id, limits)
            elif handler is training.create_model:
                await self._check_runs(caller.tenant, key_id, limits)

    async def _check_rate(self, subject: str, limits: Limits) -> None:
        rate = limits.requests_per_s
        if rate is None:
            return
        window_s = max(1, math.ceil(1 / rate))
        window = int(time.time() / window_s)
        if self._spent.get(subject) != window:
            key = f"rate:{subject}:{window}"
            pipe = self._counters.pipeline(transaction=False)
            pipe.incr(key)
            pipe.expire(key, window_s + 1)
            if (await pipe.execute())[0] <= rate * window_s:
                return
            # Its further requests are not counted: each would be a write, which Redis syncs to disk
            # with everyone else's ops.
            _put_bounded(self._spent, subject, window)
        raise _wait(f"more than {rate:g} requests per second", window_s)

    async def _check_queue(self, tenant: str, key_id: str | None, limits: Limits) -> None:
        if limits.queued_bytes is None:
            return
        queued = sum(item[1] for item in await self._live_runs(tenant, key_id))
        if queued > limits.queued_bytes:
            raise _wait(f"{queued} bytes are queued; the limit is {limits.queued_bytes}", SOON_S)

    async def _check_runs(self, tenant: str, key_id: str | None, limits: Limits) -> None:
        if limits.concurrent_runs is None:
            return
        self._believed.pop(f"runs {tenant}", None)  # runs are made seldom: look each time
        num_runs = len(await self._live_runs(tenant, key_id))
        if num_runs >= limits.concurrent_runs:
            # A repeat of a run that is there is answered: only the registry knows which it is.
            REFUSAL.set(
                TooManyRequests(
                    f"{num_runs} runs are live; the limit is {limits.concurrent_runs}. Finish a "
                    "session, or wait until one is idle"
                )
            )

    async def _check_trained(self, tenant: str, key_id: str | None, limits: Limits) -> None:
        reason = await self._over_tokens(
            tenant, key_id, limits.trained_tokens_per_day, ("train",)
        ) or await self._over_money(tenant, key_id, limits)
        if reason:
            REFUSAL.set(OverBudget(reason))

    async def _check_sampled(self, tenant: str, key_id: str | None, limits: Limits) -> None:
        reason = await self._over_tokens(
            tenant, key_id, limits.sampled_tokens_per_day, ("prefill", "sample")
        ) or await self._over_money(tenant, key_id, limits)
        if reason:
            raise _wait(reason, LATER_S)

    async def _check_stored(self, tenant: str, key_id: str | None, limits: Limits) -> None:
        if limits.stored_bytes is None:
            return
        field = "total" if key_id is None else key_id
        found = await cast(Any, self._oplog.redis.hget(keys.stored(tenant), field))
        if found is not None and int(found) >= limits.stored_bytes:
            REFUSAL.set(
                OverBudget(
                    f"{int(found)} bytes are stored; the limit is {limits.stored_bytes}. Delete "
                    "checkpoints first"
                )
            )

    async def _over_tokens(
        self, tenant: str, key_id: str | None, limit: int | None, kinds: Sequence[str]
    ) -> str | None:
        if limit is None:
            return None
        used = sum(
            use.amount
            for use in await self._used(tenant, day_of(datetime.now(UTC)))
            if use.kind in kinds and key_id in (None, use.subject)
        )
        if used < limit:
            return None
        return f"{used} tokens ({', '.join(kinds)}) were used today (UTC); the limit is {limit}"

    async def _over_money(self, tenant: str, key_id: str | None, limits: Limits) -> str | None:
        limit = limits.usd_per_month
        if limit is None:
            return None
        uses = await self._used(tenant, month_of(datetime.now(UTC)))
        spent = self._prices.total(use for use in uses if key_id in (None, use.subject))
        if spent < limit:
            return None
        return f"{spent:.6g} USD were spent this month (UTC); the limit is {limit:g}"

    async def _used(self, tenant: str, period: str) -> list[Use]:
        async def look() -> list[Use]:
            table = keys.used(tenant, period)
            return read_uses(await cast(Any, self._oplog.redis.hgetall(table)))

        found: list[Use] = await self._recent(f"used {tenant} {period}", look)
        return found

    async def _live_runs(self, tenant: str, key_id: str | None) -> list[tuple[str, int]]:
        """(run, bytes queued) of the tenant's runs, or of those that the key has made.

        What waits for an earlier seq is not among them: refusing that seq would keep it waiting.
        """

        async def look() -> list[tuple[str, int, str]]:
            live = [r for m in self._config.model_names for r in await self._oplog.live_runs(m)]
            return await self._of_tenant(tenant, live)

        found = await self._recent(f"runs {tenant}", look)
        return [(run, size) for run, size, key in found if key_id in (None, key)]

    async def _of_tenant(self, tenant: str, run_ids: Iterable[str]) -> list[tuple[str, int, str]]:
        pipe, run_ids = self._oplog.redis.pipeline(transaction=False), list(run_ids)
        for run_id in run_ids:
            names = ["tenant", "bytes", "parked_bytes", "key_id"]
            pipe.hmget(keys.run_header(run_id), names)
        found = zip(run_ids, await pipe.execute(), strict=True)
        return [
            (run_id, int(size or 0) - int(parked or 0), (key or b"").decode())
            for run_id, (owner, size, parked, key) in found
            if owner is not None and owner.decode() == tenant
        ]

    async def _recent(self, name: str, look: Callable[[], Any]) -> Any:
        until, value = self._believed.get(name, (0.0, None))
        if until < time.monotonic():
            value = await look()
            _put_bounded(self._believed, name, (time.monotonic() + BELIEVED_S, value))
        return value


QUOTAS = web.AppKey("quotas", Quotas)


def _put_bounded(table: dict[str, T], name: str, value: T) -> None:
    """Nothing in these tables is lost that cannot be found out again."""
    if len(table) > MAX_REMEMBERED:
        table.clear()
    table[name] = value


def _wait(reason: str, retry_after_s: int) -> TooManyRequests:
    error = TooManyRequests(reason)
    error.retry_after_s = retry_after_s
    return error
