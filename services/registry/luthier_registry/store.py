"""What the registry knows: records in the object store, their lists in Redis. Holds no state.

Every method names the tenant it works for. What is foreign and what is absent raise one NotFound.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar, cast

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.checkpoints import TinkerPath, save_sampler
from luthier_core.config import Config
from luthier_core.errors import BadRequest, InvalidField, NotFound, Unsupported
from luthier_core.listing import Listing
from luthier_core.records import (
    ApiKeyRecord,
    CheckpointRecord,
    FinishReason,
    LoraConfig,
    Record,
    RunRecord,
    SamplerRecord,
    SessionRecord,
)
from luthier_registry.requests import CreateRun, CreateSampler, CreateSession

R = TypeVar("R", bound=Record)

_SESSION_ID = re.compile(r"[0-9a-f]{32}")
_RUN_ID = re.compile(r"[0-9a-f]{32}:train:\d{1,10}")
_SAMPLER_ID = re.compile(r"[0-9a-f]{32}:sample:\d{1,10}")
_KEY_HMAC = re.compile(r"[0-9a-f]{64}")


class Store:
    """Sessions, runs, samplers, checkpoints and API keys of one deployment."""

    def __init__(
        self,
        blobs: Blobs,
        client: redis.Redis,
        config: Config,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._blobs = blobs
        self._redis = client
        self._config = config
        self._secret = config.secret()
        self._clock = clock

    async def check(self) -> None:
        """Raises what Redis or the object store raise when they are away."""
        await self._redis.execute_command("PING")  # type: ignore[no-untyped-call]
        await self._blobs.head(keys.GENERATION)

    async def api_key(self, key_hmac: str) -> ApiKeyRecord:
        _check_id(_KEY_HMAC, key_hmac, "key")
        return await self._read(ApiKeyRecord, keys.api_key_record(key_hmac), "key")

    # --- sessions ---------------------------------------------------------------------------------

    async def create_session(self, tenant: str, wanted: CreateSession) -> SessionRecord:
        """A new session; under one idempotency key always the same."""
        session_id = secrets.token_hex(16)
        if wanted.idempotency_key is not None:
            session_id = self._derived_id(tenant, wanted.idempotency_key)
        record = SessionRecord(
            session_id=session_id,
            tenant=tenant,
            created_at=self._clock(),
            **wanted.model_dump(exclude={"idempotency_key"}),
        )
        record = await self._create(keys.session_record(tenant, session_id), record)
        await self._listing(tenant).add_session(record)
        await self._note_status(record)
        return record

    async def session(self, tenant: str, session_id: str) -> SessionRecord:
        _check_id(_SESSION_ID, session_id, "session_id")
        key = keys.session_record(tenant, session_id)
        return await self._read(SessionRecord, key, f"session_id={session_id!r}")

    async def describe_session(self, tenant: str, session_id: str) -> dict[str, Any]:
        """The session's record with the ids of its runs and sampling sessions."""
        record = await self.session(tenant, session_id)
        listing = self._listing(tenant)
        return {
            **record.to_dict(),
            "training_run_ids": await listing.ids(f"runs:{session_id}"),
            "sampler_ids": await listing.ids(f"samplers:{session_id}"),
        }

    async def list_sessions(self, tenant: str, *, offset: int, limit: int) -> dict[str, Any]:
        ids, total = await self._listing(tenant).id_page("sessions", offset=offset, limit=limit)
        return {"sessions": ids, "cursor": _cursor(offset, limit, total)}

    async def heartbeat(self, tenant: str, session_id: str) -> SessionRecord:
        """Note that the session's client is alive."""
        record = await self.session(tenant, session_id)
        await self._note_status(record)
        return record

    async def finish_session(
        self, tenant: str, session_id: str, reason: FinishReason, detail: str | None
    ) -> SessionRecord:
        """End the session. The first reason wins; a repeat is no error."""
        _check_id(_SESSION_ID, session_id, "session_id")
        key = keys.session_record(tenant, session_id)
        while True:
            try:
                data, etag = await self._blobs.get_with_etag(key)
            except BlobMissing:
                raise NotFound(f"session_id={session_id!r}") from None
            record = SessionRecord.from_bytes(data)
            if record.status == "active":
                ending = {"status": "finished", "finish_reason": reason, "finish_detail": detail}
                record = record.model_copy(update=ending)
                if await self._blobs.put_if_match(key, record.to_bytes(), etag) is None:
                    continue  # somebody else changed it: look again
            await self._note_status(record)
            return record

    async def _note_status(self, record: SessionRecord) -> None:
        """The session in Redis, where whoever suspends the runs of lost clients looks."""
        header: dict[Any, Any] = {
            "tenant": record.tenant,
            "status": record.status,
            "heartbeat": str(self._clock().timestamp()),
        }
        await cast(Any, self._redis.hset(keys.session_header(record.session_id), mapping=header))

    async def _active_session(self, tenant: str, session_id: str) -> SessionRecord:
        record = await self.session(tenant, session_id)
        if record.status != "active":
            raise BadRequest(f"session_id={session_id!r} is finished")
        return record

    # --- training runs ----------------------------------------------------------------------------

    async def create_run(self, tenant: str, wanted: CreateRun) -> RunRecord:
        """The facts of a run, before its op 0 is admitted; a repeat returns the first record."""
        _check_id(_SESSION_ID, wanted.session_id, "session_id")
        run_id = f"{wanted.session_id}:train:{wanted.model_seq_id}"
        key = keys.run_record(tenant, run_id)
        try:
            record = RunRecord.from_bytes(await self._blobs.get(key))
        except BlobMissing:
            await self._active_session(tenant, wanted.session_id)
            base_model, lora = await self._what_to_train(tenant, wanted)
            record = RunRecord(
                run_id=run_id,
                tenant=tenant,
                session_id=wanted.session_id,
                base_model=base_model,
                lora=lora,
                optimizer_config=wanted.optimizer_config or {"type": "adamw"},
                user_metadata=wanted.user_metadata,
                created_at=self._clock(),
                source_path=wanted.source_path,
            )
            record = await self._create(key, record)
        # For a repeat too: the first try may have died between the record and its row.
        await self._listing(tenant).add_run(record)
        return record

    async def _what_to_train(self, tenant: str, wanted: CreateRun) -> tuple[str, LoraConfig]:
        """Base model and LoRA, from the request or from the checkpoint it names."""
        optimizer = (wanted.optimizer_config or {}).get("type", "adamw")
        if optimizer != "adamw":
            raise Unsupported(f"optimizer_config.type={optimizer!r}: must be adamw")
        if wanted.source_path is not None:
            path = TinkerPath.parse(wanted.source_path)
            if path.kind != "weights":
                raise InvalidField(
                    f"path={wanted.source_path!r}: only a training checkpoint (weights) "
                    "can be trained on"
                )
            source = await self.checkpoint(tenant, path)
            self._check_model(source.base_model)
            if wanted.base_model not in (None, source.base_model):
                raise InvalidField(
                    f"base_model={wanted.base_model!r}: the checkpoint is of {source.base_model!r}"
                )
            return source.base_model, source.lora
        if wanted.base_model is None:
            raise InvalidField("base_model is required")
        self._check_model(wanted.base_model)
        asked = wanted.lora_config
        if asked.rank > self._config.limits.max_rank:
            raise InvalidField(
                f"lora_config.rank={asked.rank} must be 1..{self._config.limits.max_rank}"
            )
        if not (asked.train_attn or asked.train_mlp or asked.train_unembed):
            raise InvalidField(
                "lora_config: one of train_attn, train_mlp, train_unembed must be on"
            )
        # Drawn here, once: every replay of the run starts from the same matrices.
        seed = asked.seed if asked.seed is not None else secrets.randbelow(2**31)
        return wanted.base_model, LoraConfig(**{**asked.model_dump(), "seed": seed})

    async def run(self, tenant: str, run_id: str) -> RunRecord:
        _check_id(_RUN_ID, run_id, "training_run_id")
        key = keys.run_record(tenant, run_id)
        return await self._read(RunRecord, key, f"training_run_id={run_id!r}")

    async def describe_run(self, tenant: str, run_id: str) -> dict[str, Any]:
        """The TrainingRun object of wire protocol 8.1."""
        row = (await self.run(tenant, run_id)).row()
        (described,) = await self._listing(tenant).with_activity([row], self._clock())
        return described

    async def list_runs(self, tenant: str, *, offset: int, limit: int) -> dict[str, Any]:
        page = await self._listing(tenant).run_page(offset=offset, limit=limit, now=self._clock())
        return {"training_runs": page.rows, "cursor": _cursor(offset, limit, page.total_count)}

    # --- checkpoints ------------------------------------------------------------------------------

    async def list_checkpoints(
        self, tenant: str, run_id: str | None = None, *, offset: int, limit: int
    ) -> dict[str, Any]:
        """Checkpoint objects of one run or of all, latest first, without what has expired."""
        if run_id is not None:
            await self.run(tenant, run_id)
        what = "checkpoints" if run_id is None else f"checkpoints:{run_id}"
        page = await self._listing(tenant).checkpoint_page(
            what, offset=offset, limit=limit, now=self._clock()
        )
        return {"checkpoints": page.rows, "cursor": _cursor(offset, limit, page.total_count)}

    async def checkpoint(self, tenant: str, path: TinkerPath) -> CheckpointRecord:
        """What a path stands for; NotFound also once it has expired."""
        key = keys.name_record(tenant, path.run_id, path.kind, path.name)
        record = await self._read(CheckpointRecord, key, str(path))
        if record.expires_at is not None and record.expires_at <= self._clock():
            raise NotFound(str(path))
        return record

    async def weights_info(self, tenant: str, path: TinkerPath) -> dict[str, Any]:
        """What a client must create to load this checkpoint (wire protocol 2.5)."""
        record = await self.checkpoint(tenant, path)
        return {
            "base_model": record.base_model,
            "is_lora": True,
            "lora_rank": record.lora.rank,
            **record.lora.model_dump(include={"train_unembed", "train_mlp", "train_attn"}),
        }

    async def delete_checkpoint(self, tenant: str, path: TinkerPath) -> None:
        """Take the name away; a sweep removes the files once nothing needs them."""
        try:
            await self.checkpoint(tenant, path)
            await self._blobs.delete(keys.name_record(tenant, path.run_id, path.kind, path.name))
        finally:
            # Also when the record is gone: an earlier try may have died before this line.
            await self._listing(tenant).remove_checkpoint(path.run_id, path.kind, path.name)

    # --- samplers ---------------------------------------------------------------------------------

    async def create_sampler(self, tenant: str, wanted: CreateSampler) -> SamplerRecord:
        """A sampling session of a base model or a checkpoint; a repeat returns the first."""
        _check_id(_SESSION_ID, wanted.session_id, "session_id")
        sampler_id = f"{wanted.session_id}:sample:{wanted.sampling_session_seq_id}"
        try:
            return await save_sampler(
                self._blobs, self._redis, await self.sampler(tenant, sampler_id)
            )
        except NotFound:
            await self._active_session(tenant, wanted.session_id)
        base_model, weights = await self._what_to_sample(tenant, wanted)
        record = SamplerRecord(
            sampling_session_id=sampler_id,
            tenant=tenant,
            session_id=wanted.session_id,
            base_model=base_model,
            model_path=wanted.model_path,
            weights=weights,
            created_at=self._clock(),
        )
        return await save_sampler(self._blobs, self._redis, record)

    async def _what_to_sample(self, tenant: str, wanted: CreateSampler) -> tuple[str, str]:
        """(base model, object key of the manifest or empty)."""
        if wanted.model_path is not None:
            path = TinkerPath.parse(wanted.model_path, "model_path")
            if path.kind == "external_weights":
                raise InvalidField(
                    f"model_path={wanted.model_path!r}: must be weights or sampler_weights"
                )
            source = await self.checkpoint(tenant, path)
            self._check_model(source.base_model)
            return source.base_model, source.manifest_key
        if wanted.base_model is None:
            raise InvalidField("base_model or model_path is required")
        self._check_model(wanted.base_model)
        return wanted.base_model, ""

    async def sampler(self, tenant: str, sampler_id: str) -> SamplerRecord:
        _check_id(_SAMPLER_ID, sampler_id, "sampling_session_id")
        key = keys.sampler_record(tenant, sampler_id)
        return await self._read(SamplerRecord, key, f"sampling_session_id={sampler_id!r}")

    # --- plumbing ---------------------------------------------------------------------------------

    def _listing(self, tenant: str) -> Listing:
        return Listing(self._redis, tenant)

    def _check_model(self, base_model: str) -> None:
        if base_model not in self._config.model_names:
            raise InvalidField(
                f"base_model={base_model!r}: this server has {self._config.model_names}"
            )

    def _derived_id(self, tenant: str, idempotency_key: str) -> str:
        text = f"session\0{tenant}\0{idempotency_key}"
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()[:32]

    async def _read(self, kind: type[R], key: str, what: str) -> R:
        try:
            return kind.from_bytes(await self._blobs.get(key))
        except BlobMissing:
            raise NotFound(what) from None

    async def _create(self, key: str, record: R) -> R:
        """The record, or the one that was there first."""
        if await self._blobs.put_if_absent(key, record.to_bytes()):
            return record
        return type(record).from_bytes(await self._blobs.get(key))


def _check_id(rule: re.Pattern[str], value: str, field: str) -> None:
    """NotFound unless the value could be an id: nothing else becomes part of an object key."""
    if not rule.fullmatch(value):
        raise NotFound(f"{field}={value[:100]!r}")


def _cursor(offset: int, limit: int, total_count: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total_count}
