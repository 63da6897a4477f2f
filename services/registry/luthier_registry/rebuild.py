"""Makes everything in Redis again that the object store knows: lists, headers, sums.

After Redis was wiped, and before the gateways go on. A run continues from its last snapshot under a
higher epoch, so that a worker which still holds it can publish nothing any more; one without a
snapshot has failed. It may be run at any time: what is there is written again as it is.
"""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, TypeVar, cast

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs, read_below
from luthier_core.checkpoints import TinkerPath
from luthier_core.config import Config
from luthier_core.errors import Unavailable
from luthier_core.generation import Generation
from luthier_core.listing import Listing
from luthier_core.protocol import Head
from luthier_core.records import CheckpointRecord, RunRecord, SamplerRecord, SessionRecord
from luthier_registry.counting import Counting
from luthier_registry.identity import tenants
from luthier_registry.lists import Lists

T = TypeVar("T")

COMPARED_S = 20.0
"""So long a list is waited for after a restart of Redis."""

_MODEL_FACTS = ("vocab_size", "max_context_tokens", "architecture", "tokenizer_id")


class Rebuild:
    """The job, and what waits for it."""

    def __init__(
        self,
        config: Config,
        blobs: Blobs,
        client: redis.Redis,
        counting: Counting,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._config = config
        self._blobs = blobs
        self._redis = client
        self._counting = counting
        self._clock = clock
        self._generation = Generation(client, blobs)
        self._rows = Lists(blobs, client, clock=clock)
        self._comparing: asyncio.Task[int] | None = None

    async def run_if_restarted(self) -> dict[str, int]:
        """Rebuild all, unless this Redis is the one that the store knows; its lists if it started.

        A Redis that comes back from a crash or a failover may lack the newest rows. Its headers may
        be behind as well, but those the owners of the runs put right.
        """
        if not await self._generation.is_confirmed():
            return await self.run()
        return {"rebuilt": await self._compare()}

    async def read_whole(self, read: Callable[[], Awaitable[T]]) -> T:
        """What `read` finds in lists that lack nothing of what a restarted Redis may have lost.

        It reads again if Redis was restarted meanwhile. Unavailable after COMPARED_S.
        """
        try:
            async with asyncio.timeout(COMPARED_S):
                while True:
                    server = await self._server()
                    if await self._is_listed_under(server):
                        found = await read()
                        if await self._server() == server:
                            return found
                    else:
                        await self._compared()
        except TimeoutError:
            raise Unavailable("the lists, which are made whole after a restart of Redis") from None

    async def _compared(self) -> None:
        """One comparison for all who wait for it; who gives up must not end it for others."""
        if self._comparing is None or self._comparing.done():
            self._comparing = asyncio.create_task(self._compare())
        await asyncio.shield(self._comparing)

    async def _compare(self) -> int:
        """List what the store has, unless that was done under this server: how many records."""
        server = await self._server()
        if await self._is_listed_under(server):
            return 0
        num_records = sum([await self._lists(tenant) for tenant in await tenants(self._blobs)])
        await self._redis.set(keys.LISTED_SINCE, server)
        return num_records

    async def run(self) -> dict[str, int]:
        """Rebuild, and let the gateways go on."""
        server = await self._server()
        await self._facts_of_models()
        num_records = 0
        for tenant in await tenants(self._blobs):
            num_records += await self._lists(tenant, headers=True)
        await self._counting.count_samples_again()
        await self._redis.set(keys.LISTED_SINCE, server)
        await self._generation.renew()
        return {"rebuilt": num_records}

    async def _is_listed_under(self, server: bytes) -> bool:
        return bool(await self._redis.get(keys.LISTED_SINCE) == server)

    async def _server(self) -> bytes:
        """The id of the server process: another after each restart or failover."""
        return str((await self._redis.info("server"))["run_id"]).encode()

    async def _facts_of_models(self) -> None:
        for name in self._config.model_names:
            with contextlib.suppress(BlobMissing):
                facts = await self._blobs.get(keys.model_facts_object(name))
                await self._redis.set(keys.model_facts(name), facts, nx=True)

    async def _lists(self, tenant: str, *, headers: bool = False) -> int:
        """Rows of sessions, runs, checkpoints and sampling sessions -> how many records.

        What is listed is only read: a write each would take Redis, which syncs it, far longer.
        """
        listing, num_records = Listing(self._redis, tenant), 0
        async for batch in read_below(self._blobs, f"t/{tenant}/sessions/"):
            sessions = [SessionRecord.from_bytes(data) for _, data in batch]
            lacking = await listing.unlisted("sessions", {s.session_id: s.row() for s in sessions})
            for session in sessions:
                if session.session_id in lacking:
                    await listing.add_session(session)
                if headers:
                    await self._session_header(session)
            num_records += len(batch)
        async for batch in read_below(self._blobs, f"t/{tenant}/runs/", "/run.json"):
            runs = [RunRecord.from_bytes(data) for _, data in batch]
            lacking = await listing.unlisted("runs", {run.run_id: run.row() for run in runs})
            for run in runs:
                if run.run_id in lacking:
                    await listing.add_run(run)
                if headers and run.trainable:
                    await self._run_header(run)
            num_records += len(batch)
        async for batch in read_below(self._blobs, f"t/{tenant}/samplers/"):
            samplers = [SamplerRecord.from_bytes(data) for _, data in batch]
            for sampler in await listing.unlisted_samplers(samplers):
                await listing.add_sampler(sampler)
            num_records += len(batch)
        return num_records + await self._checkpoints(tenant, listing)

    async def _checkpoints(self, tenant: str, listing: Listing) -> int:
        num_records, rows_without_record = 0, set(await listing.ids("checkpoints"))
        async for batch in read_below(self._blobs, f"t/{tenant}/names/"):
            found = [CheckpointRecord.from_bytes(data) for _, data in batch]
            rows = {c.row_id: c.row() for c in found if self._is_listed(c)}
            for row_id in await listing.unlisted("checkpoints", rows):
                await self._rows.list_again(tenant, TinkerPath(*row_id.split("/")))
            rows_without_record -= rows.keys()
            num_records += len(batch)
        for row_id in rows_without_record:
            # Or saved a moment ago: its record says.
            await self._rows.list_again(tenant, TinkerPath(*row_id.split("/")))
        return num_records

    def _is_listed(self, checkpoint: CheckpointRecord) -> bool:
        expired = checkpoint.expires_at and checkpoint.expires_at <= self._clock()
        return checkpoint.kind != "ephemeral" and not expired

    async def _session_header(self, session: SessionRecord) -> None:
        header: dict[Any, Any] = {
            "tenant": session.tenant,
            "status": session.status,
            "heartbeat": str(self._clock().timestamp()),
        }
        await cast(Any, self._redis.hset(keys.session_header(session.session_id), mapping=header))

    async def _run_header(self, run: RunRecord) -> None:
        """The header of a run that has none, at its last snapshot (reliability 2.5)."""
        key = keys.run_header(run.run_id)
        await cast(Any, self._redis.sadd(keys.COUNTED_RUNS, run.run_id))
        if await self._redis.exists(key):
            return
        head = await self._fence(run)
        seq = head.snap.seq if head and head.snap else 0
        fields: dict[Any, Any] = {
            "base_model": run.base_model,
            "facts": json.dumps(await self._facts(run)),
            "status": "active" if head and head.snap else "failed",
            "epoch": head.epoch if head else 0,
            "owner": "",
            "admitted": seq,
            "committed": seq,
            "bytes": 0,
            "parked_bytes": 0,
            "told": -1,
            "trimmed": seq,
            "tenant": run.tenant,
        }
        await cast(Any, self._redis.hset(key, mapping=fields))

    async def _fence(self, run: RunRecord) -> Head | None:
        """HEAD under a higher epoch; None if the run never had an owner."""
        key = keys.run_head(run.tenant, run.run_id)
        while True:
            try:
                data, etag = await self._blobs.get_with_etag(key)
            except BlobMissing:
                return None
            head = Head.from_bytes(data)
            raised = Head(head.epoch + 1, "", head.snap, head.prev_snap)
            if await self._blobs.put_if_match(key, raised.to_bytes(), etag) is not None:
                return raised

    async def _facts(self, run: RunRecord) -> dict[str, Any]:
        """As the gateway had put them into the header when the run was made."""
        model = json.loads(await self._redis.get(keys.model_facts(run.base_model)) or b"{}")
        return {
            **{name: model[name] for name in _MODEL_FACTS if name in model},
            "session_id": run.session_id,
            "lora_rank": run.lora.rank,
        }
