"""Metrics of a run: a line of JSON per step, and Weights & Biases if it is installed."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson

from luthier.optional import needed


@dataclass(frozen=True, slots=True)
class WandbConfig:
    """Where Weights & Biases files the metrics; its own settings come from its environment."""

    project: str
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


class MetricsLog:
    """Appends metrics to a JSONL file, and sends them to Weights & Biases where that is wanted.

        with MetricsLog("metrics.jsonl") as log:
            log.write({"loss": 0.5}, step=1)

    A line is {"step": ..., "time": seconds since 1970, ...}; NaN and infinities become null. Each
    is written at once, so a killed program loses none. ImportError if wandb is wanted and absent.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        wandb: WandbConfig | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """config: the run's hyperparameters, for Weights & Biases and the file's first line."""
        self._run = None if wandb is None else _start_wandb(wandb, config or {})
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = Path(path).open("ab", buffering=0)  # noqa: SIM115  # closed by close()
        if config:
            self._line({"config": dict(config), "time": time.time()})

    def write(self, metrics: Mapping[str, float], *, step: int) -> None:
        """One line."""
        self._line({"step": step, "time": time.time(), **metrics})
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Ends the run at Weights & Biases, and closes the file."""
        if self._run is not None:
            self._run.finish()
        self._file.close()

    def _line(self, value: Mapping[str, Any]) -> None:
        finite = {name: _finite(item) for name, item in value.items()}
        self._file.write(orjson.dumps(finite, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file that have a step. A last line that was cut off is left out."""
    lines: list[dict[str, Any]] = []
    for line in Path(path).read_bytes().splitlines():
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict) and "step" in value:
            lines.append(value)
    return lines


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(wanted: WandbConfig, config: Mapping[str, Any]) -> Any:
    return needed("wandb", "WandbConfig").init(
        project=wanted.project,
        name=wanted.name,
        group=wanted.group,
        tags=wanted.tags,
        config=dict(config),
    )
