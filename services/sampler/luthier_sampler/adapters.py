"""AdapterCache: the adapters that are loaded, least recently used out first."""

from collections import Counter, OrderedDict

from luthier_model.lora import LoraAdapter


class AdapterCache:
    """At most max_adapters, more only while requests are using them all.

    A key names immutable weights (design 5), so an adapter is never replaced.
    """

    def __init__(self, max_adapters: int) -> None:
        self.max_adapters = max_adapters
        self._loaded: OrderedDict[str, LoraAdapter] = OrderedDict()
        self._num_users: Counter[str] = Counter()

    def __contains__(self, key: str) -> bool:
        return key in self._loaded

    def __len__(self) -> int:
        return len(self._loaded)

    def put(self, key: str, adapter: LoraAdapter) -> None:
        """Keep the adapter, at the price of the least recently used one that nobody uses."""
        self._loaded.setdefault(key, adapter)
        self._loaded.move_to_end(key)
        self._evict(keep=key)

    def acquire(self, key: str) -> LoraAdapter:
        """The adapter, which stays until release(key). KeyError if it is not loaded."""
        adapter = self._loaded[key]
        self._loaded.move_to_end(key)
        self._num_users[key] += 1
        return adapter

    def release(self, key: str) -> None:
        self._num_users[key] -= 1
        assert self._num_users[key] >= 0
        if not self._num_users[key]:
            del self._num_users[key]
        self._evict()

    def _evict(self, keep: str | None = None) -> None:
        unused = [key for key in self._loaded if key not in self._num_users and key != keep]
        for key in unused[: max(0, len(self._loaded) - self.max_adapters)]:
            del self._loaded[key]
