"""A few of each sort of malformed request; `make malformed` sends thousands."""

import psutil
import pytest
from tests.contract.gateway_client import Api
from tests.contract.gateway_stack import MAX_BODY_BYTES, GatewayStack
from tests.fuzz.malformed import GENERATORS, cases
from tests.fuzz.malformed_run import MAX_GROWTH_BYTES, Sender, gateway_pid

NUM_CASES = 10 * len(GENERATORS)


@pytest.fixture
def gateway(gateway_stack: GatewayStack) -> psutil.Process:
    folder = gateway_stack.config.store_url.removeprefix("file://").removesuffix("/objects")
    return psutil.Process(gateway_pid(folder))


async def test_malformed_requests_are_refused_and_others_are_served(
    api: Api, stranger: Api, gateway: psutil.Process
):
    before = gateway.memory_info().rss
    sender = Sender(api, MAX_BODY_BYTES)
    target = await sender.prepare()
    stream = cases(7, lambda: target)
    run = await stranger.run()
    for index in range(NUM_CASES):
        target = await sender.prepare()
        await sender.send(*next(stream))
        if index % len(GENERATORS) == 0:
            output = await stranger.training_output(await run.forward_backward())
            assert output.metrics["loss:sum"] > 0
    assert sender.outcomes.total() == NUM_CASES
    assert gateway.memory_info().rss - before < MAX_GROWTH_BYTES
