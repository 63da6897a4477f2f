"""Redis is wiped under a running stack: nothing is answered wrongly, and lists come back."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from tests.contract.gateway_client import Api
from tests.contract.gateway_stack import KEYS, GatewayStack, running_gateway_stack

from luthier_core.oplog import connect


@pytest.fixture(scope="module")
def own_stack() -> Iterator[GatewayStack]:
    with (
        tempfile.TemporaryDirectory(prefix="lu-wp-") as folder,
        running_gateway_stack(Path(folder)) as stack,
    ):
        yield stack


async def test_after_redis_was_wiped_gateways_wait_for_the_lists_and_name_what_is_lost(
    own_stack: GatewayStack, http: aiohttp.ClientSession
):
    api = Api(http, own_stack.url, KEYS["ann"])
    run = await api.run()
    saved = (await api.result(await run.send("save_weights", path="kept")))["path"]
    async with connect(own_stack.config.redis_url) as client:
        await client.flushall()
    statuses = set()
    for _ in range(10_000):
        answer = await api.get(f"training_runs/{run.run_id}/checkpoints")
        statuses.add(answer.status)
        if answer.status == 200 and answer.json()["checkpoints"]:
            break
    assert [row["tinker_path"] for row in answer.json()["checkpoints"]] == [saved]
    assert statuses <= {200, 503}
    # Without a snapshot its ops are lost: a definite error, and the checkpoint is there.
    seq = run.take_seq()
    for _ in range(10_000):  # lists may be back before the headers are
        params = {"learning_rate": 0.01}
        refused = await run.post("optim_step", seq_id=seq, adam_params=params)
        if refused.status != 503:
            break
    assert (refused.status, "has failed" in refused.detail) == (400, True)
    # Its trainer is still the same process, and takes new runs.
    await api.result(await (await api.run()).step())
