"""What is malicious is refused, class by class; every guard is needed (reliability S4 to S8)."""

from dataclasses import replace

import pytest
from tests.malicious.bombs import BOMBS
from tests.malicious.datums import DATUMS
from tests.malicious.harness import Family
from tests.malicious.model_folders import MODEL_FOLDERS
from tests.malicious.names import NAMES
from tests.malicious.payloads import PAYLOADS
from tests.malicious.tensor_files import FILES

FAMILIES = {
    family.name: family for family in (BOMBS, DATUMS, NAMES, PAYLOADS, FILES, MODEL_FOLDERS)
}


@pytest.mark.parametrize("name", FAMILIES)
def test_no_malicious_input_is_accepted(name: str, pytestconfig: pytest.Config) -> None:
    family = FAMILIES[name]
    if family is BOMBS:  # each costs what decompressing it costs
        family = replace(family, num_inputs=pytestconfig.getoption("bombs"))
    print(family.verify())


@pytest.mark.parametrize(
    ("family", "guard"),
    [(family, guard) for family in FAMILIES.values() for guard in family.guards],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_without_any_one_guard_the_suite_fails(
    family: Family, guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family.verify_guard(guard, monkeypatch)
