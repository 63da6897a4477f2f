"""RL load on the sampler with the official SDK: many samples at once."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import tinker
from tests.acceptance.conftest import KEYS
from tests.acceptance.stack import ANSWER_S, BASE_MODEL, Stack
from tinker import types

pytestmark = pytest.mark.slow

NUM_DISTINCT = 20

Answer = tuple[list[int], list[float]]
"""Tokens and logprobs."""


def submit(
    client: tinker.SamplingClient, seeds: Sequence[int], *, max_tokens: int = 8
) -> list[tinker.APIFuture[types.SampleResponse]]:
    """A request per seed, all at once: another seed is another prompt, length and temperature."""
    return [
        client.sample(
            prompt=types.ModelInput.from_ints([*range(1, 14), 5 + seed]),
            num_samples=1,
            sampling_params=types.SamplingParams(
                seed=seed, max_tokens=max_tokens - seed % 3, temperature=seed % 2, stop=[]
            ),
        )
        for seed in seeds
    ]


def answer(future: tinker.APIFuture[types.SampleResponse]) -> Answer:
    [sequence] = future.result(timeout=ANSWER_S).sequences
    return list(sequence.tokens), list(sequence.logprobs)


def test_many_samples_of_one_and_of_many_clients_are_what_each_gets_alone(
    shared_stack: Stack, service: tinker.ServiceClient
) -> None:
    client = service.create_sampling_client(base_model=BASE_MODEL).result()
    alone = [answer(submit(client, [seed])[0]) for seed in range(NUM_DISTINCT)]
    assert len({tuple(tokens) for tokens, _ in alone}) > NUM_DISTINCT / 2
    seeds = [i % NUM_DISTINCT for i in range(200)]
    assert [answer(future) for future in submit(client, seeds)] == [alone[seed] for seed in seeds]

    def one_of_many(first: int) -> bool:
        # Not closed: closing a client of SDK 0.38 can hang if it begins to poll at that moment.
        own = shared_stack.service(KEYS["alpha"])
        client = own.create_sampling_client(base_model=BASE_MODEL).result()
        seeds = [(first + i) % NUM_DISTINCT for i in range(20)]
        found = [answer(future) for future in submit(client, seeds)]
        return found == [alone[seed] for seed in seeds]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one_of_many, range(4)))
