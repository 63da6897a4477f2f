"""Which runs' states are on the device, and which wait in host memory."""

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from luthier_core.errors import NotFound
from luthier_model.lora import LoraSpec
from luthier_trainer.adapters import RunState


class Residents:
    """The states of all runs of one engine, `max_on_device` of them on the device.

    Who was not used for longest makes room. What a state holds is the same, bit for bit, after it
    has come back. Every method that takes a run_id raises NotFound for one that is not here.
    """

    def __init__(self, max_on_device: int, make: Callable[[LoraSpec], RunState]) -> None:
        """`make` gives a state on the device, to be filled."""
        self._max_on_device = max_on_device
        self._make = make
        self._on_device: dict[str, RunState] = {}
        """The one used longest ago first."""
        self._in_host: dict[str, tuple[LoraSpec, dict[str, Tensor]]] = {}

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._on_device or run_id in self._in_host

    @property
    def on_device(self) -> Collection[str]:
        return self._on_device.keys()

    def add(self, run_id: str, spec: LoraSpec, fill: Callable[[RunState], None]) -> None:
        """A run, instead of the one that has this id; whatever `fill` raises, there is none."""
        self.drop(run_id)
        self._make_room(1, keep=())
        state = self._make(spec)
        fill(state)
        self._on_device[run_id] = state

    def use(self, run_ids: Sequence[str]) -> list[RunState]:
        """The states of these runs, all on the device until the next call."""
        for run_id in run_ids:
            if run_id not in self:
                raise NotFound(f"training run {run_id!r}")
        absent = {run_id for run_id in run_ids if run_id not in self._on_device}
        self._make_room(len(absent), keep=run_ids)
        for run_id in absent:
            spec, copied = self._in_host[run_id]
            state = self._make(spec)
            state.take(copied)
            self._on_device[run_id] = state
            del self._in_host[run_id]
        for run_id in run_ids:
            self._on_device[run_id] = self._on_device.pop(run_id)
        return [self._on_device[run_id] for run_id in run_ids]

    def copy(self, run_id: str) -> dict[str, Tensor]:
        """As RunState.copy; one that waits in host memory stays there."""
        if run_id in self._in_host:
            return self._in_host[run_id][1]  # never changed in place
        return self.use([run_id])[0].copy()

    def drop(self, run_id: str) -> None:
        """Forget the run; nothing happens if it is not here."""
        self._on_device.pop(run_id, None)
        self._in_host.pop(run_id, None)

    def page_out(self) -> None:
        """Move every state to host memory: the device has none left."""
        self._make_room(self._max_on_device, keep=())

    def _make_room(self, num_runs: int, *, keep: Collection[str]) -> None:
        movable = [run_id for run_id in self._on_device if run_id not in keep]
        num_too_many = len(self._on_device) + num_runs - self._max_on_device
        for run_id in movable[: max(num_too_many, 0)]:
            state = self._on_device[run_id]
            self._in_host[run_id] = (state.spec, state.copy())
            del self._on_device[run_id]
