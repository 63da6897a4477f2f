"""A running stack for our own client, shared by all tests that leave it unharmed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.acceptance.stack import Stack, running_stack

import luthier

KEYS = {"ann": "tml-sdk-key-of-ann", "bob": "tml-sdk-key-of-bob"}
"""Tenant -> its API key."""
BASE_MODEL = "luthier/demo"


@pytest.fixture(scope="session")
def stack(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """`luthier up` with the demo model and two tenants."""
    options = [f"--api-key={key}={tenant}" for tenant, key in KEYS.items()]
    with running_stack(tmp_path_factory.mktemp("sdk") / "data", demo_model, *options) as running:
        yield running


@pytest.fixture
def service(stack: Stack) -> Iterator[luthier.ServiceClient]:
    """A client of tenant ann with a session of its own."""
    with luthier.ServiceClient(base_url=stack.url, api_key=KEYS["ann"]) as client:
        yield client


@pytest.fixture
def training(service: luthier.ServiceClient) -> luthier.TrainingClient:
    return service.create_lora_training_client(BASE_MODEL, rank=4, seed=1).result()
