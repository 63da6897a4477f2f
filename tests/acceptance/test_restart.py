"""A second `luthier up` on the same folder goes on where the first stopped."""

import signal
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.acceptance.stack import ANSWER_S, Stack, running_stack
from tests.acceptance.training import create_run, make_data, submit_step, train


def test_runs_checkpoints_and_futures_outlive_a_restart(
    demo_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = make_data(tokenizer)
    with running_stack(tmp_path / "data", demo_model) as stack:
        with stack.service(stack.api_key) as service:
            expected = train(create_run(service), data, 8)
            run = create_run(service)
            train(run, data, 5)
            path = run.save_state("middle").result(timeout=ANSWER_S).path
            old_future = f"{run.model_id}:1"
            answer = stack.retrieve(old_future, api_key=stack.api_key)
            assert answer.status == 200
            processes = stack.processes()

            assert stack.stop() == 0
            assert [process for process in processes if process.is_running()] == []
            stack.start()

            assert train(run, data, 3) == expected[5:]
            assert stack.retrieve(old_future, api_key=stack.api_key) == answer
        with stack.service(stack.api_key) as service:
            resumed = service.create_training_client_from_state_with_optimizer(path).result()
            assert train(resumed, data, 3) == expected[5:]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_steps_under_way_outlive_luthier_up(
    sent: signal.Signals,
    demo_model: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    data, num_steps = make_data(tokenizer), 30
    with (
        running_stack(tmp_path / "data", demo_model) as stack,
        stack.service(stack.api_key) as service,
    ):
        expected = train(create_run(service), data, num_steps)
        run = create_run(service)
        steps = [submit_step(run, data) for _ in range(num_steps)]
        first = steps[0].result()

        stack.stop(sent)
        stack.start()

        assert [first, *(step.result() for step in steps[1:])] == expected
