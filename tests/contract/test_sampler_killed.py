"""kill -9 of a sampler in mid-generation, as the official SDK sees it."""

import gc
import json
import signal
from collections.abc import Iterator

import pytest
import redis
import tinker
from tests.acceptance.conftest import SDK_LEAKS
from tests.acceptance.stack import wait_until
from tests.contract.gateway_client import BASE_MODEL
from tests.contract.gateway_stack import KEYS, GatewayStack, another_sampler
from tinker import types

from luthier_core import keys

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(leak) for leak in SDK_LEAKS)]

ANSWER_S = 120.0
NUM_SAMPLES = 120


@pytest.fixture
def client(gateway_stack: GatewayStack) -> Iterator[tinker.SamplingClient]:
    with tinker.ServiceClient(base_url=gateway_stack.url, api_key=KEYS["ann"]) as service:
        yield service.create_sampling_client(base_model=BASE_MODEL).result()
    gc.collect()


def submit(client: tinker.SamplingClient) -> list[tinker.APIFuture[types.SampleResponse]]:
    """More than one sampler claims at once, of 40 tokens each."""
    params = [types.SamplingParams(seed=i, max_tokens=40, stop=[]) for i in range(NUM_SAMPLES)]
    prompt = types.ModelInput.from_ints(list(range(8)))
    return [client.sample(prompt, 1, each) for each in params]


def results(
    futures: list[tinker.APIFuture[types.SampleResponse]],
) -> list[tuple[list[int], list[float]]]:
    """Tokens and logprobs of each."""
    sequences = [future.result(timeout=ANSWER_S).sequences[0] for future in futures]
    return [(list(sequence.tokens), list(sequence.logprobs)) for sequence in sequences]


def test_the_samples_of_a_killed_sampler_complete_elsewhere_with_one_outcome_each(
    gateway_stack: GatewayStack, client: tinker.SamplingClient
) -> None:
    jobs, name = keys.sampling_jobs(BASE_MODEL), "sampler-to-kill"
    with (
        redis.Redis.from_url(gateway_stack.config.redis_url) as valkey,
        another_sampler(gateway_stack, name) as sampler,
    ):

        def is_ready() -> bool:
            lease = valkey.get(keys.worker_lease(name))
            return lease is not None and json.loads(lease)["state"] == "ready"

        def num_held() -> int:
            return len(valkey.xpending_range(jobs, keys.SAMPLING_GROUP, "-", "+", 1000, name))

        wait_until(is_ready, "the other sampler", timeout_s=ANSWER_S)
        before = num_outcomes(valkey)
        futures = submit(client)
        wait_until(lambda: num_held() > 0, "jobs of the other sampler", timeout_s=ANSWER_S)
        sampler.send_signal(signal.SIGKILL)
        sampler.wait()
        num_orphans = num_held()
        found = results(futures)
        assert num_orphans > 0
        assert num_outcomes(valkey) - before == NUM_SAMPLES
        assert (num_held(), valkey.xlen(jobs)) == (0, 0)
    assert found == results(submit(client))


def num_outcomes(valkey: redis.Redis) -> int:
    """Outcomes that were ever stored, of all sampling sessions."""
    lists = valkey.scan_iter("*:completed:*", count=1000)
    return sum(valkey.xinfo_stream(completions)["entries-added"] for completions in lists)
