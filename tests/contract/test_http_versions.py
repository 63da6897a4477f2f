"""What a gateway does differently for one release of the SDK and another."""

from dataclasses import replace
from typing import Any

import pytest
from tests.contract.gateway_client import Api
from tests.contract.gateway_stack import GatewayStack

import luthier_gateway.futures


def sent_by(version: str) -> dict[str, str]:
    return {"User_Agent": f"AsyncTinker/Python {version}"}


@pytest.mark.parametrize(
    "headers",
    [
        sent_by("0.0.1-alpha.1"),  # as 0.1.0 to 0.2.2 say
        sent_by("0.2.2"),
        {"X_Stainless_Package_Version": "0.0.1-alpha.1"},
    ],
)
@pytest.mark.parametrize("endpoint", ["create_model", "sample", "asample", "retrieve_future"])
async def test_a_release_without_sessions_is_told_to_upgrade(
    api: Api, headers: dict[str, str], endpoint: str
):
    answer = await api.post(endpoint, {"base_model": "x"}, **headers)
    assert answer.status == 400
    assert "0.3.0 or newer" in answer.detail
    assert "pip install -U tinker" in answer.detail


@pytest.mark.parametrize("version", ["0.3.0", "0.38.0", "1.0.0", "none"])
async def test_other_releases_and_other_clients_are_served(api: Api, version: str):
    assert (await api.post("create_session", {}, **sent_by(version))).status == 200


async def test_a_model_without_a_session_is_a_400_that_names_it(api: Api):
    answer = await api.post("create_model", {"base_model": "tiny/base"})
    assert answer.status == 400
    assert "session_id" in answer.detail


async def config_of(api: Api, version: str) -> dict[str, Any]:
    body = {"sdk_version": version}
    answer = await api.post("client/config", body, **sent_by(version))
    assert answer.status == 200
    return answer.json()


@pytest.mark.parametrize(
    ("version", "differs"),
    [("0.21.0", False), ("0.22.0", True), ("0.22.1", True), ("0.22.2", False), ("0.38.0", False)],
)
async def test_the_transport_that_follows_redirects_is_off_where_it_does(
    api: Api, version: str, differs: bool
):
    config = await config_of(api, version)
    assert config.pop("use_pyqwest_transport", True) is not differs
    # What an SDK does not know it ignores; everybody is told the rest.
    assert set(config) == {
        "sample_use_retrieve_futures",
        "sample_join_sampling_session",
        "create_model_via_load_weights",
        "proto_write_fwdbwd",
        "fwd_via_fwdbwd",
        "proto_compress_fwdbwd",
        "custom_loss_server_side",
    }
    assert all(config.values())


@pytest.mark.parametrize(("version", "status"), [("0.20.0", 408), ("0.21.0", 429)])
async def test_a_poll_without_room_is_429_only_for_who_waits_then(
    second_gateway: Any,
    gateway_stack: GatewayStack,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    status: int,
):
    monkeypatch.setattr(luthier_gateway.futures, "TROUBLE_HOLD_S", 0)
    gateway = replace(gateway_stack.config.gateway, max_open_polls=0)
    full: Api = await second_gateway(gateway=gateway)
    run = await full.run_unchecked()
    wanted = {"request_id": f"{run.run_id}:0"}
    answer = await full.post("retrieve_future", wanted, **sent_by(version))
    assert answer.status == status
    if status == 408:
        assert answer.json()["queue_state"] == "paused_capacity"
