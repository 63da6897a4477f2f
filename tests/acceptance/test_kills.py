"""SIGKILL to each part of a stack while the quickstart and samplers use it."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from tests.acceptance.quickstart import Ended, run_quickstart
from tests.acceptance.stack import ANSWER_S, BASE_MODEL, Stack, running_stack
from tests.acceptance.training import create_run, make_data, submit_step, train
from tinker import types
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stack(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack for these tests alone; each of them leaves it whole again."""
    with running_stack(tmp_path_factory.mktemp("hurt") / "data", demo_model) as own:
        yield own


def test_the_quickstart_survives_the_kill_of_each_part(
    stack: Stack, undisturbed: Ended, tmp_path: Path
) -> None:
    # The last two are needed again only after the last step: for the samples.
    kills = {20: ["valkey"], 40: ["gateway"], 60: ["trainer-0"], 100: ["registry", "sampler-0"]}
    parts = [part for parts in kills.values() for part in parts]
    restarts = [stack.num_restarts(part) for part in parts]

    def kill(step: int) -> None:
        for part in kills.get(step, []):
            stack.kill(part)

    ended = run_quickstart(stack, stack.api_key, tmp_path, on_step=kill)
    stack.wait_ready()

    assert ended.exit_code == 0, ended.output
    for step, killed in kills.items():
        print(f"{' and '.join(killed)} killed: longest wait {ended.longest_wait_s(step):.1f} s")
    assert ended.learnt == undisturbed.learnt
    assert [stack.num_restarts(part) for part in parts] == [number + 1 for number in restarts]


def test_steps_sent_ahead_survive_one_kill_after_the_other(
    stack: Stack, tokenizer: PreTrainedTokenizerFast
) -> None:
    data, num_steps = make_data(tokenizer), 40
    kills = {4: "valkey", 12: "gateway", 20: "trainer-0", 28: "registry"}
    with stack.service(stack.api_key) as service:
        expected = train(create_run(service), data, num_steps)
        run = create_run(service)
        results = []
        for index, step in enumerate([submit_step(run, data) for _ in range(num_steps)]):
            results.append(step.result())
            if index in kills:
                stack.kill(kills[index])
        stack.wait_ready()
        assert results == expected


def test_steps_sent_ahead_survive_the_kill_of_the_engine_alone(
    stack: Stack, tokenizer: PreTrainedTokenizerFast
) -> None:
    data, num_steps = make_data(tokenizer), 20
    restarts = stack.num_restarts("trainer-0")
    with stack.service(stack.api_key) as service:
        expected = train(create_run(service), data, num_steps)
        run = create_run(service)
        results = []
        for index, step in enumerate([submit_step(run, data) for _ in range(num_steps)]):
            results.append(step.result())
            if index in (4, 12):
                stack.kill_engine("trainer-0")
        assert results == expected
    assert stack.num_restarts("trainer-0") == restarts


def test_the_sdk_survives_a_restart_of_redis_and_of_the_gateway_in_mid_run(
    stack: Stack, tokenizer: PreTrainedTokenizerFast
) -> None:
    data, num_steps, num_ahead = make_data(tokenizer), 30, 3
    restarts = {8: signal.SIGTERM, 18: signal.SIGKILL}
    parts = ("valkey", "gateway")
    before = [stack.num_restarts(part) for part in parts]
    with stack.service(stack.api_key) as service:
        expected = train(create_run(service), data, num_steps)
        run = create_run(service)
        steps, results = [], []
        for index in range(num_steps):
            # With both away, the SDK posts the next steps and polls for the ones before.
            steps.append(submit_step(run, data))
            if index in restarts:
                stack.kill(*parts, sent=restarts[index])
            if index >= num_ahead:
                results.append(steps[index - num_ahead].result())
        results += [step.result() for step in steps[-num_ahead:]]
        stack.wait_ready()
    assert results == expected
    assert [stack.num_restarts(part) for part in parts] == [number + 2 for number in before]


def test_samples_under_way_outlive_the_sampler(stack: Stack) -> None:
    def submit() -> list[tinker.APIFuture[types.SampleResponse]]:
        """Requests that end one after the other, each at the length it was given."""
        return [
            sampling.sample(
                prompt=types.ModelInput.from_ints(list(range(first, first + 8))),
                num_samples=1,
                sampling_params=types.SamplingParams(
                    max_tokens=64 * first, temperature=0.0, stop=[]
                ),
            )
            for first in range(1, 11)
        ]

    def tokens(futures: list[tinker.APIFuture[types.SampleResponse]]) -> list[list[int]]:
        return [future.result(timeout=ANSWER_S).sequences[0].tokens for future in futures]

    # Not closed: close() of the SDK 0.38.0 can wait for ever for its own poller.
    service = stack.service(stack.api_key)
    sampling = service.create_sampling_client(base_model=BASE_MODEL).result()
    futures = submit()
    first = tokens(futures[:1])
    stack.kill("sampler-0")
    disturbed = first + tokens(futures[1:])
    assert disturbed == tokens(submit())
