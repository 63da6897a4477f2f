"""The quickstart of the documentation as a process, followed step by step."""

import json
import os
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
class Ended:
    """How a quickstart went; `learnt` is what its --json says, but for how long it took."""

    exit_code: int
    lines: Sequence[tuple[float, str]]
    """When each line of output came, in seconds, and the line."""
    learnt: dict[str, Any]

    @property
    def output(self) -> str:
        return "".join(line for _, line in self.lines)

    def longest_wait_s(self, start: str) -> float:
        """The longest silence from the line that begins with `start` on."""
        first = next(i for i, (_, line) in enumerate(self.lines) if line.startswith(start))
        return max(after - before for (before, _), (after, _) in pairwise(self.lines[first:]))


def run_quickstart(
    stack: Stack, api_key: str, folder: Path, *, on_line: Callable[[str], None] = lambda line: None
) -> Ended:
    """Runs the example to its end; `on_line` is called with every line it prints, as it does."""
    report = folder / "quickstart.json"
    # Reading its output below has no limit of its own.
    argv = ["timeout", str(MAX_S), sys.executable, str(EXAMPLE), "--json", str(report)]
    environ = {**os.environ, "TINKER_BASE_URL": stack.url, "TINKER_API_KEY": api_key}
    lines = []
    with subprocess.Popen(
        argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic(), line))
            on_line(line)
    learnt = json.loads(report.read_text()) if report.exists() else {}
    learnt.pop("training_s", None)
    return Ended(process.returncode, lines, learnt)
