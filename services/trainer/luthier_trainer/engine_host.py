"""An engine behind calls of names, numbers and bytes: in a child process, or on a thread."""

import secrets
from collections.abc import Callable
from typing import Any

from luthier_core.records import LoraConfig
from luthier_core.types import AdamParams
from luthier_trainer.frames import Message, OutOfMemory

_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
"""How torch's allocators, on CUDA and on the CPU, word a RuntimeError."""


class EngineHost:
    """One engine and the copies of its runs' states that have not been fetched."""

    def __init__(
        self,
        engine: Any,
        *,
        make_spec: Callable[..., Any] = LoraConfig,
        free_memory: Callable[[], None] = lambda: None,
    ) -> None:
        """`engine`: Engine, or what has its methods; `make_spec`: from LoraConfig's fields what its
        create takes; `free_memory`: called after a call that ran out of memory."""
        self.engine = engine
        self._make_spec = make_spec
        self._free_memory = free_memory
        self._copies: dict[str, tuple[str, Any]] = {}
        """Id -> run and StateCopy."""

    def apply(self, call: Message) -> Message:
        """The answer; for the engine's thread, but for copy_bytes, which is for any.

        OutOfMemory, or whatever the engine raises.
        """
        try:
            return self._apply(call.fields, call.data)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            detail = f"{call.fields['method']}: {error}"
        self._free_memory()  # outside of the handler: the error's traceback holds tensors
        raise OutOfMemory(detail)

    def _apply(self, fields: dict[str, Any], data: Any) -> Message:
        engine = self.engine
        match fields:
            case {"method": "create", "run_id": run_id, "lora": lora}:
                engine.create(run_id, self._make_spec(**lora))
            case {"method": "forward_backward", "run_id": run_id, **options}:
                return Message({}, [engine.forward_backward(run_id, data[0], **options)])
            case {"method": "optim_step", "run_id": run_id, "params": params}:
                return Message({"metrics": engine.optim_step(run_id, AdamParams(**params))})
            case {"method": "clear_gradient", "run_id": run_id}:
                engine.clear_gradient(run_id)
            case {"method": "save", "run_id": run_id, "optimizer": optimizer}:
                files = engine.save(run_id, optimizer=optimizer)
                return Message({"names": list(files)}, list(files.values()))
            case {"method": "logprob_gap", "run_id": run_id}:
                return Message({"metrics": engine.logprob_gap(run_id)})
            case {"method": "load", "run_id": run_id, "names": names, "optimizer": optimizer}:
                engine.load(run_id, dict(zip(names, data, strict=True)), optimizer=optimizer)
            case {"method": "copy_state", "run_id": run_id}:
                copy = secrets.token_hex(8)
                self._copies[copy] = (run_id, engine.copy_state(run_id))
                return Message({"copy": copy})
            case {"method": "copy_bytes", "copy": copy}:
                return Message({}, [self._copies[copy][1].to_bytes()])
            case {"method": "forget_copy", "copy": copy}:
                self._copies.pop(copy, None)
            case {"method": "take_state", "run_id": run_id, "lora": lora}:
                engine.take_state(run_id, self._make_spec(**lora), data[0])
            case {"method": "checksum", "run_id": run_id}:
                return Message({"checksum": engine.checksum(run_id)})
            case {"method": "drop", "run_id": run_id}:
                engine.drop(run_id)
                for copy in [c for c, (of, _) in self._copies.items() if of == run_id]:
                    del self._copies[copy]
            case _:
                raise AssertionError(f"no such call: {fields}")
        return Message({})


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):  # also what a std::bad_alloc becomes
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY_WORDS)
