"""Checkpoints: tinker:// paths, the manifest, and the order of writes that makes a save atomic.

A save crashes into one of two outcomes: the whole checkpoint, or none (reliability 1.3, G8). Files
lie under the epoch of the worker that wrote them; the first complete manifest of (run, seq) decides
which files are that op's checkpoint; the name record makes it visible.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self

import redis.asyncio as redis
from pydantic import BaseModel, ConfigDict

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.errors import BadRequest, CheckpointDamaged, InvalidField
from luthier_core.failpoints import failpoint
from luthier_core.listing import Listing
from luthier_core.records import CheckpointKind, CheckpointRecord, Record, RunRecord, SamplerRecord

log = logging.getLogger(__name__)

PATH_KINDS = ("weights", "sampler_weights", "external_weights")
MAX_TTL_S = 10 * 366 * 24 * 3600

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,127}")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9:._=+-]{0,199}")


@dataclass(frozen=True, slots=True)
class TinkerPath:
    """tinker://{run_id}/{kind}/{name}: exactly three parts."""

    run_id: str
    kind: str
    name: str

    @classmethod
    def parse(cls, path: str, field: str = "path") -> Self:
        """The parts of a path; InvalidField that names `field` and the rule."""
        scheme, _, rest = path.partition("://")
        parts = rest.split("/")
        if scheme != "tinker" or len(parts) != 3 or parts[1] not in PATH_KINDS:
            raise InvalidField(
                f"{field}={path[:300]!r} must be tinker://<training run id>/<kind>/<name>, "
                f"kind one of {', '.join(PATH_KINDS)}"
            )
        if not _RUN_ID.fullmatch(parts[0]):
            raise InvalidField(f"{field}={path[:300]!r} has no valid training run id")
        check_name(parts[2], field)
        return cls(*parts)

    def __str__(self) -> str:
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"


def check_name(name: str, field: str = "name") -> str:
    """The name of a checkpoint; InvalidField that names `field` and the rule."""
    if not _NAME.fullmatch(name):
        raise InvalidField(
            f"{field}={name[:200]!r}: a checkpoint's name has 1 to 128 characters out of "
            "A-Z a-z 0-9 . _ = + - and begins with a letter or digit"
        )
    return name


