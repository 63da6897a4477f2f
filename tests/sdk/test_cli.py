"""The commands that talk to a server: what they print, and their exit codes."""

import json
import re
import socket
import tarfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.acceptance.stack import Stack
from tests.sdk.conftest import BASE_MODEL, KEYS
from typer.main import get_command
from typer.testing import CliRunner

import luthier
from luthier import types
from luthier.cli import app, checkpoints, remote


@pytest.fixture(autouse=True)
def environment(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", stack.url)
    monkeypatch.setenv("TINKER_API_KEY", KEYS["ann"])


def run(*arguments: str, code: int = 0, typed: str = "") -> str:
    """Standard output of a command that exits with 0, standard error of one with another code."""
    ended = CliRunner().invoke(app, list(arguments), input=typed)
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
    assert BASE_MODEL in run("run", "info", run_id)
    assert BASE_MODEL in run("run", "list")
    assert BASE_MODEL in run("model", "list")


def test_the_trace_of_a_session_is_written_to_a_file(
    training: luthier.TrainingClient, tmp_path: Path
) -> None:
    session_id, path = training.model_id.partition(":")[0], tmp_path / "a.pftrace"
    told = run_json("session", "trace", session_id, "-o", str(path))
    assert told == {"session_id": session_id, "path": str(path)}
    events = json.loads(path.read_text())["traceEvents"]
    assert {"create_model", "executed"} <= {event["name"] for event in events}


def test_why_a_run_waits_is_told_and_what_it_has_queued_is_cancelled(
    training: luthier.TrainingClient, stack: Stack
) -> None:
    run_id, session_id = training.model_id, training.model_id.partition(":")[0]
    early = {"model_id": run_id, "seq_id": 3, "adam_params": {}}
    url, headers = f"{stack.url}/api/v1/optim_step", {"X-API-Key": KEYS["ann"]}
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(early).encode(), headers)).close()
    (row,) = run_json("session", "queue", session_id)["runs"]
    assert (row["run_id"], row["num_parked"]) == (run_id, 1)
    assert "waiting for seq 1" in run("session", "queue", session_id)
    # What waits for an earlier request is not in the queue yet.
    assert run_json("run", "cancel-queued", run_id) == {"run_id": run_id, "num_cancelled": 0}
    assert run("run", "cancel-queued", run_id) == f"{run_id}: 0 cancelled\n"


def test_checkpoints_are_listed_described_and_deleted(training: luthier.TrainingClient) -> None:
    path = training.save_weights_for_sampler("listed").result().path
    listed = run_json("checkpoint", "list", "--run-id", training.model_id)["checkpoints"]
    assert [one["tinker_path"] for one in listed] == [path]
    assert path in run("checkpoint", "list", "--run-id", training.model_id)  # on one line
    assert run_json("checkpoint", "info", path)["checkpoint_type"] == "sampler"
    assert run_json("checkpoint", "delete", path, "--yes")["done"] == "deleted"
    assert run_json("checkpoint", "list", "--run-id", training.model_id)["checkpoints"] == []


def test_what_is_not_there_is_one_line_and_exit_1() -> None:
    assert run("run", "info", "no-such:train:0", code=1).startswith("luthier: 404")
    assert "tinker://<run>" in run("checkpoint", "info", "nonsense", code=1)


def test_an_unreachable_server_is_exit_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.transport.FIRST_PATIENCE_S", 0.1)
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:9")
    for command in (["model", "list"], ["run", "watch", "a:train:0"], ["chat", "a", "-m", "b"]):
        assert run(*command, code=3).count("\n") == 1


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


