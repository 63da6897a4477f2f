"""Which sampling session of the operation log serves a model for a tenant.

This process makes a session per tenant for itself and counts its seqs, as an SDK would: limits,
turns, cancellation and bookkeeping are those of every other sample.
"""

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from luthier_core.checkpoints import TinkerPath
from luthier_core.errors import NotFound
from luthier_core.records import SamplerRecord
from luthier_gateway.backends import CACHE_ENTRIES, Backends

MAX_SAMPLERS = 1000
"""Of one tenant that are remembered; for the weights of another a new session is made."""


@dataclass(slots=True)
class Sampler:
    """A sampling session that nobody else sends to."""

    record: SamplerRecord
    seqs: Iterator[int] = field(default_factory=itertools.count)


@dataclass(slots=True)
class _Session:
    """A tenant's session, with its sampling sessions by the weights that they sample."""

    session_id: str = ""
    num_samplers: int = 0
    samplers: OrderedDict[str, Sampler] = field(default_factory=OrderedDict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Samplers:
    """The sampling sessions of one gateway process."""

    def __init__(self, backends: Backends) -> None:
        self._backends = backends
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    async def of(self, tenant: str, model: str) -> Sampler:
        """For a base model's name, or a tinker:// path as it stands now.

        NotFound for what is absent or not the tenant's to read. A path is looked up every time: its
        weights may have been saved again, deleted, or made private.
        """
        weights = await self._weights(tenant, model)
        session = self._sessions.setdefault(tenant, _Session())
        self._sessions.move_to_end(tenant)
        if len(self._sessions) > CACHE_ENTRIES:
            self._sessions.popitem(last=False)
        async with session.lock:  # one creation for all who wait for the same
            await self._renew(tenant, session)
            name = weights or model
            if name not in session.samplers:
                sampler = await self._create(tenant, session, model)
                session.samplers[sampler.record.weights or model] = sampler
                if len(session.samplers) > MAX_SAMPLERS:
                    session.samplers.popitem(last=False)
                return sampler
            session.samplers.move_to_end(name)
            return session.samplers[name]

    async def _weights(self, tenant: str, model: str) -> str:
        """Manifest of the checkpoint; empty for a base model."""
        if model in self._backends.config.model_names:
            return ""
        if not model.startswith("tinker://"):
            raise NotFound(
                f"model={model[:300]!r}; there are {self._backends.config.model_names} and "
                "tinker:// paths"
            )
        TinkerPath.parse(model, "model")
        try:
            return (await self._backends.registry.resolve(tenant, model)).manifest_key
        except NotFound:
            raise NotFound(f"model={model[:300]!r}") from None

    async def _renew(self, tenant: str, session: _Session) -> None:
        """A session to work in: the first, or a new one after its tenant has finished it."""
        if session.session_id and not await self._backends.is_finished(session.session_id):
            return
        record = await self._backends.registry.create_session(
            tenant,
            tags=["openai"],
            sdk_version="openai-api",
            display_name="OpenAI-compatible API",
        )
        session.session_id, session.num_samplers = record.session_id, 0
        session.samplers.clear()

    async def _create(self, tenant: str, session: _Session, model: str) -> Sampler:
        is_path = model.startswith("tinker://")
        record = await self._backends.registry.create_sampler(
            tenant,
            session_id=session.session_id,
            sampling_session_seq_id=session.num_samplers,
            base_model=None if is_path else model,
            model_path=model if is_path else None,
        )
        session.num_samplers += 1
        return Sampler(record)
