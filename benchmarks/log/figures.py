"""Percentiles, slopes, and the tables that people and machines read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Sample = list[float]
"""Milliseconds, one per repetition."""


def p50(sample: Sequence[float]) -> float:
    return float(np.percentile(sample, 50))


def p99(sample: Sequence[float]) -> float:
    return float(np.percentile(sample, 99))


def slope(values: Sequence[float]) -> float:
    """Least squares: how much a value grows per step of the sequence; 0 for fewer than two."""
    if len(values) < 2:
        return 0.0
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


def ms(sample: Sequence[float]) -> str:
    """`p50 / p99 ms`."""
    return f"{p50(sample):.2f} / {p99(sample):.2f} ms"


@dataclass(slots=True)
class Part:
    """What one part has measured."""

    title: str
    head: tuple[str, ...] = ("", "measured", "ceiling or aim")
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def row(self, *cells: str) -> None:
        self.rows.append(cells)

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""]
        for cells in (self.head, tuple("---" for _ in self.head), *self.rows):
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"* {note}" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def json(self) -> str:
        rounded = {name: round(value, 3) for name, value in self.figures.items()}
        return json.dumps({"bench": "log", "part": self.title, **rounded})