def test_the_loss_curve_of_a_run_is_what_its_passes_reported(
    training: luthier.TrainingClient,
) -> None:
    inputs = {"target_tokens": [6, 7], "weights": [1.0, 1.0]}
    data = [types.Datum(types.ModelInput.from_ints([5, 6]), inputs)]
    training.forward(data, "cross_entropy")
    passes = []
    for _ in range(3):
        passes.append(training.forward_backward(data, "cross_entropy"))
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    expected = [[seq, done.result().loss] for seq, done in zip((2, 4, 6), passes, strict=True)]
    assert run_json("run", "watch", training.model_id)["points"] == expected
    drawn = run("run", "watch", training.model_id, "--metric", "grad_norm", "--once")
    assert "grad_norm: first" in drawn
    assert "at step 7" in drawn
    assert run("run", "watch", "nowhere.jsonl", code=2).count("\n") == 1


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, by its words."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


def test_every_command_but_up_speaks_json() -> None:
    lacking = {
        path
        for path, command in leaves(get_command(app))
        if not any("--json" in parameter.opts for parameter in command.params)
    }
    assert lacking == {("up",)}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_there_for_every_shell(shell: str) -> None:
    ended = CliRunner().invoke(
        app, [], prog_name="luthier", env={"_LUTHIER_COMPLETE": f"source_{shell}"}
    )
    assert (ended.exit_code, "_LUTHIER_COMPLETE" in ended.stdout) == (0, True)


def test_a_checkpoint_is_published_expires_and_is_downloaded(
    training: luthier.TrainingClient, tmp_path: Path
) -> None:
    path = training.save_weights_for_sampler("fetched").result().path
    assert run_json("checkpoint", "publish", path)["done"] == "published"
    assert run_json("checkpoint", "info", path)["public"] is True
    assert run_json("checkpoint", "unpublish", path)["done"] == "unpublished"
    assert "7200" in run("checkpoint", "set-ttl", path, "7200")
    folder = tmp_path / "files"
    assert str(folder) in run("checkpoint", "download", path, "--out", str(folder))
    assert {"adapter_config.json"} <= {file.name for file in folder.iterdir()}
    assert "exists already" in run("checkpoint", "download", path, "--out", str(folder), code=2)
    again = ["checkpoint", "download", path, "--out", str(tmp_path / "again")]
    assert CliRunner().invoke(app, again).stderr == ""  # no bar where there is no terminal
    uploaded = run_json("checkpoint", "upload", str(folder), "--name", "again")
    assert uploaded["sampler_path"].endswith("/sampler_weights/again")
    assert "again" in run("checkpoint", "info", uploaded["tinker_path"])
    assert "is missing" in run("checkpoint", "upload", str(folder.parent), code=1)


