"""VllmAdapters: which versions of weights a vLLM server has, under which names."""

import asyncio
import contextlib
import shutil
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Mapping
from hashlib import blake2b
from pathlib import Path
from weakref import WeakValueDictionary

from luthier_core.errors import Unsupported
from luthier_model.lora import LoraShape, LoraSpec, init_adapter, target_modules
from luthier_model.peft_io import adapter_files, adapter_from_files
from luthier_sampler.engine_thread import ReadFiles
from luthier_sampler.vllm_api import MAX_LORA_RANK
from luthier_sampler.vllm_server import VllmServer


class VllmAdapters:
    """Loaded when first used, least recently used out first; those in use stay.

    A key names immutable weights and its digest is the name at the server, where a name is loaded
    once: it cannot come to stand for other weights. vLLM reads files again when it likes to, so
    they lie in `folder` for as long as it knows the name.
    """

    def __init__(
        self,
        server: VllmServer,
        folder: Path,
        shapes: Mapping[str, LoraShape],
        *,
        max_adapters: int,
        lm_head: bool,
    ) -> None:
        self._server = server
        self._folder = folder
        self._shapes = shapes
        self._max_adapters = max_adapters
        self._lm_head = lm_head
        self._incarnation = 0
        self._loaded: OrderedDict[str, None] = OrderedDict()
        """Keys that the server of that incarnation has."""
        self._num_users: Counter[str] = Counter()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def use(self, key: str, read_files: ReadFiles) -> AsyncIterator[str]:
        """The name that the server has for these weights. BadRequest, Unsupported, ServerGone.

        An empty key is the base model as an adapter that changes nothing.
        """
        self._num_users[key] += 1
        try:
            # One load for all who wait for the same adapter.
            async with self._locks.setdefault(key, asyncio.Lock()):
                self._notice_new_server()
                if key not in self._loaded:
                    incarnation = self._incarnation
                    await self._load(key, await read_files(key) if key else self._no_change())
                    if incarnation == self._incarnation:
                        self._loaded[key] = None
                else:
                    self._loaded.move_to_end(key)
            await self._evict()
            yield _name(key)
        finally:
            self._num_users[key] -= 1
            if not self._num_users[key]:
                del self._num_users[key]

    def _notice_new_server(self) -> None:
        """A new server has nothing loaded."""
        if self._incarnation != self._server.incarnation:
            for key in self._loaded:
                shutil.rmtree(self._folder / _name(key), ignore_errors=True)
            self._loaded.clear()
            self._incarnation = self._server.incarnation

    async def _load(self, key: str, files: Mapping[str, bytes]) -> None:
        checked = await asyncio.to_thread(self._checked, files)
        folder = self._folder / _name(key)
        folder.mkdir(exist_ok=True)
        for name, data in checked.items():
            await asyncio.to_thread((folder / name).write_bytes, data)
        body = {"lora_name": _name(key), "lora_path": str(folder)}
        async with self._server.post("/v1/load_lora_adapter", body):
            pass

    def _checked(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """The adapter in our own form, once it is sure that it fits the model, and vLLM."""
        adapter = adapter_from_files(files, self._shapes, "cpu")
        if adapter.spec.rank > MAX_LORA_RANK:
            raise Unsupported(
                f"an adapter of rank {adapter.spec.rank}: the sampler engine vllm takes up to "
                f"{MAX_LORA_RANK}"
            )
        if any(pair.a.dim() == 3 for pair in adapter.pairs.values()):
            raise Unsupported("an adapter on experts: not with the sampler engine vllm")
        if "lm_head" in adapter.pairs and not self._lm_head:
            raise Unsupported(
                "an adapter on lm_head (train_unembed): the sampler engine vllm takes it with "
                "sampler.vllm_lm_head = true only"
            )
        return adapter_files(adapter, "")

    def _no_change(self) -> dict[str, bytes]:
        spec = LoraSpec(rank=1, seed=0, train_unembed=False)  # its B is zero
        shapes = {name: self._shapes[name] for name in target_modules(self._shapes, spec)}
        return adapter_files(init_adapter(spec, shapes, "cpu"), "")

    async def _evict(self) -> None:
        unused = [key for key in self._loaded if key not in self._num_users]
        for key in unused[: max(0, len(self._loaded) - self._max_adapters)]:
            # Forgotten first: whoever wants it from now on waits for the lock, and loads it.
            async with self._locks.setdefault(key, asyncio.Lock()):
                if key in self._num_users or key not in self._loaded:
                    continue
                del self._loaded[key]
                async with self._server.post("/v1/unload_lora_adapter", {"lora_name": _name(key)}):
                    pass
                shutil.rmtree(self._folder / _name(key), ignore_errors=True)


def _name(key: str) -> str:
    return blake2b(key.encode(), digest_size=16).hexdigest()
