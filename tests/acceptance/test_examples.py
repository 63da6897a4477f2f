"""The examples run as they are written down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.acceptance.conftest import KEYS
from tests.acceptance.stack import ANSWER_S, BASE_MODEL, Stack

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_sampling(stack: Stack, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The demo model's tokenizer is on no hub.
    return run(stack, name, "--tokenizer", str(stack.model), *arguments)


def run(stack: Stack, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An example that ends with 0."""
    environ = {**os.environ, "TINKER_BASE_URL": stack.url, "TINKER_API_KEY": KEYS["alpha"]}
    argv = [sys.executable, str(EXAMPLES / name), *arguments]
    ended = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=ANSWER_S)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


def test_a_chat_answers_each_turn(shared_stack: Stack) -> None:
    turns = ("--say", "hello", "--say", "thank you")
    output = run_sampling(shared_stack, "chat.py", "--model", BASE_MODEL, *turns).stdout
    answers = [line for line in output.splitlines() if line.startswith("model> ")]
    assert len(answers) == 2
    assert "Hello" in answers[0]


def test_the_best_of_n_is_better_than_the_average(shared_stack: Stack) -> None:
    output = run_sampling(shared_stack, "best_of_n.py", "--num-samples", "8").stdout
    assert "with the best of 8" in output


def test_a_dataset_is_scored(shared_stack: Stack, tmp_path: Path) -> None:
    scores = tmp_path / "scores.jsonl"
    output = run_sampling(shared_stack, "prompt_logprobs.py", "--json", str(scores)).stdout
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    assert len(rows) == 4
    assert all(value <= 0 for row in rows for value in row["logprobs"])
    assert "in all" in output
    mean = [sum(row["logprobs"]) / len(row["logprobs"]) for row in rows]
    assert mean[2] > mean[3]  # what the model has learnt is likelier than noise


@pytest.mark.parametrize(
    ("name", "arguments", "curves"),
    [
        ("supervised.py", ("--steps", "24"), ("training loss", "test loss")),
        ("reinforce.py", ("--steps", "8"), ("reward", "KL to sampler")),
        ("dpo.py", ("--steps", "6"), ("loss at the mean", "margin")),
        ("distillation.py", ("--teacher-steps", "8", "--steps", "16"), ("KL to teacher",)),
    ],
)
def test_a_loop_of_training_reaches_its_aim_and_prints_its_curve(
    shared_stack: Stack, name: str, arguments: tuple[str, ...], curves: tuple[str, ...]
) -> None:
    output = run(shared_stack, name, *arguments).stdout
    for curve in curves:
        assert any(curve in line and "█" in line for line in output.splitlines())
