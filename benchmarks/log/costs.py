"""The top costs of a process that ran under cProfile."""

import pstats
from pathlib import Path

SOME_PATH = 3
"""How much of a file's path is shown."""


def top_costs(file: Path, num: int) -> list[str]:
    """One line for each of the functions in which most time was spent, their callees left out."""
    stats = pstats.Stats(str(file)).stats  # type: ignore[attr-defined]
    rows = sorted(stats.items(), key=lambda item: -item[1][2])
    total = sum(row[2] for _, row in rows)
    return [
        f"{own:.2f} s own ({100 * own / total:.0f} %), {cumulative:.2f} s in all, {calls:,} calls: "
        f"{'/'.join(Path(path).parts[-SOME_PATH:])}:{line} {name}"
        for (path, line, name), (_, calls, own, cumulative, _) in rows[:num]
    ]
