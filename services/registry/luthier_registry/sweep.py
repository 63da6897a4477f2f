"""Mark and sweep: deletes objects that nothing needs (reliability 1.3, garbage collection).

Roots are the names that have not expired, the weights of sampling sessions whose client is there,
both snapshots of each HEAD, checkpoints that the untrimmed log of a run loads, payloads newer than
the older snapshot, and results whose record is in Redis. What has a form that is not known here is
never touched.

An object is noted when nothing needs it, and deleted when that was so `trash_s` ago and is so
still, with roots that were read again just before. So an object that is being written, whose
manifest or name comes later, has that long.
"""

import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, cast

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.checkpoints import Manifest
from luthier_core.protocol import Head
from luthier_core.records import CheckpointRecord, SamplerRecord
from luthier_registry.identity import tenants

IDLE = timedelta(days=7)
"""A session without a heartbeat for so long keeps no unnamed weights."""

_RUN = r"t/[^/]+/runs/(?P<run>[^/]+)/"
_OP = re.compile(_RUN + r"ops/(?P<seq>\d+)-[0-9a-f]+")
_RESULT = re.compile(_RUN + r"res/(?P<seq>\d+)-\d+")
_SNAPSHOT = re.compile(_RUN + r"snap/(?P<ref>\d+-\d+)/[^/]+")
_CHECKPOINT = re.compile(_RUN + r"(ckpt/\d+-\d+/[^/]+|man/\d+)")
_UPLOAD = re.compile(r"t/[^/]+/uploads/[^/]+")
"""Needed by nothing: who announces an upload has as long as it takes to sweep it."""
_SAMPLE = re.compile(r"t/[^/]+/samples/(?P<session>[^/]+)/(?P<seq>\d+)(-[0-9a-f]+|\.res)")
_TRACE = re.compile(r"t/[^/]+/archives/[^/]+\.pftrace")
"""Needed by nothing either: who asks again gets a new one."""
_ARCHIVE = re.compile(r"t/[^/]+/archives/(?P<digest>[0-9a-f]+)\.tar")


@dataclass(slots=True)
class Roots:
    """What a tenant's objects are needed for."""

    files: set[str] = field(default_factory=set)
    """Manifests, and the files in them."""
    digests: set[str] = field(default_factory=set)
    """Of the manifests that may be downloaded."""
    heads: dict[str, Head] = field(default_factory=dict)


