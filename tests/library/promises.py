"""What must hold of a log after every step, whatever the calls were: reliability G2, G4, G15, 2.3.

It looks at one state and the one before, not at the calls; so it also judges the model itself.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, cast

from tests.library.model import Model, Run


@dataclass(slots=True)
class Promises:
    """Checks a model after each step. Roll it back with the model, by `copy`."""

    before: Model = field(default_factory=Model)
    last_commit_epoch: dict[str, int] = field(default_factory=dict)
    used_up: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Seqs of a run that were admitted without an entry, by ffwd or fail_range."""

    def copy(self) -> "Promises":
        used_up = defaultdict(set, {run_id: seqs.copy() for run_id, seqs in self.used_up.items()})
        return Promises(self.before.copy(), self.last_commit_epoch.copy(), used_up)

    def note_commit(self, run_id: str, epoch: int) -> None:
        """An outcome was written. With an older epoch than one before, a zombie wrote it."""
        last = self.last_commit_epoch.get(run_id, epoch)
        assert epoch >= last, f"{run_id}: epoch {epoch} commits after {last}"
        self.last_commit_epoch[run_id] = epoch

    def note_used_up(self, run_id: str, seqs: range) -> None:
        self.used_up[run_id].update(seqs)

    def note_expiry(self, name: tuple[str, int] | tuple[str, str]) -> None:
        for records in cast(list[dict[Any, Any]], [self.before.outcomes, self.before.samples]):
            records.pop(name, None)

    def check(self, model: Model) -> None:
        for run_id, run in model.runs.items():
            self._check_run(run_id, run)
            if before := self.before.runs.get(run_id):
                _check_forward(before, run)
        for name, outcome in self.before.outcomes.items():
            assert model.outcomes.get(name) == outcome, f"{name}: outcome changed"
        for sample, fields in self.before.samples.items():
            if fields["state"] != "queued":
                assert model.samples.get(sample) == fields, f"{sample}: outcome changed"
        for clone, entries in model.completed.items():
            last = model.num_completed[clone]
            assert sorted(entries) == list(range(last - len(entries) + 1, last + 1))
            known = self.before.completed.get(clone, {})
            assert all(entries[n] == known[n] for n in entries.keys() & known.keys())
        self.before = model.copy()

    def _check_run(self, run_id: str, run: Run) -> None:
        assert -1 <= run.trimmed <= run.committed <= run.admitted
        wanted = set(range(run.trimmed + 1, run.admitted + 1)) - self.used_up[run_id]
        assert set(run.log) == wanted, f"{run_id}: the log holds {sorted(run.log)}"
        # The lowest gap is a real gap: what could be executed is not left parked.
        assert min(run.parked, default=run.admitted + 2) > run.admitted + 1
        waiting = [op for seq, op in (run.log | run.parked).items() if seq > run.committed]
        assert run.pending_bytes == sum(op.body.num_bytes for op in waiting)
        assert set(run.attempts) | set(run.deaths) <= {run.committed + 1}
        assert all(run.deaths[seq] <= run.attempts[seq][0] for seq in run.deaths)
        assert run.told < min(run.untold, default=run.committed + 1)
        assert run.untold <= set(range(run.committed + 1))
        assert bool(run.gap_since) == bool(run.parked)


def _check_forward(before: Run, run: Run) -> None:
    for name in ("epoch", "admitted", "committed", "told", "trimmed", "published"):
        assert getattr(run, name) >= getattr(before, name), f"{name} went back"
    for seq in before.log.keys() & run.log.keys():
        assert before.log[seq] == run.log[seq], f"the entry of seq {seq} changed"
