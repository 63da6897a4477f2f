"""The description of the API: every route is in it, and what it says can be relied on."""

import json
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from luthier_gateway.app import API, OPEN_PATHS, routes
from luthier_gateway.openapi import OPERATIONS, describe

DESCRIPTION = describe(routes(), prefix=API, open_paths=OPEN_PATHS)
OPERATION_LIST = [
    (method, path, operation)
    for path, operations in DESCRIPTION["paths"].items()
    for method, operation in operations.items()
]
PROTOCOL = json.loads((Path(__file__).parents[1] / "compat" / "endpoints.json").read_text())
"""Every endpoint that some release of the official SDK has a method for."""
NOT_SERVED = {f"{API}/unload_model", f"{API}/sample"}
"""Optional ones that no public method of a release from 0.3.0 on calls."""
EXAMPLES = {
    "session_id": "s",
    "sampler_id": "s:sample:0",
    "model_id": "s:train:0",
    "training_run_id": "s:train:0",
    "checkpoint_id": "weights/step-1",
}


def test_every_route_is_described() -> None:
    undescribed = [
        route.handler.__name__  # type: ignore[attr-defined]
        for route in routes()
        if route.path.startswith(f"{API}/")
        and "/files/" not in route.path
        and route.handler not in OPERATIONS
    ]
    assert not undescribed, "a new route needs a line in OPERATIONS of openapi.py"
    assert len(OPERATION_LIST) == sum(
        route.path.startswith(f"{API}/") and "/files/" not in route.path for route in routes()
    )


@pytest.mark.parametrize(
    ("method", "path"), [(row["method"], row["path"]) for row in PROTOCOL], ids=str
)
async def test_every_endpoint_of_the_protocol_has_a_route(method: str, path: str) -> None:
    app = web.Application()
    app.add_routes(routes())
    request = make_mocked_request(method, path.format_map(EXAMPLES))
    found = (await app.router.resolve(request)).http_exception is None
    assert found is (path not in NOT_SERVED)


def test_a_route_that_is_not_described_stops_the_start() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response()

    with pytest.raises(KeyError):
        describe([web.get(f"{API}/x", handler)], prefix=API, open_paths=())


def test_every_reference_leads_somewhere() -> None:
    schemas = DESCRIPTION["components"]["schemas"]
    text = json.dumps(DESCRIPTION)
    references = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert references <= schemas.keys()
    assert {"CreateModel", "Sample", "SearchSessions", "Error"} <= schemas.keys()


def test_operations_have_names_of_their_own_and_a_summary() -> None:
    names = [operation["operationId"] for _, _, operation in OPERATION_LIST]
    assert len(set(names)) == len(names), sorted(names)
    assert all(operation["summary"] for _, _, operation in OPERATION_LIST)


def test_parts_of_a_path_are_parameters() -> None:
    path = f"{API}/training_runs/{{run_id}}/checkpoints/{{kind}}/{{name}}/publish"
    parameters = DESCRIPTION["paths"][path]["post"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == ["run_id", "kind", "name"]
    assert parameters[1]["schema"]["enum"] == ["weights", "sampler_weights", "external_weights"]


def test_only_health_needs_no_key() -> None:
    open_to_all = [path for _, path, operation in OPERATION_LIST if operation.get("security") == []]
    assert open_to_all == [f"{API}/healthz"]
    assert DESCRIPTION["security"] == [{"key": []}]
