"""Runs training loops of `tinker_cookbook` against a stack, and reads what they measured.

    python -m tests.cookbook.run --python .venv-cookbook/bin/python [--keep FOLDER] [RECIPE ...]

Exits with 0 only if every recipe ended well and did what it is for: see RECIPES. Nothing is
downloaded while they run: the tokenizer lies in a Hub cache that is made here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from tests.acceptance.stack import BASE_MODEL, Stack, running_stack

from luthier_model.demo import ensure_demo_model

ROOT = Path(__file__).parents[2]
LOOPS = str(Path(__file__).with_name("recipes.py"))
CACHE = ROOT / ".cookbook"
MAX_S = 900
"""For one recipe."""

Metrics = list[dict[str, Any]]
"""One row per step, as the cookbook logged it."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training loop, and how its rows of metrics show that it did its work."""

    argv: Callable[["Bench", Path], Sequence[str]]
    """Arguments of the cookbook's Python, given the folder for logs."""
    check: Callable[[Metrics], str]
    """What it achieved, in words; AssertionError if that is too little."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where recipes run."""

    stack: Stack
    python: Path
    folder: Path

    def run(self, name: str) -> str:
        """How long the recipe took, and what it achieved."""
        recipe, log = RECIPES[name], self.folder / name
        begun = time.monotonic()
        output = self.folder / f"{name}.log"
        with output.open("wb") as written:
            code = subprocess.run(
                ["timeout", str(MAX_S), str(self.python), *recipe.argv(self, log)],
                cwd=self.folder,
                env=self._environ(),
                stdout=written,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code != 0:
            raise AssertionError(f"exit code {code}\n{output.read_text()[-3000:]}")
        rows = read_lines(log / "metrics.jsonl")
        return f"{time.monotonic() - begun:.0f} s, {recipe.check(rows)}"

    def checkpoint(self, name: str, kind: str) -> str:
        """The path of the last checkpoint of a recipe that has been run."""
        rows = read_lines(self.folder / name / "checkpoints.jsonl")
        return str([row[kind] for row in rows if kind in row][-1])

    def _environ(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return kept | {
            "TINKER_BASE_URL": self.stack.url,
            "TINKER_API_KEY": self.stack.api_key,
            "TINKER_TELEMETRY": "0",
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
        }


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loop(name: str, *arguments: str) -> Callable[[Bench, Path], Sequence[str]]:
    """A loop of recipes.py."""
    return lambda bench, log: [LOOPS, name, "--model", BASE_MODEL, "--log", str(log), *arguments]


def with_teacher(name: str) -> Callable[[Bench, Path], Sequence[str]]:
    """A loop of recipes.py whose teacher is what the supervised recipe has trained."""

    def argv(bench: Bench, log: Path) -> Sequence[str]:
        weights = bench.checkpoint("supervised", "sampler_path")
        return loop(name, "--teacher", weights)(bench, log)

    return argv


def arithmetic(bench: Bench, log: Path) -> Sequence[str]:
    """The cookbook's own command line; of the loss that it takes by default there is no formula."""
    return [
        *("-m", "tinker_cookbook.recipes.math_rl.train", "env=arithmetic"),
        *(f"model_name={BASE_MODEL}", "renderer_name=qwen3_instruct", f"log_path={log}"),
        *("loss_fn=importance_sampling", "learning_rate=1e-3", "lora_rank=16", "max_tokens=8"),
        *("group_size=8", "groups_per_batch=16", "max_steps=10", "eval_every=0", "save_every=5"),
    ]


def ends(name: str) -> Callable[[Metrics], tuple[float, float]]:
    """The metric's mean over the first and over the last quarter of the steps that have it."""

    def read(rows: Metrics) -> tuple[float, float]:
        values = [float(row[name]) for row in rows if name in row]
        if not values:
            raise AssertionError(f"no metric {name}; there are {sorted(set().union(*rows))}")
        quarter = max(1, len(values) // 4)
        return mean(values[:quarter]), mean(values[-quarter:])

    return read


def falls(name: str, *, to: float) -> Callable[[Metrics], str]:
    """The metric ends at or below `to` times where it began."""

    def check(rows: Metrics) -> str:
        first, last = ends(name)(rows)
        text = f"{name} {first:.3f} → {last:.3f}"
        assert last <= to * first, text
        return text

    return check


def rises(name: str, *, to: float) -> Callable[[Metrics], str]:
    """The metric ends at or above `to`, and began below."""

    def check(rows: Metrics) -> str:
        first, last = ends(name)(rows)
        text = f"{name} {first:.3f} → {last:.3f}"
        assert first < to <= last, text
        return text

    return check


RECIPES: dict[str, Recipe] = {
    "supervised": Recipe(loop("supervised"), falls("train_mean_nll", to=0.5)),
    # The demo model cannot add: what it learns is to end its answers, which is rewarded as well.
    "arithmetic": Recipe(arithmetic, rises("env/all/format", to=0.95)),
    "dpo": Recipe(loop("dpo"), falls("dpo_loss", to=0.8)),
    "on_policy": Recipe(with_teacher("on_policy"), falls("teacher_kl", to=0.8)),
    "off_policy": Recipe(with_teacher("off_policy"), falls("train/loss:sum", to=0.6)),
}
"""In the order in which they need one another."""


@contextmanager
def running_bench(python: Path, folder: Path) -> Iterator[Bench]:
    """A stack, and a Hub cache that holds the tokenizer of its model."""
    model = ensure_demo_model(CACHE / "demo-model")
    fill_hub_cache(folder / "hf" / "hub", model)
    with running_stack(folder / "data", model) as stack:
        yield Bench(stack, python, folder)


def fill_hub_cache(hub: Path, model: Path) -> None:
    """As if the model had been downloaded from the Hub under the name it is served under."""
    repository = hub / f"models--{BASE_MODEL.replace('/', '--')}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(model)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--python", type=Path, required=True, help="that has tinker_cookbook")
    parser.add_argument("--keep", type=Path, help="new folder for logs and data")
    options = parser.parse_args()
    unknown = set(options.recipes) - RECIPES.keys()
    if unknown:
        parser.error(f"{sorted(unknown)}; there are {', '.join(RECIPES)}")
    failed = []
    with tempfile.TemporaryDirectory(prefix="lu-cb-") as temporary:
        folder = (options.keep or Path(temporary)).absolute()
        with running_bench(options.python.absolute(), folder) as bench:
            for name in options.recipes or RECIPES:
                try:
                    print(f"{name}: {bench.run(name)}", flush=True)
                except AssertionError as error:
                    failed.append(name)
                    print(f"{name}: FAILED: {error}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
