"""Training runs and sampling sessions.

Every method names the tenant it works for. What is foreign and what is absent raise one NotFound.
"""

import secrets
from collections.abc import Callable
from datetime import datetime
from typing import Any

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.checkpoints import TinkerPath, save_sampler
from luthier_core.config import Config
from luthier_core.errors import BadRequest, InvalidField, NotFound, TooManyRequests, Unsupported
from luthier_core.records import (
    CheckpointRecord,
    LoraConfig,
    RecoveryRecord,
    RunRecord,
    SamplerRecord,
    SessionRecord,
    UploadRecord,
)
from luthier_registry.checkpoints import Checkpoints
from luthier_registry.record_store import (
    RUN_ID,
    SAMPLER_ID,
    SESSION_ID,
    RecordStore,
    check_id,
    cursor,
)
from luthier_registry.requests import CopyWeights, CreateRun, CreateSampler
from luthier_registry.sessions import Sessions

MAX_RECOVERIES = 100
"""That a run's description lists."""


class Store(RecordStore):
    """Runs and sampling sessions of one deployment."""

    def __init__(
        self,
        blobs: Blobs,
        client: redis.Redis,
        sessions: Sessions,
        checkpoints: Checkpoints,
        config: Config,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        super().__init__(blobs, client, clock=clock)
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._config = config

    async def check(self) -> None:
        """Raises what Redis or the object store raise when they are away."""
        await self._redis.execute_command("PING")  # type: ignore[no-untyped-call]
        await self._blobs.head(keys.GENERATION_OBJECT)

    # --- training runs ----------------------------------------------------------------------------

    async def create_run(self, tenant: str, wanted: CreateRun) -> RunRecord:
        """The facts of a run, before its op 0 is admitted; a repeat returns the first record."""
        check_id(SESSION_ID, wanted.session_id, "session_id")
        run_id = f"{wanted.session_id}:train:{wanted.model_seq_id}"
        key = keys.run_record(tenant, run_id)
        try:
            record = RunRecord.from_bytes(await self._blobs.get(key))
        except BlobMissing:
            await self._sessions.get_active(tenant, wanted.session_id)
            if wanted.refusal is not None:
                raise TooManyRequests(wanted.refusal) from None
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
        check_id(RUN_ID, run_id, "training_run_id")
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
        return {**described, "recovered": await self._recoveries(tenant, run_id)}

    async def _recoveries(self, tenant: str, run_id: str) -> list[dict[str, Any]]:
        """How the run came back each time its trainer had died, latest first."""
        found = [info.key async for info in self._blobs.list(keys.run_recoveries(tenant, run_id))]
        latest = sorted(found, reverse=True)[:MAX_RECOVERIES]
        return [RecoveryRecord.from_bytes(await self._blobs.get(key)).to_dict() for key in latest]

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
        check_id(RUN_ID, run_id, "training_run_id")
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
            await self._sessions.get(tenant, wanted.session_id)
            return f"{wanted.session_id}:train:{wanted.model_seq_id}"
        session_id = self._sessions.new_id("copy", tenant, wanted.idempotency_key)
        return f"{session_id}:train:0"

    async def create_copy_run(
        self,
        tenant: str,
        run_id: str,
        source: CheckpointRecord,
        wanted: CopyWeights,
        *,
        key_id: str,
    ) -> RunRecord:
        """The run that holds the copy, in its session; a repeat returns the first record."""
        if wanted.session_id is None:
            await self._sessions.put(
                SessionRecord(
                    session_id=run_id.partition(":")[0],
                    tenant=tenant,
                    created_at=self._clock(),
                    project_id=wanted.destination_project_id,
                    key_id=key_id,
                    status="finished",
                    finish_reason="success",
                    finish_detail=f"a copy of {wanted.source_path}",
                )
            )
        return await self._create_holder(
            tenant, run_id, source.base_model, source.lora, source_path=wanted.source_path
        )

    async def create_upload_run(self, upload: UploadRecord, lora: LoraConfig) -> RunRecord:
        """The run that holds an upload, in a session of its own; a repeat returns the first."""
        await self._sessions.put(
            SessionRecord(
                session_id=upload.upload_id,
                tenant=upload.tenant,
                created_at=upload.created_at,
                project_id=upload.project_id,
                key_id=upload.key_id,
                status="finished",
                finish_reason="success",
                finish_detail="an adapter that was uploaded",
            )
        )
        return await self._create_holder(upload.tenant, upload.run_id, upload.base_model, lora)

    async def _create_holder(
        self,
        tenant: str,
        run_id: str,
        base_model: str,
        lora: LoraConfig,
        *,
        source_path: str | None = None,
    ) -> RunRecord:
        """A run that has checkpoints and is never trained; a repeat returns the first record."""
        run = RunRecord(
            run_id=run_id,
            tenant=tenant,
            session_id=run_id.partition(":")[0],
            base_model=base_model,
            lora=lora,
            optimizer_config={"type": "adamw"},
            created_at=self._clock(),
            source_path=source_path,
            trainable=False,
        )
        run = await self._create(keys.run_record(tenant, run_id), run)
        await self._listing(tenant).add_run(run)
        return run

    # --- samplers ---------------------------------------------------------------------------------

    async def create_sampler(self, tenant: str, wanted: CreateSampler) -> SamplerRecord:
        """A sampling session of a base model or a checkpoint; a repeat returns the first."""
        check_id(SESSION_ID, wanted.session_id, "session_id")
        sampler_id = f"{wanted.session_id}:sample:{wanted.sampling_session_seq_id}"
        try:
            return await save_sampler(
                self._blobs, self._redis, await self.sampler(tenant, sampler_id)
            )
        except NotFound:
            await self._sessions.get_active(tenant, wanted.session_id)
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
            if wanted.base_model not in (None, source.base_model):
                raise InvalidField(
                    f"base_model={wanted.base_model!r}: model_path has weights of "
                    f"{source.base_model!r}; leave base_model out"
                )
            return source.base_model, source.manifest_key
        if wanted.base_model is None:
            raise InvalidField("base_model or model_path is required")
        self._check_model(wanted.base_model)
        return wanted.base_model, ""

    async def sampler(self, tenant: str, sampler_id: str) -> SamplerRecord:
        check_id(SAMPLER_ID, sampler_id, "sampling_session_id")
        key = keys.sampler_record(tenant, sampler_id)
        return await self._read(SamplerRecord, key, f"sampling_session_id={sampler_id!r}")

    def _check_model(self, base_model: str) -> None:
        if base_model not in self._config.model_names:
            raise InvalidField(
                f"base_model={base_model!r}: this server has {self._config.model_names}"
            )
