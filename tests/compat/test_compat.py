"""Releases of the official SDK, unmodified, against one stack: every public method of each."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.acceptance.stack import Stack, running_stack
from tests.compat.matrix import NEWEST, OPTIONS, Cell, install, read_cells, start_program
from tests.compat.newest import Wire, describe_changes, known_calls, read_wire

VERSIONS = ("0.6.3", "0.24.1", NEWEST)
"""Bare JSON; JSON with types and binary results; what is current. `make compat` runs them all."""


@pytest.fixture(scope="module")
def stack(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    data = tmp_path_factory.mktemp("compat") / "data"
    with running_stack(data, demo_model, *OPTIONS) as stack:
        yield stack


@pytest.fixture(scope="module")
def results(stack: Stack) -> dict[str, dict[str, Cell]]:
    """Version -> name -> cell; the programs run beside one another."""
    folders = {version: install(version) for version in VERSIONS}
    programs = {
        version: start_program(folder, stack, stack.api_key) for version, folder in folders.items()
    }
    return {version: read_cells(program) for version, program in programs.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_public_method_of_the_release_works_or_is_refused_with_a_reason(
    results: dict[str, dict[str, Cell]], version: str
) -> None:
    cells = results[version]
    assert sum(cell.state == "works" for cell in cells.values()) > 30
    assert all(cell.reason for cell in cells.values() if cell.state == "refused")
    fails = {name: cell.reason for name, cell in cells.items() if cell.state == "fails"}
    assert fails == {}


def test_the_newest_release_calls_nothing_that_is_not_known() -> None:
    wire = read_wire(install(NEWEST))
    assert len(wire.calls) > 40
    assert wire.calls <= known_calls()
    assert wire.fields["SampleRequest.num_samples"] == "int = 1"


def test_what_a_release_changes_on_the_wire_is_said() -> None:
    before = Wire("1.0.0", frozenset({"GET /a"}), {"A.x": "int", "A.y": "str"})
    after = Wire("1.1.0", frozenset({"POST /api/v1/asample"}), {"A.x": "float", "A.z": "int = 0"})
    assert describe_changes(before, after) == [
        "call added: POST /api/v1/asample",
        "call removed: GET /a",
        "field changed: A.x: int -> float",
        "field removed: A.y: str",
        "field added: A.z: int = 0",
    ]
