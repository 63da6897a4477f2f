"""Sampling through our own client."""

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from tests.acceptance.stack import Stack
from tests.sdk.conftest import BASE_MODEL, KEYS

import luthier
from luthier import types

PROMPT = types.ModelInput.from_ints([5, 6, 7, 8])
GREEDY = types.SamplingParams(max_tokens=6, temperature=0.0)


@pytest.fixture
def sampling(service: luthier.ServiceClient) -> luthier.SamplingClient:
    return service.create_sampling_client(base_model=BASE_MODEL)


def test_samples_have_tokens_logprobs_and_ids(sampling: luthier.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=5, seed=3, stop=[])
    response = sampling.sample(PROMPT, 3, params).result()
    assert [len(sequence.tokens) for sequence in response.sequences] == [5, 5, 5]
    assert all(len(sequence.logprobs or ()) == 5 for sequence in response.sequences)
    assert {sequence.stop_reason for sequence in response.sequences} == {"length"}
    assert len({sequence.sequence_id for sequence in response.sequences}) == 3


def test_prompt_logprobs_are_those_that_compute_logprobs_gives(
    sampling: luthier.SamplingClient,
) -> None:
    response = sampling.sample(
        PROMPT, 1, GREEDY, include_prompt_logprobs=True, topk_prompt_logprobs=2
    ).result()
    logprobs = response.prompt_logprobs
    assert logprobs is not None
    assert logprobs[0] is None
    assert None not in logprobs[1:]
    assert sampling.compute_logprobs(PROMPT).result() == logprobs
    top = response.topk_prompt_logprobs
    assert top is not None
    assert [None if row is None else len(row) for row in top] == [None, 2, 2, 2]


async def test_many_samples_at_once_come_back_to_whoever_asked(
    sampling: luthier.SamplingClient,
) -> None:
    prompts = [types.ModelInput.from_ints([n % 60, n // 60, 7]) for n in range(200)]
    one_by_one = [await sampling.sample_async(prompt, 1, GREEDY) for prompt in prompts[:5]]
    together = await asyncio.gather(*(sampling.sample(p, 1, GREEDY) for p in prompts))
    assert len(together) == 200
    for alone, beside in zip(one_by_one, together, strict=False):
        assert alone.sequences[0].tokens == beside.sequences[0].tokens


def test_a_bad_value_fails_with_its_name(sampling: luthier.SamplingClient) -> None:
    with pytest.raises(luthier.RequestFailedError, match="top_p"):
        sampling.sample(PROMPT, 1, types.SamplingParams(max_tokens=1, top_p=2.0)).result()


def test_weights_of_a_training_client_are_sampled_from(
    service: luthier.ServiceClient,
    training: luthier.TrainingClient,
    sampling: luthier.SamplingClient,
) -> None:
    inputs = {"target_tokens": [6, 7, 8], "weights": [1.0] * 3}
    for _ in range(3):
        datum = types.Datum(types.ModelInput.from_ints([5, 6, 7]), inputs)
        training.forward_backward([datum], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=5e-3))
    named = training.save_weights_for_sampler("named").result().path
    clients = [
        training.save_weights_and_get_sampling_client(),
        training.create_sampling_client(named),
        service.create_sampling_client(model_path=named),
        training.save_weights_and_get_sampling_client("another"),
    ]
    learnt = [_likelihood(client) for client in clients]
    assert learnt == [learnt[0]] * 4
    assert learnt[0] > _likelihood(sampling)
    assert clients[2].get_base_model() == BASE_MODEL


def _likelihood(client: luthier.SamplingClient) -> float:
    return sum(logprob or 0.0 for logprob in client.compute_logprobs(PROMPT).result())


def _sample_elsewhere(client: luthier.SamplingClient) -> list[int]:
    return client.sample(PROMPT, 1, GREEDY).result().sequences[0].tokens


def test_a_client_may_be_sent_to_other_processes(
    sampling: luthier.SamplingClient, stack: Stack
) -> None:
    here = _sample_elsewhere(sampling)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        there = list(pool.map(_sample_elsewhere, [sampling] * 4))
    assert there == [here] * 4
    handle = sampling.get_sampler_handle()
    assert KEYS["ann"] not in handle
    again = luthier.SamplingClient.from_sampler_handle(handle, api_key=KEYS["ann"])
    assert _sample_elsewhere(again) == here


def test_a_cancelled_sample_is_cancelled_at_the_server(
    sampling: luthier.SamplingClient, stack: Stack
) -> None:
    sampling.result()
    long = types.SamplingParams(max_tokens=100, stop=[])
    futures = [sampling.sample(PROMPT, 4, long) for _ in range(8)]
    assert all(future.cancel() for future in futures[:7])
    assert len(futures[7].result().sequences) == 4
