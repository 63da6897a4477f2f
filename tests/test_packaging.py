"""The wheel has every package and its data, and CPU packages import without torch."""

import contextlib
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE_FOLDERS = [*ROOT.glob("*/luthier*/"), *ROOT.glob("services/*/luthier*/")]
CPU_MODULES = [
    "luthier",
    "luthier.cli",
    "luthier.up.run",
    "luthier_core.validation",
    "luthier_gateway.app",
    "luthier_registry.app",
    "luthier_trainer.__main__",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel that is built here, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_wheel_has_every_file_of_every_package(wheel: set[str]) -> None:
    shipped = {
        str(path.relative_to(folder.parent))
        for folder in PACKAGE_FOLDERS
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(PACKAGE_FOLDERS) == 7
    assert shipped <= wheel
    assert {"luthier_core/oplog.lua", "luthier_core/proto/wire.proto"} <= shipped
    assert {f"{folder.name}/py.typed" for folder in PACKAGE_FOLDERS} <= shipped


def test_the_wheel_has_nothing_else_but_its_metadata(wheel: set[str]) -> None:
    packages = {folder.name for folder in PACKAGE_FOLDERS}
    others = {name for name in wheel if name.split("/")[0] not in packages}
    assert all(name.split("/")[0].endswith(".dist-info") for name in others)


@pytest.mark.parametrize("module", CPU_MODULES)
def test_a_cpu_module_imports_without_torch(module: str) -> None:
    program = f"import sys, {module}; assert 'torch' not in sys.modules; print('ok')"
    answer = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert answer.stdout == "ok\n"


def test_the_command_starts_without_server_packages() -> None:
    program = (
        "import sys, luthier.cli; print(sorted({'redis', 'psutil', 'minio'} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert answer.stdout == "[]\n"


def test_the_client_alone_needs_what_it_names_and_nothing_of_the_server() -> None:
    """Every module that the SDK loads comes from its dependencies, or theirs."""
    program = (
        "import sys, luthier, aiohttp\n"
        "luthier.types.SampleRequest, luthier.data, luthier.wire\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    owners = packages_distributions()
    names = answer.stdout.split()
    loaded = {canonicalize_name(owner) for name in names for owner in owners.get(name, ())}
    # The last one shares the namespace package `google` with protobuf.
    strangers = {"pip", "setuptools", "googleapis-common-protos"}
    assert loaded - closure("luthier") <= strangers
    assert {"redis", "minio", "torch", "rich", "typer", "celery"} & closure("luthier") == set()


def closure(name: str) -> set[str]:
    """Distributions that `pip install name` brings, without extras, by their canonical names."""
    found: set[str] = set()
    todo = [name]
    while todo:
        one = canonicalize_name(todo.pop())
        if one in found:
            continue
        found.add(one)
        with contextlib.suppress(PackageNotFoundError):  # for another platform or Python
            for line in requires(one) or []:
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    todo.append(requirement.name)
    return found
