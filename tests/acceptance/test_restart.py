"""A second `luthier up` on the same folder goes on where the first stopped."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.acceptance.stack import ANSWER_S, STOP_S, Stack, is_alive, running_stack, wait_until
from tests.acceptance.training import create_run, make_data, submit_step, train
from tinker import types
from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stack(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack for these tests alone; each of them leaves it running."""
    with running_stack(tmp_path_factory.mktemp("restarted") / "data", demo_model) as own:
        yield own


@pytest.fixture
def data(tokenizer: PreTrainedTokenizerFast) -> list[types.Datum]:
    return make_data(tokenizer)


def test_runs_checkpoints_and_futures_outlive_a_restart(
    stack: Stack, data: list[types.Datum]
) -> None:
    with stack.service(stack.api_key) as service:
        expected = train(create_run(service), data, 8)
        run = create_run(service)
        train(run, data, 5)
        path = run.save_state("middle").result(timeout=ANSWER_S).path
        old_future = stack.retrieve(f"{run.model_id}:1", api_key=stack.api_key)
        processes = stack.processes()

        assert stack.stop() == 0
        assert [process for process in processes if is_alive(process)] == []
        stack.start()

        assert train(run, data, 3) == expected[5:]
        assert old_future.status == 200
        assert stack.retrieve(f"{run.model_id}:1", api_key=stack.api_key) == old_future
    with stack.service(stack.api_key) as service:
        resumed = service.create_training_client_from_state_with_optimizer(path).result()
        assert train(resumed, data, 3) == expected[5:]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_steps_under_way_outlive_luthier_up(
    sent: signal.Signals, stack: Stack, data: list[types.Datum]
) -> None:
    num_steps = 30
    with stack.service(stack.api_key) as service:
        expected = train(create_run(service), data, num_steps)
        run = create_run(service)
        steps = [submit_step(run, data) for _ in range(num_steps)]
        first = steps[0].result()
        processes = stack.processes()

        assert stack.stop(sent) == (0 if sent is signal.SIGTERM else -signal.SIGKILL)
        stack.start()

        assert [first, *(step.result() for step in steps[1:])] == expected
        # After SIGKILL nobody waits for the parts: they end by themselves.
        wait_until(lambda: not any(map(is_alive, processes)), "end of parts", timeout_s=STOP_S)
