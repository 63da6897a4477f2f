"""The chaos suite itself is `make chaos`; this is what must not be forgotten in it."""

from tests.chaos.scenarios import CELLS

from luthier_core.failpoints import POINTS


def test_somebody_is_killed_at_every_failpoint() -> None:
    points = {cell.partition("/")[0] for cells in CELLS.values() for cell in cells}
    assert points == POINTS


def test_no_crash_point_is_asked_for_twice() -> None:
    for role, cells in CELLS.items():
        assert len(set(cells)) == len(cells), role