@pytest.mark.parametrize("command", ["download", "upload"])
def test_a_terminal_shows_how_much_of_a_checkpoint_is_there(
    command: str,
    training: luthier.TrainingClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = training.save_weights_for_sampler("shown").result().path
    folder = str(tmp_path / "shown")
    download = ["checkpoint", "download", path, "--out", folder]
    if command == "upload":
        run(*download)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    wanted = download if command == "download" else ["checkpoint", "upload", folder]
    ended = CliRunner().invoke(app, wanted)
    assert ended.exit_code == 0
    assert re.search(r"(?P<all>\d[\d.]*)/(?P=all) (bytes|[kM]B)", ended.stderr)


def test_a_download_that_is_cut_short_is_no_checkpoint(tmp_path: Path) -> None:
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n123")

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as server:
        server.submit(answer, listener)
        with pytest.raises(OSError, match="3 of 10 bytes"):
            remote.fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/", tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("../up", tarfile.REGTYPE), ("/up", tarfile.REGTYPE), ("up", tarfile.SYMTYPE)],
)
def test_an_archive_is_unpacked_into_its_folder_only(
    name: str, kind: bytes, tmp_path: Path
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/hostname"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(member)
    with tarfile.open(tmp_path / "a.tar") as tar, pytest.raises(typer.Exit):
        checkpoints._unpack(tar, tmp_path / "folder")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.tar"]


def test_a_model_answers_in_the_terminal() -> None:
    said = ["chat", BASE_MODEL, "--max-tokens", "5"]
    greedy = [*said, "--temperature", "0"]
    answer = run_json(*greedy, "--message", "English: donut")["answer"]
    typed = run(*greedy, typed="English: donut\nEnglish: jar\n")  # and the input is at its end
    assert typed.startswith(f"you: {answer.splitlines()[0]}")
    assert typed.count("you: ") == 3
    assert "--message" in run(*said, "--json", code=2)


def test_the_key_in_use_is_named_and_makes_others(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run("key", "info")
    assert "ann" in shown
    assert run("key", "list", code=1).startswith("luthier: ")  # a key for work administers nothing
    monkeypatch.setenv("LUTHIER_ADMIN_KEY", (stack.data / "admin-key").read_text().strip())
    made = run_json("key", "create", "--org", "ann", "--name", "robot", "--scope", "read")
    listed = run_json("key", "list", "--org", "ann")["keys"]
    assert made["key_id"] in [key["key_id"] for key in listed]
    assert shown.split()[1] in [key["key_id"] for key in listed]
    assert run_json("key", "revoke", made["key_id"], "--org", "ann")


def test_usage_is_shown_by_model(training: luthier.TrainingClient) -> None:
    assert "data" in run_json("usage")
    assert "kind" in run("usage", "--days", "1")


def test_an_operator_administers_a_deployment(
    training: luthier.TrainingClient, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_ADMIN_KEY", (stack.data / "admin-key").read_text().strip())
    limited = ("--limit", "usd_per_month=5", "--limit", "requests_per_s=100")
    assert run_json("admin", "org", "create", "acme", *limited)["limits"]["usd_per_month"] == 5
    changed = ("--limit", "requests_per_s=50", "--limit", "usd_per_month=null")
    run("admin", "org", "set", "acme", "--limit", "stored_bytes=9", *changed)
    assert run("admin", "org", "set", "acme", "--enable").startswith("format ")
    (acme,) = [row for row in run("admin", "org", "list").splitlines() if "acme" in row]
    assert acme.split(maxsplit=3)[3].strip() == "requests_per_s=50, stored_bytes=9"
    lifted = run_json("admin", "org", "set", "acme", "--no-limits")["limits"]
    assert set(lifted.values()) == {None}
    assert "NAME=NUMBER" in run("admin", "org", "set", "acme", "--limit", "x", code=2)
    run("admin", "project", "create", "acme", "blue")
    assert "blue" in run("admin", "project", "list", "acme")
    run("admin", "user", "create", "acme", "kim", "kim@acme.example")
    assert "kim" in run("admin", "user", "list", "acme")
    wanted = ("--scope", "read", "--project", "blue", "--user", "kim", "--days", "1")
    key = run_json("admin", "key", "create", "acme", *wanted)
    assert key["key"].startswith("tml-")
    monkeypatch.setenv("TINKER_API_KEY", key["key"])
    assert run_json("run", "list")["training_runs"] == []
    run("admin", "key", "revoke", "acme", key["key_id"])
    assert run("run", "list", code=1).startswith("luthier: 401")
    assert key["key_id"] in run("admin", "key", "list", "acme")
    assert run_json("admin", "user", "delete", "acme", "kim")["num_revoked_keys"] == 0
    inputs = {"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]}
    datum = luthier.types.Datum(luthier.types.ModelInput.from_ints([1, 2, 3]), inputs)
    training.forward_backward([datum], "cross_entropy").result()
    assert "error" not in run_json("admin", "jobs", "--run", "usage")
    assert "sweep" in run("admin", "jobs")
    assert run("admin", "usage", "ann", "--by", "run", "--csv").startswith("run,")
    assert {"models"} <= run_json("admin", "queues").keys()
    assert "no other trainer" in run("admin", "move-run", training.model_id, code=1)
    assert "the only trainer" in run("admin", "drain", "trainer-0", code=1)
    run("admin", "rebuild-index")
    assert run_json("admin", "audit-check", "acme")["intact"]
