"""Training runs through the official SDK: beside each other, from a checkpoint, sampled from."""

import pytest
import tinker
from tests.acceptance.stack import ANSWER_S, Stack
from tests.acceptance.training import (
    PHRASES,
    Step,
    create_run,
    make_data,
    sample_greedily,
    submit_step,
    train,
)
from tinker import types
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def data(tokenizer: PreTrainedTokenizerFast) -> list[types.Datum]:
    return make_data(tokenizer)


def test_interleaved_runs_of_different_rank_equal_their_solo_results(
    shared_stack: Stack, service: tinker.ServiceClient, tokenizer: PreTrainedTokenizerFast
) -> None:
    num_steps, ranks = 12, (4, 16)
    data = {4: make_data(tokenizer, PHRASES[:2]), 16: make_data(tokenizer, PHRASES)}
    solo = {rank: create_run(service, rank=rank) for rank in ranks}
    expected = {rank: train(solo[rank], data[rank], num_steps) for rank in ranks}

    together = {rank: create_run(service, rank=rank) for rank in ranks}
    steps: dict[int, list[Step]] = {rank: [] for rank in ranks}
    for _ in range(num_steps):  # all of both runs is under way before the first result is awaited
        for rank in ranks:
            steps[rank].append(submit_step(together[rank], data[rank]))

    for rank in ranks:
        assert [step.result() for step in steps[rank]] == expected[rank]
        assert _saved(shared_stack, together[rank]) == _saved(shared_stack, solo[rank])


def test_a_client_from_state_with_optimizer_goes_on_as_the_run_itself(
    shared_stack: Stack, service: tinker.ServiceClient, data: list[types.Datum]
) -> None:
    run = create_run(service)
    train(run, data, 5)
    path = run.save_state("middle").result(timeout=ANSWER_S).path
    expected = train(run, data, 2)

    resumed = service.create_training_client_from_state_with_optimizer(path).result()

    assert train(resumed, data, 2) == expected
    assert _saved(shared_stack, resumed) == _saved(shared_stack, run)


def test_a_client_from_state_alone_starts_with_a_new_optimizer(
    service: tinker.ServiceClient, data: list[types.Datum]
) -> None:
    run = create_run(service)
    train(run, data, 5)
    path = run.save_state("middle").result(timeout=ANSWER_S).path
    first, second = train(run, data, 2)

    resumed = service.create_training_client_from_state(path).result()

    resumed_first, resumed_second = train(resumed, data, 2)
    assert resumed_first.logprobs == first.logprobs
    assert resumed_second.logprobs != second.logprobs


def test_ephemeral_and_named_sampler_weights_give_the_same_samples(
    service: tinker.ServiceClient, data: list[types.Datum], tokenizer: PreTrainedTokenizerFast
) -> None:
    run = create_run(service)
    untrained = sample_greedily(run.save_weights_and_get_sampling_client().result(), tokenizer)
    train(run, data, 30)

    ephemeral = run.save_weights_and_get_sampling_client().result()
    path = run.save_weights_for_sampler("named").result(timeout=ANSWER_S).path
    named = service.create_sampling_client(model_path=path).result()

    samples = sample_greedily(ephemeral, tokenizer)
    assert samples == sample_greedily(named, tokenizer)
    assert samples != untrained


def _saved(stack: Stack, training: tinker.TrainingClient) -> dict[str, bytes]:
    """The adapter's and the optimizer's files, as a save_state stores them now."""
    path = training.save_state("end").result(timeout=ANSWER_S).path
    files = stack.saved_files(path, tenant="alpha")
    assert {"adapter_model.safetensors", "optimizer.safetensors"} <= files.keys()
    return files
