"""AdapterCache: adapters on the device, and in host memory those that lately were.

A key names immutable weights (design 5), so an adapter is never replaced, and never stale.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from luthier_model.lora import LoraAdapter, LoraPair


class AdapterCache:
    """Two levels, least recently used out first.

    At most max_adapters on the device, more only while requests are using them all. host_bytes of
    host memory for those that made room: back on the device they cost a copy, not a download. What
    neither holds is forgotten, and the worker reads it from the store again.
    """

    def __init__(self, max_adapters: int, *, host_bytes: int, device: torch.device) -> None:
        self.max_adapters = max_adapters
        self.host_bytes = host_bytes
        self._device = device
        self._loaded: OrderedDict[str, LoraAdapter] = OrderedDict()
        self._on_host: OrderedDict[str, LoraAdapter] = OrderedDict()
        self._num_host_bytes = 0
        self._num_users: Counter[str] = Counter()

    def __contains__(self, key: str) -> bool:
        return key in self._loaded or key in self._on_host

    def __len__(self) -> int:
        """Adapters on the device."""
        return len(self._loaded)

    @property
    def num_on_host(self) -> int:
        return len(self._on_host)

    def put(self, key: str, adapter: LoraAdapter) -> None:
        """Keep the adapter, which is on the device, at the price of the one longest unused."""
        self._loaded.setdefault(key, adapter)
        self._loaded.move_to_end(key)
        self._evict(keep=key)

    def acquire(self, key: str) -> LoraAdapter:
        """The adapter on the device, until release(key). KeyError if neither level has it."""
        if key not in self._loaded:
            adapter = self._on_host.pop(key)
            self._num_host_bytes -= num_bytes(adapter)
            self._loaded[key] = moved(adapter, self._device)
        self._loaded.move_to_end(key)
        self._num_users[key] += 1
        self._evict()
        return self._loaded[key]

    def release(self, key: str) -> None:
        self._num_users[key] -= 1
        assert self._num_users[key] >= 0
        if not self._num_users[key]:
            del self._num_users[key]
        self._evict()

    def _evict(self, keep: str | None = None) -> None:
        num_too_many = len(self._loaded) - self.max_adapters
        if num_too_many <= 0:
            return
        unused = [key for key in self._loaded if key not in self._num_users and key != keep]
        for key in unused[:num_too_many]:
            adapter = moved(self._loaded.pop(key), torch.device("cpu"))
            self._on_host[key] = adapter
            self._num_host_bytes += num_bytes(adapter)
        while self._num_host_bytes > self.host_bytes:
            _, forgotten = self._on_host.popitem(last=False)
            self._num_host_bytes -= num_bytes(forgotten)


def num_bytes(adapter: LoraAdapter) -> int:
    return sum(tensor.nbytes for tensor in _tensors(adapter))


def moved(adapter: LoraAdapter, device: torch.device) -> LoraAdapter:
    """The adapter on `device`; itself where it already is."""
    if all(tensor.device == device for tensor in _tensors(adapter)):
        return adapter
    pairs = {
        name: LoraPair(a=pair.a.to(device), b=pair.b.to(device))
        for name, pair in adapter.pairs.items()
    }
    return replace(adapter, pairs=pairs)


def _tensors(adapter: LoraAdapter) -> Iterator[Tensor]:
    for pair in adapter.pairs.values():
        yield pair.a
        yield pair.b
