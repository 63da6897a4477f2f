"""The quickstart of the documentation as a process, followed step by step."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.acceptance.stack import Stack

EXAMPLE = Path(__file__).parents[2] / "examples" / "pig_latin.py"
MAX_S = 240


@dataclass(frozen=True, slots=True)
class Line:
    """One line of output, when it came, and the step that had been reported by then."""

    text: str
    at_s: float
    step: int


@dataclass(frozen=True, slots=True)
class Ended:
    """How a quickstart went; `learnt` is what its --json says, but for how long it took."""

    exit_code: int
    lines: Sequence[Line]
    learnt: dict[str, Any]

    @property
    def output(self) -> str:
        return "".join(line.text for line in self.lines)

    def longest_wait_s(self, step: int) -> float:
        """The longest silence from the report of a step until after the report of the next."""
        pairs = pairwise(self.lines)
        return max(after.at_s - before.at_s for before, after in pairs if before.step == step)


def run_quickstart(
    stack: Stack, api_key: str, folder: Path, *, on_step: Callable[[int], None] = lambda step: None
) -> Ended:
    """Runs the example to its end; `on_step` is called with each step that it reports."""
    report = folder / "quickstart.json"
    # Reading its output below has no limit of its own.
    argv = ["timeout", str(MAX_S), sys.executable, str(EXAMPLE), "--json", str(report)]
    environ = {**os.environ, "TINKER_BASE_URL": stack.url, "TINKER_API_KEY": api_key}
    lines, step = [], 0
    with subprocess.Popen(
        argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for text in process.stdout:
            reported = re.match(r"step (\d+) of", text)
            step = int(reported[1]) if reported else step
            lines.append(Line(text, time.monotonic(), step))
            if reported:
                on_step(step)
    learnt = json.loads(report.read_text()) if report.exists() else {}
    learnt.pop("training_s", None)
    return Ended(process.returncode, lines, learnt)
