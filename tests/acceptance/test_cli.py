"""Every command of the official `tinker` command line, against a running stack."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import tinker
from safetensors.torch import load_file
from tests.acceptance.conftest import KEYS
from tests.acceptance.stack import ANSWER_S, BASE_MODEL, Stack
from tests.acceptance.training import create_run
from tinker.cli.__main__ import main_cli

COMMANDS = {
    *(f"auth {name}" for name in ("login", "logout", "status", "whoami")),
    *(f"billing {name}" for name in ("usage", "checkpoint-storage")),
    *(f"checkpoint {name}" for name in ("list", "info", "delete", "download")),
    *(f"checkpoint {name}" for name in ("publish", "unpublish", "set-ttl")),
    *("model list", "run list", "run info", "session export-trace", "version"),
}
"""Each of which has a test below."""
NEEDS_THE_HUB = {"checkpoint push-hf"}
"""Uploads what `checkpoint download` has fetched to a service that is not ours."""

ABORTED = -signal.SIGABRT
"""Rarely, at the very end of a command that did its work and printed its answer: the SDK's event
loop is a daemon thread, which is still running while Python is taken down."""


@dataclass(frozen=True, slots=True)
class Cli:
    """`tinker ...` as one user runs it, in an empty home folder."""

    stack: Stack
    home: Path

    def run(
        self, *arguments: str, key: str | None = KEYS["alpha"], stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        environ = {name: value for name, value in os.environ.items() if "TINKER" not in name}
        environ |= {"HOME": str(self.home), "TINKER_BASE_URL": self.stack.url}
        if key is not None:
            environ["TINKER_API_KEY"] = key
        return subprocess.run(
            [sys.executable, "-m", "tinker.cli", *arguments],
            input=stdin,
            env=environ | {"PYTHONFAULTHANDLER": "1"},
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
        )

    def told(self, *arguments: str, **options: Any) -> str:
        """What a command that succeeds prints."""
        done = self.run(*arguments, **options)
        assert done.returncode in (0, ABORTED), f"{arguments} {done.returncode}: {done.stderr}"
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.told("--format", "json", *arguments))

    def row(self, tinker_path: str) -> dict[str, Any]:
        """The checkpoint as the gateway lists it: a command takes seconds to start."""
        return next(row for row in self.rows() if row["tinker_path"] == tinker_path)

    def rows(self) -> list[dict[str, Any]]:
        answer = self.stack.request("GET", "checkpoints?limit=1000", api_key=KEYS["alpha"])
        rows: list[dict[str, Any]] = json.loads(answer.body)["checkpoints"]
        return rows

    def refusal(self, *arguments: str, **options: Any) -> str:
        """What a command that fails says; it fails with a sentence, not with a traceback."""
        done = self.run(*arguments, **options)
        assert done.returncode != 0, done
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr


@dataclass(frozen=True, slots=True)
class Saved:
    """A run with checkpoints to work on."""

    run_id: str
    weights: str
    external: str


@pytest.fixture
def cli(shared_stack: Stack, tmp_path: Path) -> Cli:
    return Cli(shared_stack, tmp_path)


@pytest.fixture(scope="module")
def saved(shared_stack: Stack) -> Saved:
    with shared_stack.service(KEYS["alpha"]) as service:
        run = create_run(service)
        external = run.save_weights_external("out").result(timeout=ANSWER_S).path
        weights = run.save_state("state").result(timeout=ANSWER_S).path
        return Saved(run.model_id, weights, external)


def test_every_command_of_this_release_is_run_here() -> None:
    assert set(commands_of(main_cli)) == COMMANDS | NEEDS_THE_HUB


def commands_of(group: click.Group, words: str = "") -> Iterator[str]:
    with click.Context(group) as context:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            if isinstance(command, click.Group):
                yield from commands_of(command, f"{words}{name} ")
            else:
                yield f"{words}{name}"


def test_run_commands_list_and_describe(cli: Cli, saved: Saved) -> None:
    listed = cli.json("run", "list", "--limit", "0")["runs"]
    assert saved.run_id in [run["training_run_id"] for run in listed]
    described = cli.json("run", "info", saved.run_id)
    assert described["base_model"] == BASE_MODEL
    assert described["last_checkpoint"]["tinker_path"] == saved.weights
    assert "not found" in cli.refusal("run", "info", saved.run_id, key=KEYS["beta"]).lower()


def test_checkpoint_commands_list_and_describe(cli: Cli, saved: Saved) -> None:
    of_run = cli.json("checkpoint", "list", "--run-id", saved.run_id)["checkpoints"]
    types = {row["tinker_path"]: row["checkpoint_type"] for row in of_run}
    assert types == {saved.weights: "training", saved.external: "external"}
    everything = cli.json("checkpoint", "list", "--limit", "0")["checkpoints"]
    assert types.keys() <= {row["tinker_path"] for row in everything}
    described = cli.json("checkpoint", "info", saved.weights)
    assert (described["checkpoint_id"], described["lora_rank"]) == ("weights/state", 8)


def test_checkpoint_commands_publish_and_unpublish(cli: Cli, saved: Saved) -> None:
    for command, public in (("publish", True), ("unpublish", False)):
        cli.told("checkpoint", command, saved.weights)
        assert cli.row(saved.weights)["public"] is public
    assert (
        "not found" in cli.refusal("checkpoint", "publish", saved.weights, key=KEYS["beta"]).lower()
    )


def test_checkpoint_set_ttl_sets_and_takes_away_an_expiry(cli: Cli, saved: Saved) -> None:
    cli.told("checkpoint", "set-ttl", saved.weights, "--ttl", "7200")
    assert cli.row(saved.weights)["expires_at"]
    cli.told("checkpoint", "set-ttl", saved.weights, "--remove")
    assert cli.row(saved.weights)["expires_at"] is None


def test_checkpoint_delete_deletes(cli: Cli, shared_stack: Stack, saved: Saved) -> None:
    with shared_stack.service(KEYS["alpha"]) as service:
        run = create_run(service)
        paths = [run.save_state(name).result(timeout=ANSWER_S).path for name in ("a", "b")]
    cli.told("checkpoint", "delete", "--yes", *paths)
    assert not [row for row in cli.rows() if row["tinker_path"] in paths]
    assert "Checkpoint not found" in cli.refusal("checkpoint", "info", paths[0])


@pytest.mark.parametrize("kind", ["weights", "external"])
def test_checkpoint_download_writes_a_peft_adapter(cli: Cli, saved: Saved, kind: str) -> None:
    path = getattr(saved, kind)
    cli.told("checkpoint", "download", path, "--output", "models")
    (folder,) = (cli.home / "models").iterdir()
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
    assert load_file(folder / "adapter_model.safetensors")
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    # The temporary export of a training checkpoint is gone again.
    assert not [row for row in cli.rows() if row["tinker_path"].endswith("/download")]


def test_session_export_trace_writes_a_trace(cli: Cli, saved: Saved) -> None:
    session_id = saved.run_id.partition(":")[0]
    cli.told("session", "export-trace", session_id, "--output", "a.pftrace")
    events = json.loads((cli.home / "a.pftrace").read_text())["traceEvents"]
    assert "save_weights" in {event["name"] for event in events}


def test_model_list_names_the_models(cli: Cli) -> None:
    assert BASE_MODEL in json.dumps(cli.json("model", "list"))


def test_auth_commands_log_in_and_out(cli: Cli) -> None:
    assert "no" in cli.refusal("auth", "status", key=None)
    assert "API key" in cli.refusal("auth", "login", key=None, stdin="tml-nobody\n")
    assert "Logged in" in cli.told("auth", "login", key=None, stdin=f"{KEYS['alpha']}\n")
    assert "Tinker accessible: yes" in cli.told("auth", "status", key=None)
    assert BASE_MODEL in cli.told("model", "list", key=None)
    assert "Removed" in cli.told("auth", "logout", key=None)
    assert "Tinker accessible: no" in cli.run("auth", "status", key="tml-nobody").stdout


def test_auth_whoami_needs_what_this_server_does_not_do(cli: Cli) -> None:
    """The SDK reads the claims of a JWT, and this server gives none out."""
    assert cli.refusal("auth", "whoami")


@pytest.mark.parametrize(
    "command",
    [
        ("billing", "usage", "2026-01-01", "2026-01-02"),
        ("billing", "checkpoint-storage"),
    ],
)
def test_billing_commands_are_answered(cli: Cli, command: tuple[str, ...]) -> None:
    cli.told(*command)


def test_version_is_that_of_the_sdk(cli: Cli) -> None:
    assert tinker.__version__ in cli.told("version")
