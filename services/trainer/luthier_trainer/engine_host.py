"""An engine behind calls of names, numbers and bytes: in a child process, or on a thread."""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier_core.records import LoraConfig
from luthier_core.types import AdamParams
from luthier_trainer.frames import Message, OutOfMemory, error_message

log = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"
"""What an engine's copy of a run's whole state is called."""

_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
"""How torch's allocators, on CUDA and on the CPU, word a RuntimeError."""


Tell = Callable[[Message], None]
"""Takes a part of an answer."""


def _nobody_listens(part: Message) -> None:
    """Where a call is answered as a whole."""


@dataclass(frozen=True, slots=True)
class PassOp:
    """A forward or, with `backward`, a forward_backward op."""

    run_id: str
    request: bytes
    """A ForwardBackwardRequest."""
    backward: bool = True
    clock_cycle: int = 0


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
        """Id -> run, and what encodes the copy."""

    def apply(self, call: Message, tell: Tell = _nobody_listens) -> Message:
        """The answer; for the engine's thread, but for fetch, which is for any.

        What is known of a part of the answer before the whole is passed to `tell`. OutOfMemory, or
        whatever the engine raises.
        """
        try:
            return self._apply(call.fields, call.data, tell)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            detail = f"{call.fields['method']}: {error}"
        self._free_memory()  # outside of the handler: the error's traceback holds tensors
        raise OutOfMemory(detail)

    def _apply(self, fields: dict[str, Any], data: Sequence[bytes], tell: Tell) -> Message:
        engine = self.engine
        match fields:
            case {"method": "create", "run_id": run_id, "lora": lora}:
                engine.create(run_id, self._make_spec(**lora))
            case {"method": "forward_backward", "run_id": run_id, **options}:
                return Message({}, [engine.forward_backward(run_id, data[0], **options)])
            case {"method": "forward_backward_many", "ops": ops}:
                together = [PassOp(request=r, **op) for op, r in zip(ops, data, strict=True)]
                for index, output in engine.forward_backward_many(together):
                    tell(self._part(index, output))
            case {"method": "optim_step", "run_id": run_id, "params": params}:
                return Message({"metrics": engine.optim_step(run_id, AdamParams(**params))})
            case {"method": "optim_step_many", "steps": steps}:
                wanted = [(run_id, AdamParams(**params)) for run_id, params in steps]
                for index, metrics in engine.optim_step_many(wanted):
                    tell(self._part(index, metrics))
            case {"method": "clear_gradient", "run_id": run_id}:
                engine.clear_gradient(run_id)
            case {"method": "logprob_gap", "run_id": run_id}:
                return Message({"metrics": engine.logprob_gap(run_id)})
            case {"method": "load", "run_id": run_id, "names": names, "optimizer": optimizer}:
                engine.load(run_id, dict(zip(names, data, strict=True)), optimizer=optimizer)
            case {"method": "copy_files", "run_id": run_id, "optimizer": optimizer}:
                return self._kept(run_id, engine.copy_files(run_id, optimizer=optimizer))
            case {"method": "copy_state", "run_id": run_id}:
                return self._kept(run_id, engine.copy_state(run_id))
            case {"method": "fetch", "copy": copy}:
                files = self._copies.pop(copy)[1]()
                return Message({"names": list(files)}, list(files.values()))
            case {"method": "take_state", "run_id": run_id, "lora": lora}:
                engine.take_state(run_id, self._make_spec(**lora), data[0])
            case {"method": "checksum", "run_id": run_id}:
                return Message({"checksum": engine.checksum(run_id)})
            case {"method": "drop", "run_id": run_id}:
                engine.drop(run_id)
                for copy in [c for c, (of, _) in list(self._copies.items()) if of == run_id]:
                    self._copies.pop(copy, None)  # one may be fetched meanwhile
            case _:
                raise AssertionError(f"no such call: {fields}")
        return Message({})

    def _kept(self, run_id: str, encode: Callable[[], dict[str, bytes]]) -> Message:
        copy = secrets.token_hex(8)
        self._copies[copy] = (run_id, encode)
        return Message({"copy": copy})

    def _part(self, index: int, output: bytes | dict[str, float] | Exception) -> Message:
        """What is told of one op among many."""
        if isinstance(output, bytes):
            return Message({"part": index}, [output])
        if isinstance(output, dict):
            return Message({"part": index, "metrics": output})
        if _is_out_of_memory(output):
            self._free_memory()
            output = OutOfMemory(str(output))
        answer = error_message(output)
        if answer.fields["error"] == "EngineFailed":
            log.error("one op among many", exc_info=output)
        return Message({"part": index, **answer.fields})


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):  # also what a std::bad_alloc becomes
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY_WORDS)
