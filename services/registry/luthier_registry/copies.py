"""copy_weights: a checkpoint under a run of its own, in another project or from another tenant."""

from luthier_core import keys
from luthier_core.blobs import Blobs
from luthier_core.checkpoints import Manifest, ManifestFile, TinkerPath, expiry, read_manifest
from luthier_core.errors import BadRequest, InvalidField, NotFound
from luthier_core.records import CheckpointRecord, RunRecord
from luthier_registry.archive import ArchiveFile, copy_file
from luthier_registry.builds import Builds
from luthier_registry.checkpoints import Checkpoints
from luthier_registry.lists import Lists
from luthier_registry.requests import CopyWeights
from luthier_registry.sessions import within_project
from luthier_registry.store import Store

_SEQ = 0
"""The run of a copy has one checkpoint, and no op ever."""


class Copies:
    """Makes copies of checkpoints."""

    def __init__(
        self, store: Store, checkpoints: Checkpoints, blobs: Blobs, builds: Builds, lists: Lists
    ) -> None:
        self._lists = lists
        self._store = store
        self._checkpoints = checkpoints
        self._blobs = blobs
        self._builds = builds

    async def copy(
        self, tenant: str, wanted: CopyWeights, *, key_id: str, key_project: str | None
    ) -> str:
        """The tinker:// path of the copy: same kind and name, a new run that cannot be trained.

        A key of a project copies into that project only. A repeat (same idempotency key, or same
        place in a session) returns the first copy. The tenant's own files are shared; those of
        another are copied: they may be deleted with it.
        """
        source = TinkerPath.parse(wanted.source_path, "source_path")
        if source.kind == "external_weights":
            raise InvalidField(
                f"source_path={wanted.source_path!r}: must be weights or sampler_weights"
            )
        within_project(key_project, wanted.destination_project_id)
        run_id = await self._store.run_id_for_copy(tenant, wanted)
        path = TinkerPath(run_id, source.kind, source.name)
        try:
            run = await self._store.run(tenant, run_id)
            _check_repeat(run, wanted)
            await self._checkpoints.read(tenant, path)
            return str(path)
        except NotFound:
            record = await self._checkpoints.read(
                tenant, source, access_tenant=wanted.access_tenant
            )
        run = await self._store.create_copy_run(tenant, run_id, record, wanted, key_id=key_id)
        _check_repeat(run, wanted)
        copy = record.model_copy(
            update={
                "tenant": tenant,
                "run_id": run_id,
                "seq": _SEQ,
                "created_at": run.created_at,
                "expires_at": expiry(run.created_at, wanted.ttl_seconds),
                "public": False,
            }
        )
        if record.tenant != tenant:
            copy = await self._with_own_files(record, copy)
        async with self._lists.changing(tenant, path, copy.manifest_digest):
            await self._blobs.put_if_absent(
                keys.name_record(tenant, run_id, path.kind, path.name), copy.to_bytes()
            )
        return str(path)

    async def _with_own_files(
        self, record: CheckpointRecord, copy: CheckpointRecord
    ) -> CheckpointRecord:
        """`copy` with a manifest and files of its own tenant. Unavailable while they are copied."""
        manifest = await read_manifest(self._blobs, record.manifest_key)
        prefix = keys.checkpoint_prefix(copy.tenant, copy.run_id, _SEQ, 0)
        own = Manifest(
            run_id=copy.run_id,
            seq=_SEQ,
            epoch=0,
            kind=copy.kind,
            files={
                name: ManifestFile(key=prefix + name, num_bytes=file.num_bytes, sha256=file.sha256)
                for name, file in manifest.files.items()
            },
        )
        key = keys.checkpoint_manifest(copy.tenant, copy.run_id, _SEQ)

        async def copy_files() -> None:
            for name, file in manifest.files.items():
                source = ArchiveFile(name, file.key, file.num_bytes, file.sha256)
                await copy_file(self._blobs, source, prefix + name)
            await self._blobs.put_if_absent(key, own.to_bytes())

        if await self._blobs.size(key) is None:
            await self._builds.finish(key, copy_files)
        # The one that is there: an earlier try may have copied what the path stood for then.
        stored = await read_manifest(self._blobs, key)
        changes = {
            "manifest_key": key,
            "manifest_digest": stored.digest(),
            "size_bytes": stored.num_bytes,
        }
        return copy.model_copy(update=changes)


def _check_repeat(run: RunRecord, wanted: CopyWeights) -> None:
    if run.trainable or run.source_path != wanted.source_path:
        raise BadRequest(f"training run {run.run_id} is there already, and is no copy of this")
