"""The harnesses that start processes: what ends is said at once, not waited for."""

import socket
from pathlib import Path

import pytest
from tests.acceptance.stack import running_stack
from tests.contract import gateway_stack


def test_a_part_that_ends_at_its_start_fails_the_start_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(gateway_stack, "free_port", lambda: taken.getsockname()[1])
        with (
            pytest.raises(RuntimeError, match=r"\w+ ended with \d:\n[\s\S]*already in use"),
            gateway_stack.running_gateway_stack(tmp_path),
        ):
            pass


def test_a_stack_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"ended with 2:\n.*has no config\.json"),
        running_stack(tmp_path / "data", tmp_path),
    ):
        pass


def test_a_part_of_a_stack_that_ends_at_its_start_fails_the_start(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with (
        pytest.raises(RuntimeError, match=r"(trainer|sampler)-0 ended at its start:\n"),
        running_stack(tmp_path / "data", model),
    ):
        pass
