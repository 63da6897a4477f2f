"""Sessions, runs, samplers and keys: records in the object store, their lists in Redis.

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
    as_strings,
)
from luthier_registry.checkpoints import Checkpoints
from luthier_registry.requests import (
    CopyWeights,
    CreateRun,
    CreateSampler,
    CreateSession,
    SearchSessions,
)
from luthier_registry.search import search_sessions

R = TypeVar("R", bound=Record)

_SESSION_ID = re.compile(r"[0-9a-f]{32}")
_RUN_ID = re.compile(r"[0-9a-f]{32}:train:\d{1,10}")
_SAMPLER_ID = re.compile(r"[0-9a-f]{32}:sample:\d{1,10}")
_KEY_HMAC = re.compile(r"[0-9a-f]{64}")


class Store:
    """Sessions, runs, samplers and API keys of one deployment. Holds no state."""

    def __init__(
        self,
        blobs: Blobs,
        client: redis.Redis,
        checkpoints: Checkpoints,
        config: Config,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._blobs = blobs
        self._redis = client
        self._checkpoints = checkpoints
        self._config = config
        self._secret = config.secret()
        self._clock = clock

    async def check(self) -> None:
        """Raises what Redis or the object store raise when they are away."""
        await self._redis.execute_command("PING")  # type: ignore[no-untyped-call]
        await self._blobs.head(keys.GENERATION)

    async def api_key(self, key_hmac: str) -> ApiKeyRecord:
        """What the key may do; NotFound also once it is revoked."""
        _check_id(_KEY_HMAC, key_hmac, "key")
        record = await self._read(ApiKeyRecord, keys.api_key_record(key_hmac), "key")
        if record.revoked_at is not None:
            raise NotFound("key")
        return record

    async def revoke_key(self, key_hmac: str) -> ApiKeyRecord:
        """End a key for good."""
        await self.api_key(key_hmac)
        ending = {"revoked_at": self._clock()}
        return await self._update(
            ApiKeyRecord,
            keys.api_key_record(key_hmac),
            "key",
            lambda now: now.model_copy(update=ending) if now.revoked_at is None else now,
        )

    # --- sessions ---------------------------------------------------------------------------------

    async def create_session(self, tenant: str, wanted: CreateSession) -> SessionRecord:
        """A new session; under one idempotency key always the same."""
        session_id = secrets.token_hex(16)
        if wanted.idempotency_key is not None:
            session_id = self._derived_id("session", tenant, wanted.idempotency_key)
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
            "user_metadata": as_strings(record.user_metadata),
            "training_run_ids": await listing.ids(f"runs:{session_id}"),
            "sampler_ids": await listing.ids(f"samplers:{session_id}"),
        }

    async def list_sessions(self, tenant: str, *, offset: int, limit: int) -> dict[str, Any]:
        ids, total = await self._listing(tenant).id_page("sessions", offset=offset, limit=limit)
        return {"sessions": ids, "cursor": cursor(offset, limit, total)}

    async def search(self, tenant: str, wanted: SearchSessions) -> dict[str, Any]:
        """sessions/search of the Tinker API."""
        return await search_sessions(self._listing(tenant), tenant, wanted)

    async def heartbeat(self, tenant: str, session_id: str) -> SessionRecord:
        """Note that the session's client is alive."""
        record = await self.session(tenant, session_id)
        await self._note_status(record)
        return record

    async def finish_session(
        self, tenant: str, session_id: str, reason: FinishReason, detail: str | None
    ) -> SessionRecord:
        """End the session. The first reason wins; a repeat is no error."""
        ending = {"status": "finished", "finish_reason": reason, "finish_detail": detail}
        record = await self._change_session(
            tenant,
            session_id,
            lambda now: now.model_copy(update=ending) if now.status == "active" else now,
        )
        await self._note_status(record)
        return record

    async def set_project(self, tenant: str, session_id: str, project_id: str) -> SessionRecord:
        """Move the session with its runs into a project."""
        return await self._change_session(
            tenant, session_id, lambda now: now.model_copy(update={"project_id": project_id})
        )

    async def _change_session(
        self, tenant: str, session_id: str, change: Callable[[SessionRecord], SessionRecord]
    ) -> SessionRecord:
        _check_id(_SESSION_ID, session_id, "session_id")
        key = keys.session_record(tenant, session_id)
        record = await self._update(SessionRecord, key, f"session_id={session_id!r}", change)
        await self._listing(tenant).add_session(record)
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
        if not record.trainable:
            raise BadRequest(f"model_seq_id={wanted.model_seq_id} of this session holds a copy")
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
            source = await self._checkpoints.read(tenant, path, access_tenant=wanted.access_tenant)
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

    async def describe_run(
        self, tenant: str, run_id: str, *, accessible: bool = False
    ) -> dict[str, Any]:
        """The TrainingRun object of wire protocol 8.1.

        With `accessible` also of another tenant, as far as its published checkpoints tell.
        """
        try:
            row = (await self.run(tenant, run_id)).row()
        except NotFound:
            if accessible and (published := await self._published_run(run_id)):
                return published
            raise
        (described,) = await self._listing(tenant).with_activity([row], self._clock())
        return described

    async def list_runs(
        self, tenant: str, *, offset: int, limit: int, project_id: str | None = None
    ) -> dict[str, Any]:
        page = await self._listing(tenant).run_page(
            offset=offset, limit=limit, now=self._clock(), project_id=project_id
        )
        return {
            "training_runs": page.rows,
            "cursor": cursor(offset, limit, page.total_count),
        }

    async def run_checkpoints(self, tenant: str, run_id: str) -> list[dict[str, Any]]:
        """Checkpoint objects of a run, latest first; of another tenant's run the published ones."""
        try:
            await self.run(tenant, run_id)
            return await self._checkpoints.rows(tenant, run_id, public_only=False)
        except NotFound:
            if rows := await self._published_rows(run_id):
                return rows
            raise

    async def _published_run(self, run_id: str) -> dict[str, Any] | None:
        """A run with nothing of it but what its published checkpoints tell."""
        rows = await self._published_rows(run_id)
        publisher = await self._checkpoints.publisher(run_id)
        if publisher is None or not rows:
            return None

        def latest(kind: str) -> dict[str, Any] | None:
            return next((row for row in rows if row["checkpoint_type"] == kind), None)

        return {
            **(await self.run(publisher, run_id)).row(),
            "user_metadata": None,
            "last_request_time": rows[0]["time"],
            "last_checkpoint": latest("training"),
            "last_sampler_checkpoint": latest("sampler"),
        }

    async def _published_rows(self, run_id: str) -> list[dict[str, Any]]:
        _check_id(_RUN_ID, run_id, "training_run_id")
        publisher = await self._checkpoints.publisher(run_id)
        if publisher is None:
            return []
        return await self._checkpoints.rows(publisher, run_id, public_only=True)

    # --- copies of checkpoints --------------------------------------------------------------------

    async def run_id_for_copy(self, tenant: str, wanted: CopyWeights) -> str:
        """The id of the run that is to hold a copy; its session is there."""
        if (wanted.session_id is None) == (wanted.destination_project_id is None):
            raise InvalidField("give destination_project_id, or else session_id and model_seq_id")
        if wanted.session_id is not None:
            if wanted.model_seq_id is None:
                raise InvalidField("model_seq_id is required beside session_id")
            await self.session(tenant, wanted.session_id)
            return f"{wanted.session_id}:train:{wanted.model_seq_id}"
        session_id = secrets.token_hex(16)
        if wanted.idempotency_key is not None:
            session_id = self._derived_id("copy", tenant, wanted.idempotency_key)
        return f"{session_id}:train:0"

    async def create_copy_run(
        self, tenant: str, run_id: str, source: CheckpointRecord, wanted: CopyWeights
    ) -> RunRecord:
        """The run that holds the copy, in its session; a repeat returns the first record."""
        session_id, now = run_id.partition(":")[0], self._clock()
        listing = self._listing(tenant)
        if wanted.session_id is None:
            session = SessionRecord(
                session_id=session_id,
                tenant=tenant,
                created_at=now,
                project_id=wanted.destination_project_id,
                status="finished",
                finish_reason="success",
                finish_detail=f"a copy of {wanted.source_path}",
            )
            session = await self._create(keys.session_record(tenant, session_id), session)
            await listing.add_session(session)
            await self._note_status(session)
        run = RunRecord(
            run_id=run_id,
            tenant=tenant,
            session_id=session_id,
            base_model=source.base_model,
            lora=source.lora,
            optimizer_config={"type": "adamw"},
            created_at=now,
            source_path=wanted.source_path,
            trainable=False,
        )
        run = await self._create(keys.run_record(tenant, run_id), run)
        await listing.add_run(run)
        return run

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
            source = await self._checkpoints.read(tenant, path)
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

    def _derived_id(self, use: str, tenant: str, idempotency_key: str) -> str:
        text = f"{use}\0{tenant}\0{idempotency_key}"
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()[:32]

    async def _read(self, kind: type[R], key: str, what: str) -> R:
        try:
            return kind.from_bytes(await self._blobs.get(key))
        except BlobMissing:
            raise NotFound(what) from None

    async def _update(self, kind: type[R], key: str, what: str, change: Callable[[R], R]) -> R:
        """The record after `change`, which is not written if it changes nothing."""
        while True:
            try:
                data, etag = await self._blobs.get_with_etag(key)
            except BlobMissing:
                raise NotFound(what) from None
            record = kind.from_bytes(data)
            changed = change(record)
            if changed == record:
                return record
            if await self._blobs.put_if_match(key, changed.to_bytes(), etag) is not None:
                return changed  # else somebody else changed it: look again

    async def _create(self, key: str, record: R) -> R:
        """The record, or the one that was there first."""
        if await self._blobs.put_if_absent(key, record.to_bytes()):
            return record
        return type(record).from_bytes(await self._blobs.get(key))


def _check_id(rule: re.Pattern[str], value: str, field: str) -> None:
    """NotFound unless the value could be an id: nothing else becomes part of an object key."""
    if not rule.fullmatch(value):
        raise NotFound(f"{field}={value[:100]!r}")


def cursor(offset: int, limit: int, total_count: int) -> dict[str, int]:
    """The Cursor object of wire protocol 8.1."""
    return {"offset": offset, "limit": limit, "total_count": total_count}
