"""Planted bugs: each is put into every process of a cluster, and the judge has to catch it.

Those of the function library are tests.library.mutants'; the others replace one part of a service.
"""

from collections.abc import Callable
from typing import Any

from tests.library.mutants import MUTANTS, mutated

from luthier_core.oplog import Oplog
from luthier_core.protocol import Head


def _library(mutant: str) -> None:
    library = mutated(mutant)

    async def load_library(oplog: Oplog) -> None:
        await oplog.redis.function_load(library, replace=True)

    Oplog.load_library = load_library  # type: ignore[method-assign]


def _trim_before_cas() -> None:
    from tests.simulation.planted import trim_before_cas

    from luthier_trainer import snapshots

    snapshots.store_snapshot = trim_before_cas  # type: ignore[attr-defined]


def _unconditional_head() -> None:
    from luthier_trainer.effects import RunEffects

    async def write(self: Any, run_id: str, head: Head, etag: str) -> str:
        written: str = await self._blobs.put(self._head_key(run_id), head.to_bytes())
        return written

    RunEffects._cas_head = write  # type: ignore[method-assign]


def _overwrite_on_replay() -> None:
    from tests.simulation.planted import publish_on_replay

    from luthier_trainer import worker

    _library("commit: a second outcome overwrites the first")
    worker.take_over = publish_on_replay  # type: ignore[attr-defined]


def _no_blame() -> None:
    from luthier_trainer.engine_watch import EngineWatch

    async def blame(self: Any, run: Any, death: Any) -> None:
        run.paused = True

    EngineWatch.blame = blame  # type: ignore[method-assign]


def _no_tombstone() -> None:
    from tests.simulation.planted import no_tombstone

    from luthier_gateway import submit

    submit.submit_steps = no_tombstone  # type: ignore[attr-defined]


SERVICE_BUGS: dict[str, Callable[[], None]] = {
    "trim before compare-and-swap": _trim_before_cas,
    "unconditional HEAD write": _unconditional_head,
    "result overwritten on replay": _overwrite_on_replay,
    "no blame": _no_blame,
    "no tombstone": _no_tombstone,
}
BUGS = {*SERVICE_BUGS, *MUTANTS}


def plant(bug: str) -> None:
    """Put one of BUGS into this process."""
    if bug in SERVICE_BUGS:
        SERVICE_BUGS[bug]()
    else:
        _library(bug)