class Sweep:
    """The job. What it has found is in the object store."""

    def __init__(
        self, blobs: Blobs, client: redis.Redis, *, clock: Callable[[], datetime], trash_s: float
    ) -> None:
        self._blobs = blobs
        self._redis = client
        self._clock = clock
        self._trash = timedelta(seconds=trash_s)

    async def run(self) -> dict[str, int]:
        num_deleted, num_waiting = 0, 0
        for tenant in await tenants(self._blobs):
            deleted, waiting = await self._sweep(tenant)
            num_deleted, num_waiting = num_deleted + deleted, num_waiting + waiting
        return {"deleted": num_deleted, "waiting": num_waiting}

    async def _sweep(self, tenant: str) -> tuple[int, int]:
        """(objects deleted, objects that wait for it)"""
        now = self._clock()
        known = await self._candidates(tenant)
        roots = await self._roots(tenant)
        since = {
            key: known.get(key, now.isoformat()) async for key in self._unneeded(tenant, roots)
        }
        due = [key for key, at in since.items() if datetime.fromisoformat(at) <= now - self._trash]
        if due:
            roots = await self._roots(tenant)
            due = [key for key in due if not await self._is_needed(key, roots)]
            for key in due:
                await self._blobs.delete(key)
        waiting = {key: at for key, at in since.items() if key not in set(due)}
        await self._blobs.put(keys.sweep_candidates(tenant), json.dumps(waiting).encode())
        return len(due), len(waiting)

    async def _candidates(self, tenant: str) -> dict[str, str]:
        try:
            data = await self._blobs.get(keys.sweep_candidates(tenant))
        except BlobMissing:
            return {}
        found: dict[str, str] = json.loads(data)
        return found

    async def _unneeded(self, tenant: str, roots: Roots) -> AsyncIterator[str]:
        async for info in self._blobs.list(keys.tenant_prefix(tenant)):
            if not await self._is_needed(info.key, roots):
                yield info.key

    async def _is_needed(self, key: str, roots: Roots) -> bool:
        if _CHECKPOINT.fullmatch(key):
            return key in roots.files
        if found := _SNAPSHOT.fullmatch(key):
            head = roots.heads.get(found["run"])
            return head is not None and found["ref"] in _snapshots(head)
        if found := _OP.fullmatch(key):
            head = roots.heads.get(found["run"])
            older = head.prev_snap if head else None
            return older is None or int(found["seq"]) > older.seq
        if found := _RESULT.fullmatch(key):
            return await self._exists(keys.run_outcome(found["run"], found["seq"]))
        if found := _SAMPLE.fullmatch(key):
            return await self._exists(keys.sampling_outcome(found["session"], found["seq"]))
        if _UPLOAD.fullmatch(key) or _TRACE.fullmatch(key):
            return False
        if found := _ARCHIVE.fullmatch(key):
            return found["digest"] in roots.digests
        return True

    # --- roots ------------------------------------------------------------------------------------

    async def _roots(self, tenant: str) -> Roots:
        roots, manifests = Roots(), set()
        async for info in self._blobs.list(f"t/{tenant}/names/"):
            record = await self._read(CheckpointRecord, info.key)
            if record is not None and await self._is_live(record):
                manifests.add(record.manifest_key)
                roots.digests.add(record.manifest_digest)
        async for info in self._blobs.list(f"t/{tenant}/samplers/"):
            sampler = await self._read(SamplerRecord, info.key)
            if sampler is not None and sampler.weights and await self._is_there(sampler.session_id):
                manifests.add(sampler.weights)
        async for info in self._blobs.list(f"t/{tenant}/runs/"):
            if info.key.endswith("/HEAD.json"):
                run_id = info.key.split("/")[3]
                roots.heads[run_id] = Head.from_bytes(await self._blobs.get(info.key))
            elif info.key.endswith("/run.json"):
                manifests |= await self._loaded(info.key.split("/")[3])
        for manifest in manifests:
            roots.files.add(manifest)
            try:
                files = Manifest.from_bytes(await self._blobs.get(manifest)).files
            except BlobMissing:
                continue
            roots.files |= {file.key for file in files.values()}
        return roots

    async def _is_live(self, record: CheckpointRecord) -> bool:
        if record.expires_at is not None and record.expires_at <= self._clock():
            return False
        return record.kind != "ephemeral" or await self._is_there(record.run_id.partition(":")[0])

    async def _is_there(self, session_id: str) -> bool:
        """Whether the session's client may come back; also when nothing is known of it."""
        header = keys.session_header(session_id)
        status, heartbeat = await cast(Any, self._redis.hmget(header, ["status", "heartbeat"]))
        if status == b"finished":
            return False
        return heartbeat is None or float(heartbeat) > (self._clock() - IDLE).timestamp()

    async def _loaded(self, run_id: str) -> set[str]:
        """Manifests that a replay of the run's log would load."""
        entries: Any = await self._redis.xrange(keys.run_log(run_id))
        found = set()
        for _, fields in entries:
            if fields.get(b"kind") in (b"load_weights", b"create_model") and b"body" in fields:
                body = json.loads(fields[b"body"])
                source = body.get("source", body)
                if isinstance(source, dict) and "manifest" in source:
                    found.add(str(source["manifest"]))
        return found

    async def _read(self, kind: Any, key: str) -> Any:
        try:
            return kind.from_bytes(await self._blobs.get(key))
        except BlobMissing:
            return None

    async def _exists(self, key: str) -> bool:
        return bool(await self._redis.exists(key))


def _snapshots(head: Head) -> set[str]:
    refs = (head.snap, head.prev_snap)
    return {f"{ref.seq}-{ref.epoch}" for ref in refs if ref is not None}
