"""Programs in the form of the documentation's, under `import luthier as tinker`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.acceptance.stack import Stack
from tests.sdk.conftest import KEYS

pytestmark = pytest.mark.slow
PROGRAMS = Path(__file__).parent / "programs"
MAX_S = 240


def run(program: str, stack: Stack, folder: Path, *, sdk: str) -> str:
    """What a program prints, with one of the two SDKs under the name tinker."""
    source = (PROGRAMS / f"{program}.py").read_text()
    if sdk == "luthier":
        source = re.sub(r"^import tinker$", "import luthier as tinker", source, flags=re.M)
        source = re.sub(r"^from tinker import", "from luthier import", source, flags=re.M)
        assert not re.search(r"^(import|from) tinker", source, flags=re.M)
    path = folder / f"{program}_{sdk}.py"
    path.write_text(source)
    environ = {**os.environ, "TINKER_BASE_URL": stack.url, "TINKER_API_KEY": KEYS["ann"]}
    ended = subprocess.run(
        [sys.executable, path],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=MAX_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize("program", sorted(path.stem for path in PROGRAMS.glob("*.py")))
def test_a_program_of_the_documentation_runs(program: str, stack: Stack, tmp_path: Path) -> None:
    assert run(program, stack, tmp_path, sdk="luthier")


@pytest.mark.parametrize("program", ["quickstart", "custom_loss", "losses", "save_load"])
def test_a_program_prints_what_it_prints_with_the_official_client(
    program: str, stack: Stack, tmp_path: Path
) -> None:
    ours = run(program, stack, tmp_path, sdk="luthier")
    assert ours == run(program, stack, tmp_path, sdk="tinker")
