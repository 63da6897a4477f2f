"""Who may import whom, and what no file may call."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SOURCES = {
    "luthier_core": ROOT / "core",
    "luthier_model": ROOT / "model",
    "luthier_gateway": ROOT / "gateway",
    "luthier_trainer": ROOT / "services" / "trainer",
    "luthier_sampler": ROOT / "services" / "sampler",
    "luthier_registry": ROOT / "services" / "registry",
    "luthier": ROOT / "sdk",
}

# The longest prefix of a module's name decides. Everything of ours that is not named is refused.
MAY_IMPORT = {
    "luthier_core": set(),
    "luthier_model": {"luthier_core"},
    "luthier_gateway": {"luthier_core"},
    "luthier_registry": {"luthier_core"},
    "luthier_trainer": {"luthier_core", "luthier_model"},
    "luthier_sampler": {"luthier_core", "luthier_model"},
    "luthier": {"luthier_core.proto", "luthier_core.types"},
    "luthier.up": {"luthier_core", "luthier"},
    "luthier.cli": {"luthier_core", "luthier"},
}

# What the SDK imports must work where only the SDK's own dependencies are installed.
NO_SERVER_PACKAGES = ("luthier", "luthier_core.proto", "luthier_core.types")
SERVER_SIDE = ("luthier.up",)
SERVER_PACKAGES = {"redis", "minio", "celery", "torch", "transformers", "psutil", "uvloop"}

NO_TORCH = ("luthier_core", "luthier_gateway", "luthier_registry", "luthier")
TORCH_PACKAGES = {"torch", "transformers", "peft", "safetensors"}

BANNED_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load"}

PROTOCOL_CALLS = {"admit", "acquire", "begin", "blame", "commit", "trim", "ffwd", "fail_range"}
"""Steps of a run's log whose order luthier_core.protocol decides, for services and simulation."""

MAY_TOUCH_ENVIRON = ("luthier.up", "luthier.cli", "luthier.settings", "luthier_core.testing")


def module_files() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of ours; a package's __init__ has the package's name."""
    for package, folder in SOURCES.items():
        for path in sorted((folder / package).rglob("*.py")):
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


FILES = dict(module_files())
MODULES = [pytest.param(name, id=name) for name in FILES if not name.endswith("_pb2")]


def imports(name: str, *, at_import_only: bool = False) -> set[str]:
    """Dotted names a module imports; at_import_only leaves out what a function imports."""
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return set(_imported(ast.parse(path.read_text()), package, at_import_only))


def _imported(tree: ast.AST, package: str, at_import_only: bool) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            # `from a import b` may import the module a.b: both names are judged.
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif at_import_only and isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING":
            continue
        elif not (at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from _imported(node, package, at_import_only)


def within(name: str, packages: set[str] | tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression; empty where it is something else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def test_every_package_of_the_wheel_is_judged() -> None:
    packaged = {path.parent.name for path in ROOT.glob("*/luthier*/__init__.py")}
    packaged |= {path.parent.name for path in ROOT.glob("services/*/luthier*/__init__.py")}
    assert packaged == set(SOURCES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_the_table_allows(name: str) -> None:
    row = max((prefix for prefix in MAY_IMPORT if within(name, {prefix})), key=len)
    allowed = MAY_IMPORT[row] | {row}
    # A package may import itself, but the SDK not its own server side.
    forbidden = {"luthier.up", "luthier.cli"} if row == "luthier" else set()
    ours = {i for i in imports(name) if within(i, set(SOURCES))}
    assert not {i for i in ours if not within(i, allowed) or within(i, forbidden)}


@pytest.mark.parametrize("name", MODULES)
def test_what_the_sdk_needs_imports_no_server_package(name: str) -> None:
    if within(name, NO_SERVER_PACKAGES) and not within(name, SERVER_SIDE):
        assert not {i for i in imports(name, at_import_only=True) if within(i, SERVER_PACKAGES)}


@pytest.mark.parametrize("name", MODULES)
def test_a_cpu_package_imports_no_torch(name: str) -> None:
    if within(name, NO_TORCH):
        # The SDK uses what its user has: torch and transformers, inside functions.
        lazily = within(name, ("luthier",))
        assert not {i for i in imports(name, at_import_only=lazily) if within(i, TORCH_PACKAGES)}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_deserialises_nothing_that_can_run_code(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    trusting = [
        keyword.value.lineno
        for call in calls
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code"
        and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
    ]
    assert not {i for i in imports(name) if within(i, BANNED_MODULES)}
    assert not {dotted(call.func) for call in calls} & BANNED_CALLS
    assert not trusting


@pytest.mark.parametrize("name", MODULES)
def test_only_an_entry_point_touches_the_environment(name: str) -> None:
    if name.endswith(".__main__") or within(name, MAY_TOUCH_ENVIRON):
        return
    tree = ast.parse(FILES[name].read_text())
    touched = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not touched & {"os.environ", "os.getenv", "os.putenv"}
    assert not imports(name) & {"os.environ", "os.getenv"}


@pytest.mark.parametrize("name", MODULES)
def test_the_log_is_written_only_where_the_protocol_core_asks_for_it(name: str) -> None:
    """The simulation tests luthier_core.protocol: no service has an order of steps of its own."""
    if name != "luthier_core.oplog":
        assert not list(own_steps(ast.parse(FILES[name].read_text())))


def own_steps(tree: ast.AST) -> Iterator[str]:
    """Calls that move a run's log, outside of a `case` of an effect that the core has yielded."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.match_case) and isinstance(node.pattern, ast.MatchClass):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            receiver, _, method = dotted(node.func).rpartition(".")
            if receiver.lstrip("_").endswith("oplog") and method in PROTOCOL_CALLS:
                yield f"{receiver}.{method} in line {node.lineno}"
        yield from own_steps(node)


def test_a_step_outside_of_the_protocol_core_is_seen() -> None:
    planted = ast.parse("async def f(self):\n    await self._oplog.commit('r', 1, 1, None)\n")
    assert list(own_steps(planted))
    asked_for = "match effect:\n    case Commit(r, e, s, o):\n        oplog.commit(r, e, s, o)\n"
    assert not list(own_steps(ast.parse(asked_for)))


def test_the_table_sees_an_import_that_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "planted.py"
    path.write_text("def f():\n    from luthier_trainer.engine import Engine\n")
    monkeypatch.setitem(FILES, "luthier_gateway.planted", path)

    with pytest.raises(AssertionError):
        test_a_module_imports_only_what_the_table_allows("luthier_gateway.planted")
