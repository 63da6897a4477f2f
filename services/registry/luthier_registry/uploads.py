"""Adapters that were made elsewhere: announced, stored by the gateway, adopted as checkpoints.

The gateway checks an upload's bytes while they pass, so that nothing unchecked is ever stored. Its
files lie where a save of op 0 would have put them; as with a save, the manifest and then the names
make a checkpoint of them, and what never gets that far is swept.
"""

import hashlib
import json
from collections.abc import Callable
from datetime import datetime

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import Blobs
from luthier_core.checkpoints import (
    Manifest,
    ManifestFile,
    TinkerPath,
    check_name,
    expiry,
    read_manifest,
)
from luthier_core.errors import BadRequest
from luthier_core.peft_files import CONFIG_FILE, WEIGHTS_FILE
from luthier_core.records import CheckpointRecord, LoraConfig, UploadRecord
from luthier_registry.lists import Lists
from luthier_registry.record_store import SESSION_ID, RecordStore, check_id
from luthier_registry.requests import AdoptUpload, CreateUpload
from luthier_registry.sessions import Sessions, within_project
from luthier_registry.store import Store

_SEQ = 0
"""The run of an upload has one checkpoint, and no op ever."""
KINDS = ("weights", "sampler_weights")
"""One name of each: to train on, and to sample from. They share their files."""


class Uploads(RecordStore):
    """Uploads of all tenants."""

    def __init__(
        self,
        store: Store,
        sessions: Sessions,
        blobs: Blobs,
        client: redis.Redis,
        lists: Lists,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        super().__init__(blobs, client, clock=clock)
        self._store = store
        self._sessions = sessions
        self._lists = lists

    async def create(
        self, tenant: str, wanted: CreateUpload, *, key_id: str, key_project: str | None
    ) -> UploadRecord:
        """What is about to be sent; under one idempotency key always the same.

        BadRequest if that key stands for another upload.
        """
        check_name(wanted.name)
        now = self._clock()
        upload_id = self._sessions.new_id("upload", tenant, wanted.idempotency_key)
        record = UploadRecord(
            upload_id=upload_id,
            tenant=tenant,
            created_at=now,
            expires_at=expiry(now, wanted.ttl_seconds),
            key_id=key_id,
            project_id=within_project(key_project, wanted.project_id),
            **wanted.model_dump(exclude={"idempotency_key", "ttl_seconds", "project_id"}),
        )
        stored = await self._create(keys.upload_record(tenant, upload_id), record)
        if (stored.sha256, stored.name) != (record.sha256, record.name):
            raise BadRequest("X-Idempotency-Key: it was used for another upload")
        return stored

    async def get(self, tenant: str, upload_id: str) -> UploadRecord:
        check_id(SESSION_ID, upload_id, "upload_id")
        key = keys.upload_record(tenant, upload_id)
        return await self._read(UploadRecord, key, f"upload_id={upload_id!r}")

    async def paths(self, upload: UploadRecord) -> list[str]:
        """The tinker:// paths of its checkpoints; none until all of them are there."""
        for path in (paths := _paths(upload)):
            if await self._blobs.head(_name(upload.tenant, path)) is None:
                return []
        return [str(path) for path in paths]

    async def adopt(self, tenant: str, upload_id: str, wanted: AdoptUpload) -> list[str]:
        """Make checkpoints of its files, whose weights the gateway has checked and stored.

        A repeat changes nothing. BadRequest if the weights have not come.
        """
        upload = await self.get(tenant, upload_id)
        manifest = await self._complete(upload)
        rank = int(upload.adapter_config["r"])
        lora = LoraConfig(rank=rank, seed=0, **wanted.model_dump())
        run = await self._store.create_upload_run(upload, lora)
        for path in _paths(upload):
            record = CheckpointRecord(
                tenant=tenant,
                run_id=run.run_id,
                kind=path.kind,
                name=path.name,
                seq=_SEQ,
                manifest_key=keys.checkpoint_manifest(tenant, run.run_id, _SEQ),
                manifest_digest=manifest.digest(),
                size_bytes=manifest.num_bytes,
                created_at=upload.created_at,
                expires_at=upload.expires_at,
                user_metadata=upload.user_metadata,
                base_model=run.base_model,
                lora=run.lora,
            )
            async with self._lists.changing(tenant, path, record.manifest_digest):
                await self._blobs.put_if_absent(_name(tenant, path), record.to_bytes())
        return [str(path) for path in _paths(upload)]

    async def _complete(self, upload: UploadRecord) -> Manifest:
        """The manifest of its two files, both of which are there."""
        prefix = keys.checkpoint_prefix(upload.tenant, upload.run_id, _SEQ, 0)
        if await self._blobs.size(f"{prefix}{WEIGHTS_FILE}") != upload.num_bytes:
            raise BadRequest(f"upload_id={upload.upload_id}: its weights have not come")
        config = json.dumps(upload.adapter_config, indent=2).encode()
        await self._blobs.put(f"{prefix}{CONFIG_FILE}", config)
        sizes = {
            CONFIG_FILE: (len(config), hashlib.sha256(config).hexdigest()),
            WEIGHTS_FILE: (upload.num_bytes, upload.sha256),
        }
        manifest = Manifest(
            run_id=upload.run_id,
            seq=_SEQ,
            epoch=0,
            kind="weights",
            files={
                name: ManifestFile(key=f"{prefix}{name}", num_bytes=num_bytes, sha256=sha256)
                for name, (num_bytes, sha256) in sizes.items()
            },
        )
        key = keys.checkpoint_manifest(upload.tenant, upload.run_id, _SEQ)
        if not await self._blobs.put_if_absent(key, manifest.to_bytes()):
            return await read_manifest(self._blobs, key)
        return manifest


def _paths(upload: UploadRecord) -> list[TinkerPath]:
    return [TinkerPath(upload.run_id, kind, upload.name) for kind in KINDS]


def _name(tenant: str, path: TinkerPath) -> str:
    return keys.name_record(tenant, path.run_id, path.kind, path.name)
