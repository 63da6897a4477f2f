"""Stacks to drive with the official SDK: one that tests share, and folders for their own."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from tests.acceptance.quickstart import Ended, run_quickstart
from tests.acceptance.stack import Stack, running_stack
from transformers import AutoTokenizer, PreTrainedTokenizerFast

KEYS = {"alpha": "tml-acceptance-key-of-alpha", "beta": "tml-acceptance-key-of-beta"}
"""Tenant -> its API key on the shared stack."""

SDK_LEAKS = (
    "ignore:unclosed transport <_SelectorSocketTransport:ResourceWarning",
    "ignore:unclosed <socket.socket:ResourceWarning",
)
"""SDK 0.38 never closes the connection that it asks for its configuration with."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for leak in SDK_LEAKS:
                item.add_marker(pytest.mark.filterwarnings(leak))


@pytest.fixture(autouse=True)
def collect_sdk_leaks() -> Iterator[None]:
    """What the SDK leaks is found here, where it is expected, and not in some later test."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def tokenizer(demo_model: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(demo_model, local_files_only=True)


@pytest.fixture(scope="session")
def shared_stack(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with two tenants that every test leaves running and unharmed."""
    options = [f"--api-key={key}={tenant}" for tenant, key in KEYS.items()]
    with running_stack(tmp_path_factory.mktemp("shared") / "data", demo_model, *options) as stack:
        yield stack


@pytest.fixture(scope="session")
def undisturbed(shared_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The quickstart as it goes when nothing happens to its stack."""
    return run_quickstart(shared_stack, KEYS["alpha"], tmp_path_factory.mktemp("quickstart"))


@pytest.fixture
def service(shared_stack: Stack) -> Iterator[tinker.ServiceClient]:
    """The official SDK as tenant alpha of the shared stack."""
    with shared_stack.service(KEYS["alpha"]) as client:
        yield client