class ManifestFile(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: str
    num_bytes: int
    sha256: str


class Manifest(Record):
    """`runs/{run}/man/{seq}`: which files are op seq's checkpoint. Immutable."""

    run_id: str
    seq: int
    epoch: int
    """Of the worker that completed the files."""
    kind: CheckpointKind
    files: dict[str, ManifestFile]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files.values())

    def digest(self) -> str:
        """sha256 of its bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


async def save_checkpoint(
    blobs: Blobs,
    client: redis.Redis,
    *,
    run: RunRecord,
    kind: CheckpointKind,
    name: str,
    seq: int,
    epoch: int,
    files: Mapping[str, bytes],
    overwrite: bool = False,
    ttl_seconds: int | None = None,
    user_metadata: dict[str, str] | None = None,
    now: datetime,
) -> CheckpointRecord:
    """Store `files` as what op `seq` saved, give it its name and list it; then commit the op.

    May be repeated for the same op by any later epoch, after a crash at any point. Kind `ephemeral`
    is not listed. InvalidField on a bad name or ttl_seconds; BadRequest if another op has saved the
    name and `overwrite` is off; Unavailable and Redis errors mean: again.
    """
    check_name(name)
    expires_at = expiry(now, ttl_seconds)
    manifest, digest = await _store_files(blobs, run, kind, seq, epoch, files)
    await failpoint("sv.name", kind)
    record = await _take_name(
        blobs,
        CheckpointRecord(
            tenant=run.tenant,
            run_id=run.run_id,
            kind=kind,
            name=name,
            seq=seq,
            manifest_key=keys.checkpoint_manifest(run.tenant, run.run_id, seq),
            manifest_digest=digest,
            size_bytes=manifest.num_bytes,
            created_at=now,
            expires_at=expires_at,
            user_metadata=user_metadata,
            base_model=run.base_model,
            lora=run.lora,
        ),
        overwrite=overwrite,
    )
    await failpoint("sv.verify", kind)
    await _check_stored(blobs, manifest)
    if kind != "ephemeral":
        await Listing(client, run.tenant).add_checkpoint(record)
    return record


def expiry(now: datetime, ttl_seconds: int | None) -> datetime | None:
    """When what is saved now expires; None for never."""
    if ttl_seconds is None:
        return None
    if not 1 <= ttl_seconds <= MAX_TTL_S:
        raise InvalidField(f"ttl_seconds={ttl_seconds} must be null or 1..{MAX_TTL_S}")
    return now + timedelta(seconds=ttl_seconds)


async def save_sampler(blobs: Blobs, client: redis.Redis, record: SamplerRecord) -> SamplerRecord:
    """Create a sampling session, listed under its session; a repeat returns the first record."""
    key = keys.sampler_record(record.tenant, record.sampling_session_id)
    if not await blobs.put_if_absent(key, record.to_bytes()):
        record = SamplerRecord.from_bytes(await blobs.get(key))
    await Listing(client, record.tenant).add_sampler(record)
    return record


async def read_manifest(blobs: Blobs, manifest_key: str) -> Manifest:
    """CheckpointDamaged if it is gone."""
    try:
        return Manifest.from_bytes(await blobs.get(manifest_key))
    except BlobMissing:
        raise CheckpointDamaged(f"no manifest {manifest_key}") from None


async def read_files(blobs: Blobs, manifest_key: str) -> dict[str, bytes]:
    """File name -> bytes of one checkpoint, each with the checksum it was saved with.

    CheckpointDamaged if one is gone or has changed.
    """
    manifest = await read_manifest(blobs, manifest_key)
    files = {}
    for name, file in manifest.files.items():
        try:
            data = await blobs.get(file.key)
        except BlobMissing:
            raise CheckpointDamaged(f"file {name} of {manifest_key} is gone") from None
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise CheckpointDamaged(f"file {name} of {manifest_key} has another sha256")
        files[name] = data
    return files


async def _store_files(
    blobs: Blobs,
    run: RunRecord,
    kind: CheckpointKind,
    seq: int,
    epoch: int,
    files: Mapping[str, bytes],
) -> tuple[Manifest, str]:
    """(the manifest of (run, seq), its sha256): ours, or the one an earlier owner completed."""
    prefix = keys.checkpoint_prefix(run.tenant, run.run_id, seq, epoch)
    entries = {}
    await failpoint("sv.blobs", kind)
    for name, data in files.items():
        await blobs.put(f"{prefix}{name}", data)
        entries[name] = ManifestFile(
            key=f"{prefix}{name}", num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
    manifest = Manifest(run_id=run.run_id, seq=seq, epoch=epoch, kind=kind, files=entries)
    written = manifest.to_bytes()
    key = keys.checkpoint_manifest(run.tenant, run.run_id, seq)
    await failpoint("sv.man", kind)
    if not await blobs.put_if_absent(key, written):
        written = await blobs.get(key)
        manifest = Manifest.from_bytes(written)
        if _contents(manifest) != {name: entry.sha256 for name, entry in entries.items()}:
            # Not an error: the first one is the checkpoint. But the replay computed other bits.
            log.error("seq %d of %s was saved before with other contents", seq, run.run_id)
    return manifest, hashlib.sha256(written).hexdigest()


def _contents(manifest: Manifest) -> dict[str, str]:
    return {name: file.sha256 for name, file in manifest.files.items()}


async def _take_name(
    blobs: Blobs, record: CheckpointRecord, *, overwrite: bool
) -> CheckpointRecord:
    """The record that the name stands for from now on: ours, unless this or a later op was here."""
    key = keys.name_record(record.tenant, record.run_id, record.kind, record.name)
    while True:
        if await blobs.put_if_absent(key, record.to_bytes()):
            return record
        try:
            data, etag = await blobs.get_with_etag(key)
        except BlobMissing:
            continue  # deleted between the two calls
        present = CheckpointRecord.from_bytes(data)
        if present.seq == record.seq:
            return present
        expired = present.expires_at is not None and present.expires_at <= record.created_at
        if not (overwrite or expired):
            raise BadRequest(
                f"name={record.name!r} exists, saved by seq {present.seq}; "
                "choose another name or pass overwrite=true"
            )
        if present.seq > record.seq:
            # We are an owner that was paused here and replaced: never put an older save on top.
            return present
        if await blobs.put_if_match(key, record.to_bytes(), etag):
            return record


async def _check_stored(blobs: Blobs, manifest: Manifest) -> None:
    for name, file in manifest.files.items():
        if await blobs.size(file.key) != file.num_bytes:
            raise CheckpointDamaged(f"file {name} of seq {manifest.seq} is not in the store")
