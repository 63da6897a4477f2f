"""What the handlers of one gateway process share: connections and caches."""

import contextlib
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import orjson
from aiohttp import web

from luthier_core import keys, metrics
from luthier_core.blobs import Blobs
from luthier_core.caller import CALLER
from luthier_core.config import Config
from luthier_core.errors import BadRequest, InvalidField, NotFound, Unauthorized, Unavailable
from luthier_core.futures import Futures
from luthier_core.oplog import Oplog
from luthier_core.records import SamplerRecord
from luthier_core.registry_client import RegistryClient
from luthier_core.validation import ModelLimits
from luthier_gateway.accepted import AcceptedSamples
from luthier_gateway.auth import Authenticator, Turns

T = TypeVar("T")

CACHE_ENTRIES = 10_000
_RUN_ID = re.compile(r"[0-9a-zA-Z_-]{1,64}:train:\d{1,10}", re.ASCII)


class Cache(Generic[T]):
    """The values of the CACHE_ENTRIES keys used last; for facts that never change."""

    def __init__(self, load: Callable[[str], Awaitable[T]]) -> None:
        self._load = load
        self._values: OrderedDict[str, T] = OrderedDict()

    async def get(self, key: str) -> T:
        """The value, loaded on first use; what the loader raises is not remembered."""
        if key not in self._values:
            self._values[key] = await self._load(key)
            if len(self._values) > CACHE_ENTRIES:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What never changes about a run, from its header."""

    tenant: str
    base_model: str
    facts: dict[str, Any]


class Backends:
    """Everything a handler may reach."""

    def __init__(
        self,
        *,
        config: Config,
        oplog: Oplog,
        futures: Futures,
        blobs: Blobs,
        registry: RegistryClient,
        auth: Authenticator,
        turns: Turns,
    ) -> None:
        self.config = config
        self.oplog = oplog
        self.futures = futures
        self.blobs = blobs
        self.registry = registry
        self.auth = auth
        self.turns = turns
        self.accepted_samples = AcceptedSamples(oplog)
        self._runs = Cache(self._load_run)
        self._samplers = Cache(self._load_sampler)
        self._models = Cache(self._load_model)

    async def run(self, tenant: str, run_id: str, field: str = "model_id") -> RunFacts:
        """The run, if it is the tenant's; NotFound otherwise, the same for absent and foreign."""
        with contextlib.suppress(NotFound):
            run = await self._runs.get(run_id)
            if run.tenant == tenant:
                return run
            if (caller := CALLER.get()) is not None:
                metrics.FOREIGN_IDS.labels(caller.key_id).inc()
        raise NotFound(f"{field}={run_id[:100]!r}")

    async def live_run(self, tenant: str, run_id: str) -> RunFacts:
        """The tenant's run, as one that takes ops; BadRequest if its creation had failed."""
        run = await self.run(tenant, run_id)
        if not run.base_model:
            raise BadRequest(f"model_id: {run_id} could not be created; create another")
        return run

    async def working_run(self, tenant: str, run_id: str, seq: int) -> RunFacts:
        """The tenant's live run, if it takes op seq; BadRequest if its session is finished.

        A retry of what was accepted before the end still gets its answer.
        """
        run = await self.live_run(tenant, run_id)
        session_id = run.facts["session_id"]
        if await self.is_finished(session_id):
            standing = await self.oplog.standing(run_id, seq)
            if not standing.is_accepted:
                raise BadRequest(f"session {session_id} is finished")
        return run

    async def check_sampling(self, sampler: SamplerRecord, seq: int) -> None:
        """BadRequest for a new sample of a session that is finished."""
        outcome = keys.sampling_outcome(sampler.sampling_session_id, seq)
        if await self.is_finished(sampler.session_id) and not await self.oplog.redis.exists(
            outcome
        ):
            raise BadRequest(f"session {sampler.session_id} is finished")

    async def is_finished(self, session_id: str) -> bool:
        """Whether the client has closed the session: no new work is taken any more."""
        status = await cast(
            Awaitable[bytes | None],
            self.oplog.redis.hget(keys.session_header(session_id), "status"),
        )
        return status == b"finished"

    async def sampler(self, tenant: str, sampling_session_id: str) -> SamplerRecord:
        """The sampling session, if it is the tenant's; NotFound otherwise."""
        return await self._samplers.get(f"{tenant}/{sampling_session_id}")

    async def access_tenant(self, weights_access_token: str | None) -> str | None:
        """The tenant whose checkpoints the token lets its bearer read: it is a key of theirs."""
        if not weights_access_token:
            return None
        try:
            bearer = await self.auth.caller(weights_access_token)
        except Unauthorized:
            raise InvalidField("weights_access_token: it is no key of this server") from None
        if "read" not in bearer.scopes:
            raise InvalidField("weights_access_token: this key may not read")
        return bearer.tenant

    async def model_facts(self, base_model: str) -> dict[str, Any]:
        """Facts of a configured base model; Unavailable until one of its workers has started."""
        return await self._models.get(base_model)

    async def limits(self, base_model: str) -> ModelLimits:
        return self.limits_of(await self.model_facts(base_model))

    def limits_of(self, facts: Mapping[str, Any]) -> ModelLimits:
        """What requests are checked against, for a model or a run of these facts."""
        limits = self.config.limits
        return ModelLimits(
            vocab_size=facts["vocab_size"],
            max_context_tokens=facts["max_context_tokens"],
            max_datums=limits.max_datums,
            max_tokens_per_request=limits.max_tokens_per_request,
            max_num_samples=limits.max_num_samples,
            custom_losses=limits.custom_losses,
        )

    async def _load_run(self, run_id: str) -> RunFacts:
        # Only ids of ours are looked up: the header of a session has a key of the same form.
        header = await self.oplog.header(run_id) if _RUN_ID.fullmatch(run_id) else None
        if header is None:
            raise NotFound(f"model_id={run_id!r}")
        return RunFacts(header.tenant, header.base_model, dict(header.facts))

    async def _load_sampler(self, key: str) -> SamplerRecord:
        tenant, _, sampling_session_id = key.partition("/")
        return await self.registry.get_sampler(tenant, sampling_session_id)

    async def _load_model(self, base_model: str) -> dict[str, Any]:
        raw = await self.oplog.redis.get(keys.model_facts(base_model))
        if raw is None:
            raise Unavailable(f"no worker of base model {base_model!r} has started yet")
        facts: dict[str, Any] = orjson.loads(raw)
        return facts


BACKENDS = web.AppKey("backends", Backends)
TENANT = web.RequestKey("tenant", str)
