"""A run's whole state in the object store: `snap/{seq}-{epoch}/`, its manifest last.

A snapshot that has no manifest, or whose bytes are not what the manifest says, does not count.
"""

import asyncio
import hashlib
import logging
from typing import Any

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs, outlasting_outage
from luthier_core.checkpoints import ManifestFile
from luthier_core.config import TrainerConfig
from luthier_core.failpoints import failpoint
from luthier_core.ops import Kind
from luthier_core.owner import FoldState, Step
from luthier_core.protocol import SnapshotRef
from luthier_core.records import Record, RunRecord
from luthier_trainer.engine_client import EngineClient
from luthier_trainer.engine_host import STATE_FILE
from luthier_trainer.execution import RunContext
from luthier_trainer.snapshots import Spent

log = logging.getLogger(__name__)


class SnapshotManifest(Record):
    """`snap/{seq}-{epoch}/manifest.json`."""

    run_id: str
    seq: int
    epoch: int
    missing: tuple[int, ...]
    """FoldState.missing"""
    digest: str
    """FoldState.digest"""
    fingerprint: dict[str, str]
    """Where it was computed: replay elsewhere may round otherwise (reliability 1.4)."""
    files: dict[str, ManifestFile]


class StoredSnapshots:
    """Snapshots of the runs of one engine (see snapshots.Snapshots)."""

    def __init__(self, engine: EngineClient, blobs: Blobs, config: TrainerConfig) -> None:
        self._engine = engine
        self._blobs = blobs
        self._config = config

    def due(self, spent: Spent, step: Step) -> bool:
        """At an optimizer step once replay would cost enough; always after a load.

        A run that only ever sums a gradient is copied in the midst of it, at twice the cost.
        """
        if step.op.kind is Kind.LOAD_WEIGHTS:
            return True
        limits = self._config
        cost = max(
            spent.num_ops / limits.snapshot_max_ops,
            spent.execute_s / limits.snapshot_execute_s,
            spent.payload_bytes / limits.snapshot_payload_bytes,
            spent.since_s / limits.snapshot_interval_s,
        )
        return cost >= (1 if step.op.kind is Kind.OPTIM_STEP else 2)

    async def copy(self, run_id: str) -> str:
        return await self._engine.copy_state(run_id)

    async def put(self, run: RunContext, ref: SnapshotRef, copy: Any, state: FoldState) -> None:
        data = (await self._engine.fetch(copy))[STATE_FILE]
        prefix = keys.snapshot_prefix(run.tenant, run.run_id, ref.seq, ref.epoch)
        digest = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        file = ManifestFile(key=f"{prefix}{STATE_FILE}", num_bytes=len(data), sha256=digest)
        await outlasting_outage(lambda: self._blobs.put(file.key, data))
        manifest = SnapshotManifest(
            run_id=run.run_id,
            seq=ref.seq,
            epoch=ref.epoch,
            missing=state.missing,
            digest=state.digest,
            fingerprint=self._engine.fingerprint,
            files={STATE_FILE: file},
        )
        await failpoint("sn.manifest")
        await outlasting_outage(lambda: self._blobs.put(_manifest_key(prefix), manifest.to_bytes()))

    async def restore(self, run: RunContext, ref: SnapshotRef) -> FoldState | None:
        try:
            manifest, data = await self._read(run, ref)
        except (BlobMissing, ValueError) as error:
            log.error("snapshot %s of %s is damaged: %s", ref, run.run_id, error)
            return None
        record_key = keys.run_record(run.tenant, run.run_id)
        record = await outlasting_outage(lambda: self._blobs.get(record_key))
        run.record = RunRecord.from_bytes(record)  # op 0, which brings it along, is not replayed
        try:
            await self._engine.take_state(run.run_id, run.record.lora, data)
        except ValueError as error:
            log.error("snapshot %s of %s is damaged: %s", ref, run.run_id, error)
            return None
        return FoldState(manifest.missing, manifest.digest)

    async def delete(self, run: RunContext, ref: SnapshotRef) -> None:
        prefix = keys.snapshot_prefix(run.tenant, run.run_id, ref.seq, ref.epoch)
        for key in (_manifest_key(prefix), f"{prefix}{STATE_FILE}"):
            await self._blobs.delete(key)

    async def _read(self, run: RunContext, ref: SnapshotRef) -> tuple[SnapshotManifest, bytes]:
        """BlobMissing or ValueError if it is not whole."""
        prefix = keys.snapshot_prefix(run.tenant, run.run_id, ref.seq, ref.epoch)
        manifest = SnapshotManifest.from_bytes(await self._blobs.get(_manifest_key(prefix)))
        file = manifest.files[STATE_FILE]
        data = await self._blobs.get(file.key)
        if await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest()) != file.sha256:
            raise ValueError(f"{STATE_FILE} has another sha256")
        return manifest, data


def _manifest_key(prefix: str) -> str:
    return f"{prefix}manifest.json"
