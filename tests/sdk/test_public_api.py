"""The names, types and documents of the public API."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
from tests.acceptance.stack import Stack
from tests.sdk import typed_program
from tests.sdk.conftest import KEYS

import luthier
from luthier import types

ROOT = Path(__file__).parents[2]
CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "APIFuture")

NOT_OURS = {
    "ServiceClient": {"create_custom_loss", "get_console_url", "get_telemetry", "holder"},
    "TrainingClient": {"get_console_url", "get_telemetry"},
    "SamplingClient": {"create", "get_telemetry", "on_queue_state_change"},
    "RestClient": {"get_telemetry", "whoami"},
    "APIFuture": set(),
}
"""What the official clients have and ours leave out: telemetry, a hosted console, its internals."""
PARAMETERS_NOT_OURS = {"retry_config", "record_stability_info", "loss_type_input", "kwargs"}


@pytest.mark.parametrize("name", CLIENTS)
def test_every_method_of_the_official_client_is_there(name: str) -> None:
    official = {m for m in vars(getattr(tinker, name)) if not m.startswith("_")}
    assert official - NOT_OURS[name] <= set(dir(getattr(luthier, name)))


@pytest.mark.parametrize("name", CLIENTS)
def test_arguments_have_the_official_names_order_and_defaults(name: str) -> None:
    ours, official = getattr(luthier, name), getattr(tinker, name)
    for method, function in vars(official).items():
        if method.startswith("_") or method in NOT_OURS[name] or not callable(function):
            continue
        if method == "close":  # ours needs no status
            continue
        expected = {
            key: (value.default, value.kind)
            for key, value in inspect.signature(function).parameters.items()
            if key not in PARAMETERS_NOT_OURS
        }
        actual = inspect.signature(getattr(ours, method)).parameters
        assert {k: (v.default, v.kind) for k, v in actual.items()} == expected, method
        assert list(actual) == list(expected), method


@pytest.mark.parametrize("name", [n for n in tinker.__all__ if n.endswith("Error")])
def test_every_official_exception_is_there_with_its_bases(name: str) -> None:
    ours: Any = getattr(luthier, name)
    bases = {base.__name__ for base in getattr(tinker, name).__mro__} - {"TinkerError"}
    assert bases <= {base.__name__ for base in ours.__mro__}
    assert issubclass(ours, luthier.TinkerError)


OWN_FIELDS = {
    "GetSamplerResponse": {"tokenizer_id"},
    "SaveWeightsExternalResponse": {"size_bytes"},
    "TrainingRun": {"recovered"},
}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in types.__all__
        if hasattr(getattr(types, name), "model_fields") and hasattr(tinker.types, name)
    ],
)
def test_the_fields_of_a_type_are_the_official_ones(name: str) -> None:
    official: Any = getattr(tinker.types, name)
    ours: Any = getattr(types, name)
    if name.endswith("Request"):  # the server's own: it takes more than any one client sends
        return
    missing = set(official.model_fields) - set(ours.model_fields) - {"type"}
    more = set(ours.model_fields) - set(official.model_fields) - OWN_FIELDS.get(name, set())
    assert (missing, more - {"type"}) == (set(), set())


def test_every_public_name_has_a_docstring() -> None:
    named = [(name, getattr(luthier, name)) for name in luthier.__all__]
    named += [(name, getattr(types, name)) for name in types.__all__]
    for client in CLIENTS:
        cls = getattr(luthier, client)
        named += [(f"{client}.{m}", v) for m, v in vars(cls).items() if not m.startswith("_")]
    functions = [(n, v) for n, v in named if inspect.isclass(v) or inspect.isfunction(v)]
    assert [n for n, v in functions if not (v.__doc__ or "").strip()] == []


@pytest.mark.slow
def test_a_typed_program_passes_strict_mypy() -> None:
    program = ROOT / "tests" / "sdk" / "typed_program.py"
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", program],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, (ROOT / "sdk", ROOT / "core")))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


async def test_the_typed_program_runs(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", stack.url)
    monkeypatch.setenv("TINKER_API_KEY", KEYS["ann"])
    assert len(await typed_program.main()) == 2


def test_importing_it_imports_nothing_that_it_does_not_need() -> None:
    heavy = {"aiohttp", "torch", "transformers", "rich", "typer", "redis", "minio"}
    program = f"import sys, luthier; print(sorted({heavy!r} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert answer.stdout == "[]\n"


def raised_in(function: Any) -> set[str]:
    """Names of the exceptions that the body of a function raises itself."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):  # not written in Python
        return set()
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    return {
        call.func.id for call in calls if isinstance(call, ast.Call) and hasattr(call.func, "id")
    }


def public_functions() -> Iterator[tuple[str, Any, str]]:
    """(name, function, its documentation and that of its class)."""
    for module in (luthier, types, luthier.data, luthier.metrics):
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            if name.startswith("_") or not getattr(value, "__module__", "").startswith("luthier."):
                continue
            if inspect.isfunction(value):
                yield name, value, value.__doc__ or ""
            elif inspect.isclass(value):
                for method, function in list(vars(value).items()):
                    function = getattr(function, "__func__", function)
                    if inspect.isfunction(function) and not method.startswith("_"):
                        documents = f"{value.__doc__} {function.__doc__}"
                        yield f"{name}.{method}", function, documents


def test_a_docstring_names_the_errors_that_its_function_raises() -> None:
    untold = {
        name: missing
        for name, function, documents in public_functions()
        if (missing := {error for error in raised_in(function) if error not in documents})
    }
    assert untold == {}


UNITS = {"timeout": "second", "ttl_seconds": "ttl_seconds", "max_length": "token"}
"""Parameter -> the word that its documentation has."""


def test_a_docstring_gives_the_unit_of_its_numbers() -> None:
    untold = {
        name: parameter
        for name, function, documents in public_functions()
        for parameter in inspect.signature(function).parameters
        if parameter in UNITS and UNITS[parameter] not in f"{documents} {parameter}"
    }
    assert untold == {}


def test_a_type_that_holds_arrays_says_their_shapes() -> None:
    arrays = {
        name: value
        for name in types.__all__
        if inspect.isclass(value := getattr(types, name))
        and any("ndarray" in str(a) for a in inspect.get_annotations(value).values())
    }
    assert {"SampledSequence", "SampleResponse", "TopkLogprobs"} <= set(arrays)
    assert [name for name, value in arrays.items() if "[" not in (value.__doc__ or "")] == []


def test_the_reference_page_is_made_of_the_docstrings() -> None:
    spec = importlib.util.spec_from_file_location("sdk_reference", ROOT / "docs/sdk_reference.py")
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)

    def sentences(page: str) -> list[str]:
        """Without the types, which each release of Python spells in its own way."""
        return re.sub(r"```python\n.*?```|^\* .*$", "", page, flags=re.DOTALL | re.M).split("\n")

    assert sentences(reference.page()) == sentences(reference.PAGE.read_text())
