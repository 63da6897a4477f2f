"""The present code goes on from what an earlier release has stored, and lets it roll back."""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.contract.gateway_client import Api, Run
from tests.contract.gateway_stack import KEYS, GatewayStack, configure, running_services
from tests.contract.test_backup import LISTS, backup, step

from luthier_core.oplog import connect
from luthier_core.testing import running_valkey

UPGRADE = Path(__file__).parents[1] / "upgrade"
RELEASES = sorted(path.stem for path in UPGRADE.glob("*.json"))


async def load_library(redis_url: str, source: str) -> None:
    """As a part of the earlier release does at its start."""
    async with connect(redis_url) as client:
        await client.function_load(source, replace=True)


def without_times(listing: dict[str, Any]) -> dict[str, Any]:
    """A list without when each run was last asked for: a part may have told that after the list."""
    rows = listing.get("training_runs", [])
    kept = [{k: v for k, v in row.items() if k != "last_request_time"} for row in rows]
    return {**listing, "training_runs": kept} if rows else listing


async def go_on(stack: GatewayStack, left: dict[str, Any]) -> None:
    """Everything is there, the run goes on, and its checkpoint gives the same."""
    async with aiohttp.ClientSession() as http:
        api = Api(http, stack.url, KEYS["ann"])
        for name in LISTS:
            assert without_times((await api.get(name)).json()) == without_times(left[name])
        old_result = await api.outcome(f"{left['run_id']}:1")
        assert old_result.status == 200
        run = Run(api, left["run_id"], next_seq=8)  # 3 x 2 ops and a save
        resumed = await api.run()
        loading = await resumed.send("load_weights", path=left["path"], optimizer=True)
        await api.result(loading)
        assert await step(api, run) == await step(api, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_what_an_earlier_release_has_left_is_gone_on_with(release: str):
    left = json.loads((UPGRADE / f"{release}.json").read_text())
    old_library = (UPGRADE / f"{release}.lua").read_text()
    with tempfile.TemporaryDirectory(prefix="lu-up-") as name, running_valkey() as redis_url:
        folder = Path(name)
        config = configure(folder, redis_url, store_keys=False)
        (folder / "secret").write_text(left["secret"])
        asyncio.run(load_library(redis_url, old_library))
        restored = backup("restore", folder, UPGRADE / release)
        assert restored.returncode == 0, restored.stderr
        with running_services(folder, config) as stack:
            asyncio.run(go_on(stack, left))
            # In a rollout a part of the earlier release may start once more, with its library.
            asyncio.run(load_library(redis_url, old_library))
            asyncio.run(_train(stack))


async def _train(stack: GatewayStack) -> None:
    async with aiohttp.ClientSession() as http:
        api = Api(http, stack.url, KEYS["ann"])
        await step(api, await api.run())
