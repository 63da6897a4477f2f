"""What the newest release of `tinker` on the package index changes on the wire.

    python -m tests.compat.newest          exit code 1 if there is a release that we have not tested

Its code is read, never run: calls of paths are compared with endpoints.json, and the fields of its
messages with those of the release that we tested last.
"""

import ast
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.compat.matrix import NEWEST, install

ENDPOINTS = Path(__file__).with_name("endpoints.json")
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")
API = "/api/v1/"


@dataclass(frozen=True, slots=True)
class Wire:
    """What one release says to a server."""

    version: str
    calls: frozenset[str]
    """`METHOD /path/{}`."""
    fields: Mapping[str, str]
    """`Class.field` of its JSON and protobuf messages -> how it is declared."""


def read_wire(folder: Path) -> Wire:
    """Of the release in this folder."""
    (info,) = folder.glob("tinker-*.dist-info")
    version = info.name.removeprefix("tinker-").removesuffix(".dist-info")
    calls: set[str] = set()
    fields: dict[str, str] = {}
    package = folder / "tinker"
    for path in sorted(package.rglob("*.py*")):
        if path.suffix not in (".py", ".pyi") or path.stem.endswith("_test"):
            continue
        tree = ast.parse(path.read_text())
        calls |= set(_calls(tree))
        if path.parent.name in ("types", "shared", "_pydantic_types") or path.suffix == ".pyi":
            fields |= _fields(tree, "")
    return Wire(version, frozenset(calls), fields)


def known_calls() -> frozenset[str]:
    """What endpoints.json lists, in the same form."""
    rows = json.loads(ENDPOINTS.read_text())
    return frozenset(f"{row['method']} {_plain(row['path'])}" for row in rows)


def describe_changes(tested: Wire, newest: Wire) -> list[str]:
    """One line per difference; none if the wire is the same."""
    lines = [f"unknown endpoint: {call}" for call in sorted(newest.calls - known_calls())]
    lines += [f"call added: {call}" for call in sorted(newest.calls - tested.calls)]
    lines += [f"call removed: {call}" for call in sorted(tested.calls - newest.calls)]
    for name in sorted(tested.fields.keys() | newest.fields.keys()):
        before, after = tested.fields.get(name), newest.fields.get(name)
        if before is None:
            lines.append(f"field added: {name}: {after}")
        elif after is None:
            lines.append(f"field removed: {name}: {before}")
        elif before != after:
            lines.append(f"field changed: {name}: {before} -> {after}")
    return lines


def _calls(tree: ast.Module) -> Iterator[str]:
    """`client.post("/api/v1/x")` and `request("POST", "/api/v1/x")`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        texts = [_text(argument) for argument in node.args[:2]]
        path = next((text for text in texts if text.startswith(API)), None)
        if path is None:
            continue
        named = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        method = texts[0] if texts[0] in METHODS else named.strip("_").upper()
        if method in METHODS:
            yield f"{method} {_plain(path)}"


def _text(node: ast.expr) -> str:
    """A string, with what is put into it as {}; empty if it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "{}" for part in node.values)
    return ""


def _plain(path: str) -> str:
    return re.sub(r"\{\w*\}", "{}", path)


def _fields(tree: ast.Module | ast.ClassDef, prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= _fields(node, f"{prefix}{node.name}.")
        elif prefix and isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default = f" = {ast.unparse(node.value)}" if node.value else ""
            found[prefix + node.target.id] = ast.unparse(node.annotation) + default
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = ["--no-deps", "--no-cache-dir", "--target", str(folder), "tinker"]
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
        newest = read_wire(folder)
    tested = read_wire(install(NEWEST))
    changes = describe_changes(tested, newest)
    print(f"newest release: {newest.version}; tested: {tested.version}")
    print("\n".join(changes) or "nothing changes on the wire")
    return int(newest.version != tested.version)


if __name__ == "__main__":
    sys.exit(main())
