"""The recipes run as they are written down, on a few steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.acceptance.stack import ANSWER_S, Stack
from tests.sdk.conftest import KEYS

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
SAYS = {
    "supervised": (["--epochs", "3"], "tinker://"),
    "reinforce": (["--steps", "2", "--group", "4"], "step 1: mean reward"),
    "preferences": (["--steps", "3"], "step 2: loss"),
    "evaluate": (["--workers", "1"], "of 3 right"),
}
"""Recipe -> (arguments, what is in its output)."""


def test_every_recipe_is_run_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("recipe", SAYS)
def test_a_recipe_runs(recipe: str, stack: Stack, tmp_path: Path) -> None:
    arguments, said = SAYS[recipe]
    ended = subprocess.run(
        [sys.executable, str(RECIPES / f"{recipe}.py"), *arguments],
        cwd=tmp_path,
        env={**os.environ, "TINKER_BASE_URL": stack.url, "TINKER_API_KEY": KEYS["ann"]},
        capture_output=True,
        text=True,
        timeout=ANSWER_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert said in ended.stdout
