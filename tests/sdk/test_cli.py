"""The commands that talk to a server: what they print, and their exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.acceptance.stack import Stack
from tests.sdk.conftest import BASE_MODEL, KEYS
from typer.testing import CliRunner

import luthier
from luthier.cli import app


@pytest.fixture(autouse=True)
def environment(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", stack.url)
    monkeypatch.setenv("TINKER_API_KEY", KEYS["ann"])


def run(*arguments: str, code: int = 0) -> str:
    """Standard output of a command that exits with `code`."""
    ended = CliRunner().invoke(app, list(arguments))
    assert ended.exit_code == code, ended.output
    return ended.stdout if code == 0 else ended.stderr


def run_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json"))


def test_runs_sessions_and_models_are_listed(training: luthier.TrainingClient) -> None:
    run_id = training.model_id
    session_id = run_id.partition(":")[0]
    assert run_json("model", "list")["supported_models"][0]["model_name"] == BASE_MODEL
    listed = run_json("run", "list", "--limit", "50")["training_runs"]
    assert run_id in [one["training_run_id"] for one in listed]
    assert run_json("run", "info", run_id)["lora_rank"] == 4
    assert session_id in run_json("session", "list", "--limit", "50")["sessions"]
    assert run_id in run_json("session", "info", session_id)["training_run_ids"]
    assert BASE_MODEL in run("run", "list")
    assert BASE_MODEL in run("model", "list")


def test_checkpoints_are_listed_described_and_deleted(training: luthier.TrainingClient) -> None:
    path = training.save_weights_for_sampler("listed").result().path
    listed = run_json("checkpoint", "list", "--run-id", training.model_id)["checkpoints"]
    assert [one["tinker_path"] for one in listed] == [path]
    assert run_json("checkpoint", "info", path)["checkpoint_type"] == "sampler"
    assert run_json("checkpoint", "delete", path, "--yes")["done"] == "deleted"
    assert run_json("checkpoint", "list", "--run-id", training.model_id)["checkpoints"] == []


def test_what_is_not_there_is_one_line_and_exit_1() -> None:
    assert run("run", "info", "no-such:train:0", code=1).startswith("luthier: 404")
    assert "tinker://<run>" in run("checkpoint", "info", "nonsense", code=1)


def test_an_unreachable_server_is_exit_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.transport.FIRST_PATIENCE_S", 0.1)
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:9")
    assert run("model", "list", code=3).count("\n") == 1


def test_a_missing_key_is_told_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY")
    assert "TINKER_API_KEY" in run("model", "list", code=1)


def test_a_loss_curve_is_drawn_from_a_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with luthier.MetricsLog(path) as log:
        for step in range(30):
            log.write({"loss": 30.0 - step}, step=step)
    drawn = run("run", "watch", str(path), "--once")
    assert "first 30, now 1 at step 29, lowest 1" in drawn
    assert drawn.startswith("█")
    assert run_json("run", "watch", str(path))["points"][0] == [0, 30.0]
