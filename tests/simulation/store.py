"""The object store: puts, create-if-absent, compare-and-swap by a hash of the content."""

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any


def etag_of(value: Any) -> str:
    return blake2b(repr(value).encode(), digest_size=8).hexdigest()


@dataclass(slots=True)
class ObjectStore:
    """Durable: nothing here is ever rolled back, but an object may rot."""

    objects: dict[str, Any] = field(default_factory=dict)
    rotten: set[str] = field(default_factory=set)

    def put(self, key: str, value: Any) -> None:
        self.objects[key] = value

    def get(self, key: str) -> Any:
        """The value, or None if it is absent or its checksum is wrong."""
        return None if key in self.rotten else self.objects.get(key)

    def create(self, key: str, value: Any) -> bool:
        """Whether the key was absent and now holds the value."""
        if key in self.objects:
            return False
        self.objects[key] = value
        return True

    def read_head(self, key: str) -> tuple[Any, str]:
        value = self.objects.get(key)
        return (value, etag_of(value)) if value is not None else (None, "")

    def swap(self, key: str, value: Any, etag: str) -> str | None:
        """The new etag, or None if the object has another one than this ("": absent)."""
        if self.read_head(key)[1] != etag:
            return None
        self.objects[key] = value
        return etag_of(value)

    def rot(self, run_id: str) -> bool:
        """Damage the newest of a run's two snapshots; False if there are no two sound ones."""
        head = self.objects.get(head_key(run_id))
        if head is None or head.prev_snap is None:
            return False
        newest, older = (
            snapshot_key(run_id, ref.seq, ref.epoch) for ref in (head.snap, head.prev_snap)
        )
        if self.rotten & {newest, older}:
            return False
        self.rotten.add(newest)
        return True


def head_key(run_id: str) -> str:
    return f"runs/{run_id}/HEAD.json"


def snapshot_key(run_id: str, seq: int, epoch: int) -> str:
    return f"runs/{run_id}/snap/{seq}-{epoch}"


def manifest_key(run_id: str, seq: int) -> str:
    return f"runs/{run_id}/man/{seq}"
