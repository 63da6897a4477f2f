"""A registry to test through its client: a real Valkey, a real disk store, a real Unix socket."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import redis.asyncio as redis
from aiohttp import web

from luthier_core.blobs import Blobs
from luthier_core.checkpoints import save_checkpoint
from luthier_core.config import Config
from luthier_core.records import CheckpointRecord, RunRecord
from luthier_core.registry_client import RegistryClient
from luthier_registry.app import build_app


@dataclass
class Clock:
    now: datetime = field(default_factory=lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@dataclass
class Stack:
    """One registry and what a test may reach behind it."""

    config: Config
    clock: Clock
    client: RegistryClient
    valkey: redis.Redis
    blobs: Blobs
    socket: str

    async def run(self, tenant: str = "ann", **changes: Any) -> RunRecord:
        session = await self.client.create_session(tenant)
        wanted = {"session_id": session.session_id, "model_seq_id": 0, "base_model": "tiny"}
        return await self.client.create_run(tenant, **{**wanted, **changes})

    async def save(self, run: RunRecord, **changes: Any) -> CheckpointRecord:
        wanted: dict[str, Any] = {
            **{"kind": "weights", "name": "x", "seq": 1, "epoch": 1},
            **{"files": {"w": b"123"}, "now": self.clock()},
        }
        return await save_checkpoint(self.blobs, self.valkey, run=run, **{**wanted, **changes})


@asynccontextmanager
async def serving(config: Config, clock: Clock) -> AsyncIterator[str]:
    runner = web.AppRunner(build_app(config, clock=clock, keeps_house=False))
    await runner.setup()
    try:
        socket = config.registry_url.removeprefix("unix://")
        await web.UnixSite(runner, socket).start()
        yield socket
    finally:
        await runner.cleanup()
