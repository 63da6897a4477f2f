"""`luthier up`: its arguments, its data folder, and how it supervises its parts."""

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import redis
from rich.console import Console
from typer.testing import CliRunner

from luthier.cli import app
from luthier.up.access import register_keys
from luthier.up.folder import is_locked, open_data_folder, runtime_folder
from luthier.up.options import (
    ApiKey,
    ModelSource,
    UpOptions,
    parse_api_keys,
    parse_models,
    parse_settings,
)
from luthier.up.parts import Backoff
from luthier.up.plan import PartSpec, build_config, service_specs, valkey_spec
from luthier.up.probes import open_probes
from luthier.up.run import free_port, run_command
from luthier.up.stack import Stack
from luthier.up.status import PartStatus, StatusFile, read_status
from luthier.up.valkey import find_server, server_config
from luthier.up.view import LogView
from luthier_core import keys
from luthier_core.auth import is_damaged, key_hmac
from luthier_core.blobs import open_blobs
from luthier_core.config import (
    Config,
    GatewayConfig,
    LimitsConfig,
    PriceConfig,
    TrainerConfig,
    dump_config,
    load_config,
)
from luthier_core.errors import ConfigError
from luthier_core.testing import running_valkey

SLEEP = "import sys; sys.stdin.read()"  # drains like a part: it ends with its standard input


def up(*arguments: str) -> tuple[int, str]:
    """(exit code, standard error) of `luthier up`."""
    result = CliRunner().invoke(app, ["up", *arguments])
    return result.exit_code, result.stderr


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "no-equals-sign"], "NAME=PATH_OR_HF_ID"),
        (["--model", "na me=/tmp"], "a NAME has"),
        (["--model", "a=/tmp", "--model", "a=/var"], "'a' is there twice"),
        (["--model", "a=/no/such/folder"], "there is no folder /no/such/folder"),
        (["--model", "a=/tmp"], "/tmp has no config.json"),
        (["--api-key", "sk-123"], "starts with 'tml-'"),
        (["--api-key", "tml-abc=Not Allowed"], "TENANT 'Not Allowed'"),
        (["--redis", "localhost:6379"], "expected redis://HOST"),
        (["--redis", "redis://host:port/0"], "--redis:"),
        (["--redis", "redis://127.0.0.1:1"], "--redis:"),
        (["--s3", "https://host/bucket"], "expected s3+http://HOST"),
        (["--s3", "s3+http://user:password@host/bucket"], "AWS_ACCESS_KEY_ID"),
        (["--s3", "s3+http://host/bucket"], "AWS_ACCESS_KEY_ID"),
        (["--set", "limits.max_rank"], "expected SECTION.KEY=VALUE"),
        (["--set", "redis_url=redis://host"], "expected SECTION.KEY=VALUE"),
        (["--set", "gateway.port=80"], "is the option --port"),
        (["--set", "limits.max_rang=64"], "limits.max_rang"),
        (["--set", "limits.max_rank=many"], "limits.max_rank"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
        (["--host", "no..name"], "--host no..name"),
        (["--port", "70000"], "--port 70000"),
        (["--sampler-engine", "tgi"], "sampler.engine: 'tgi' is not torch or vllm"),
    ],
)
def test_a_malformed_argument_is_one_line_and_exit_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    given = [] if "--model" in arguments else ["--model", f"tiny={model_folder}"]
    port = [] if "--port" in arguments else ["--port", "0"]

    before = psutil.Process().children()  # servers of other tests

    code, error = up("--data", str(tmp_path / "data"), *port, *given, *arguments)

    assert (code, error.count("\n")) == (2, 1)
    assert says in error
    assert psutil.Process().children() == before


def test_a_busy_port_is_one_line_and_exit_2(tmp_path: Path, model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        code, error = up(
            "--data", str(tmp_path / "data"), "--port", port, "--model", f"a={model_folder}"
        )

    assert (code, error.count("\n")) == (2, 1)
    assert f"--port {port}: in use" in error


def test_a_data_folder_that_is_a_file_is_one_line_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    code, error = up("--data", str(tmp_path / "data"))

    assert (code, error.count("\n")) == (2, 1)
    assert str(tmp_path / "data") in error


def test_a_second_up_on_a_data_folder_exits_2_and_names_the_first(tmp_path: Path) -> None:
    with open_data_folder(tmp_path):
        code, error = up("--data", str(tmp_path))

    assert (code, error.count("\n")) == (2, 1)
    assert f"pid {os.getpid()}" in error


def test_an_api_key_may_name_its_tenant() -> None:
    assert parse_api_keys(["tml-a", "tml-b==bob"]) == (
        ApiKey("tml-a", "default"),
        ApiKey("tml-b=", "bob"),
    )


def test_a_model_path_may_contain_an_equals_sign() -> None:
    assert parse_models(["Qwen/Qwen3-8B=/a=b"]) == (ModelSource("Qwen/Qwen3-8B", "/a=b"),)


def test_port_0_is_a_port_that_one_can_listen_on() -> None:
    with socket.create_server(("127.0.0.1", free_port("127.0.0.1", 0))):
        pass


# --- the data folder ------------------------------------------------------------------------------


def test_what_a_killed_stack_said_of_itself_is_gone_before_the_next_one_is_ready(tmp_path: Path):
    (tmp_path / "endpoint").write_text("http://127.0.0.1:1\n")
    (tmp_path / "status.json").write_text("{}")
    with open_data_folder(tmp_path) as folder:
        assert not folder.endpoint_file.exists()
        assert read_status(tmp_path) is None


def test_secrets_and_data_folder_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    with open_data_folder(tmp_path / "new" / "data") as folder:
        folder.secret()
        folder.api_key()

        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        assert stat.S_IMODE(folder.secret_file.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.api_key_file.stat().st_mode) == 0o600


def test_secrets_are_made_once(tmp_path: Path) -> None:
    with open_data_folder(tmp_path) as folder:
        secret, (key, is_new) = folder.secret(), folder.api_key()
    with open_data_folder(tmp_path) as folder:
        assert (folder.secret(), folder.api_key()) == (secret, (key, False))

    assert is_new
    assert len(secret) == 32
    assert key.startswith("tml-")
    assert not is_damaged(key)


def test_logs_of_the_last_stack_are_kept_once(tmp_path: Path) -> None:
    for text in ("first", "second", "third"):
        with open_data_folder(tmp_path) as folder:
            folder.log_file("gateway").write_text(text)

    assert (tmp_path / "logs" / "gateway.log").read_text() == "third"
    assert (tmp_path / "logs" / "gateway.log.old").read_text() == "second"


def test_a_killed_up_holds_its_folder_until_its_valkey_has_ended(tmp_path: Path) -> None:
    with open_data_folder(tmp_path) as folder:
        orphan = subprocess.Popen(
            [sys.executable, "-c", SLEEP], stdin=subprocess.PIPE, pass_fds=(folder.lock_fd,)
        )
    assert is_locked(tmp_path)

    orphan.communicate()

    assert not is_locked(tmp_path)


def test_a_socket_folder_is_private_and_short_whatever_the_environment(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    with runtime_folder({"XDG_RUNTIME_DIR": str(long)}) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(str(folder / "registry.sock")) < 107
    assert not folder.exists()


# --- configuration, keys, Valkey ------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """What passes for a model until a worker loads it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def make_config(data: Path, **options: object) -> tuple[Config, list[PartSpec]]:
    """The configuration and parts of a stack that serves models `a` and `b`."""
    with open_data_folder(data) as folder:
        folder.secret()
        config = build_config(
            UpOptions(data=data, **options),  # type: ignore[arg-type]
            folder,
            models=[("a", data), ("b", data)],
            port=8123,
            redis_url="unix:///run/valkey.sock",
            registry_socket=Path("/run/registry.sock"),
            environ={},
        )
        return config, service_specs(config, folder, {})


def test_the_written_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path, num_trainers=2)
    (tmp_path / "luthier.toml").write_text(dump_config(config))

    assert load_config(tmp_path / "luthier.toml", {}) == config
    assert [(m.name, m.num_trainers) for m in config.models] == [("a", 2), ("b", 2)]


def test_settings_are_written_beside_the_defaults(tmp_path: Path) -> None:
    texts = ["limits.custom_losses=true", "trainer.execution=fused", "trainer.lease_s=7.5"]
    config, _ = make_config(tmp_path, settings=parse_settings(texts))

    assert config.limits == LimitsConfig(custom_losses=True)
    assert config.trainer == TrainerConfig(execution="fused", lease_s=7.5)
    assert config.gateway == GatewayConfig(port=8123)


def test_prices_are_a_setting(tmp_path: Path) -> None:
    prices = '[{model = "a", train = 2, prefill = 0.5, cached = 0.1, sample = 1}]'
    texts = [f"prices={prices}", "storage_usd_per_gigabyte_month=0.02"]
    config, _ = make_config(tmp_path, settings=parse_settings(texts))

    expected = PriceConfig(model="a", train=2.0, prefill=0.5, cached=0.1, sample=1.0)
    assert config.prices == (expected,)
    assert config.storage_usd_per_gigabyte_month == 0.02


def test_every_model_has_its_workers_and_no_name_is_there_twice(tmp_path: Path) -> None:
    _, specs = make_config(tmp_path, num_samplers=2)

    assert [spec.name for spec in specs] == [
        *("registry", "gateway", "trainer-0", "trainer-1"),
        *("sampler-0", "sampler-1", "sampler-2", "sampler-3"),
    ]
    assert [spec.argv[-1] for spec in specs if spec.role == "sampler"] == ["a", "a", "b", "b"]


async def test_a_registered_key_is_a_record_under_its_hmac(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path)
    await register_keys(config, config.secret(), [ApiKey("tml-x", "ann")])

    async with open_blobs(config) as blobs:
        record = json.loads(
            await blobs.get(keys.api_key_record(key_hmac(config.secret(), "tml-x")))
        )
    assert (record["tenant"], record["scopes"]) == ("ann", ["read", "train", "sample"])
    assert b"tml-x" not in everything_in(tmp_path)


async def test_a_registered_key_can_move_to_another_tenant(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path)
    for tenant in ("ann", "bob"):
        await register_keys(config, config.secret(), [ApiKey("tml-x", tenant)])

    async with open_blobs(config) as blobs:
        record = json.loads(
            await blobs.get(keys.api_key_record(key_hmac(config.secret(), "tml-x")))
        )
    assert record["tenant"] == "bob"


# --- one stack of trivial parts -------------------------------------------------------------------


class Recorder:
    """A view that remembers events and lets a test wait for one."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._more = asyncio.Event()

    def say(self, text: str) -> None:
        self.event(text)

    def event(self, text: str) -> None:
        self.events.append(text)
        self._more.set()

    def show(self, parts: Sequence[PartStatus]) -> None:
        pass

    async def seen(self, text: str, *, times: int = 1) -> None:
        while sum(text in event for event in self.events) < times:
            self._more.clear()
            async with asyncio.timeout(20):
                await self._more.wait()


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with running_valkey() as url:
        yield url


async def until(condition: Callable[[], bool]) -> None:
    """Returns once another process has made the condition true."""
    async with asyncio.timeout(20):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def has_said(spec: PartSpec, text: str) -> bool:
    return spec.log_file.exists() and text in spec.log_file.read_text()


def part(folder: Path, name: str, program: str, **fields: object) -> PartSpec:
    """A part that runs a line of Python."""
    return PartSpec(
        name=name,
        role=name.split("-")[0],
        argv=(sys.executable, "-c", program),
        log_file=folder / f"{name}.log",
        environ=dict(os.environ),
        **fields,  # type: ignore[arg-type]
    )


@contextlib.asynccontextmanager
async def running(
    specs: Sequence[PartSpec], redis_url: str, folder: Path, *, grace_s: float = 20
) -> AsyncIterator[tuple[Stack, Recorder]]:
    """A running stack of these parts; leaves only when it is gone."""
    view = Recorder()
    status_file = StatusFile(folder / "status.json", "http://127.0.0.1:1", 0.0)
    async with open_probes(redis_url, url=status_file.url, registry_url="unix:///none") as probes:
        stack = Stack(
            specs,
            probes,
            view,
            status_file,
            grace_s=grace_s,
            backoff=lambda: Backoff(first_s=0.01, max_s=0.02),
        )
        async with stack.running():
            yield stack, view


def test_waits_double_up_to_a_limit_and_start_anew_after_a_healthy_run() -> None:
    backoff = Backoff(first_s=0.5, max_s=30.0, healthy_s=60.0)

    assert [backoff.delay_s(1.0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [backoff.delay_s(ran_s) for ran_s in (61.0, 1.0)] == [0.5, 1.0]


async def test_a_part_that_exits_is_started_again_and_counted(
    redis_url: str, tmp_path: Path
) -> None:
    async with running([part(tmp_path, "gateway", "exit(3)")], redis_url, tmp_path) as (
        stack,
        view,
    ):
        await view.seen("gateway: exited with 3; starts again", times=3)
        assert stack.statuses()[1].restarts >= 2


async def test_what_a_part_said_last_is_shown_when_it_exits(redis_url: str, tmp_path: Path) -> None:
    program = "import sys; print('cannot load the model', file=sys.stderr); exit(1)"
    async with running([part(tmp_path, "trainer-0", program)], redis_url, tmp_path) as (_, view):
        await view.seen("trainer-0: last said: cannot load the model")


async def test_the_lease_of_a_killed_worker_is_gone_before_it_starts_again(
    redis_url: str, tmp_path: Path
) -> None:
    # The program does what a worker does: it leaves a lease behind. It fails if there is one.
    program = (
        "import redis, sys\n"
        f"client = redis.Redis.from_url({redis_url!r})\n"
        f"assert client.set({keys.worker_lease('trainer-0')!r}, '{{}}', nx=True, ex=60)\n"
        "print('took the lease', flush=True)\n"
        "exit(7)\n"
    )
    with redis.Redis.from_url(redis_url) as client:
        client.set(keys.worker_lease("trainer-0"), "{}")  # left by a stack that was killed

    async with running([part(tmp_path, "trainer-0", program)], redis_url, tmp_path) as (_, view):
        await view.seen("trainer-0: exited with 7", times=3)

    assert not any("exited with 1" in event for event in view.events)


async def test_a_worker_is_ready_when_the_lease_of_its_own_process_says_so(
    redis_url: str, tmp_path: Path
) -> None:
    async with running([part(tmp_path, "sampler-0", SLEEP)], redis_url, tmp_path) as (stack, view):
        await view.seen("sampler-0: started")
        with redis.Redis.from_url(redis_url) as client:
            client.sadd(keys.WORKERS, "sampler-0")
            for pid in (1, stack.parts[0].pid):
                client.set(
                    keys.worker_lease("sampler-0"), json.dumps({"state": "ready", "pid": pid})
                )
                before = stack.statuses()[1].state
                await stack.look()

    assert before == "starting"
    assert "sampler-0: ready" in view.events


async def test_a_stopped_stack_leaves_no_process_not_even_a_deaf_one_or_a_grandchild(
    redis_url: str, tmp_path: Path
) -> None:
    deaf = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {SLEEP!r}], stdin=subprocess.PIPE)\n"
        "print('deaf', flush=True)\n"
        "signal.pause()\n"
    )
    specs = [part(tmp_path, "trainer-0", deaf), part(tmp_path, "registry", SLEEP)]
    before = set(psutil.Process().children(recursive=True))  # of other tests
    async with running(specs, redis_url, tmp_path, grace_s=0.2) as (stack, view):
        # It may speak before its parent's own call that starts it has returned.
        await until(lambda: has_said(specs[0], "deaf") and stack.parts[0].pid is not None)
        family = set(psutil.Process().children(recursive=True)) - before
        assert len([process for process in family if "-c" in process.cmdline()]) == 3

    # A killed grandchild is nobody's here to wait for: it is gone as soon as the kernel is done.
    await until(lambda: not any(p.is_running() and _is_ours(p) for p in family))
    assert [part.state for part in stack.parts] == ["stopped", "stopped"]
    assert "trainer-0: did not drain within 0.2 s: killed" in view.events


def _is_ours(process: psutil.Process) -> bool:
    """A part that runs, neither the module's Valkey nor a zombie that waits for its reaper."""
    try:
        return "-c" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_an_error_of_up_itself_leaves_no_process(redis_url: str, tmp_path: Path) -> None:
    pids: list[int | None] = []

    async def fail() -> None:
        spec = part(tmp_path, "gateway", SLEEP)
        async with running([spec], redis_url, tmp_path) as (stack, view):
            await view.seen("gateway: started")
            pids.append(stack.parts[0].pid)
            raise RuntimeError("a bug")

    with pytest.raises(ExceptionGroup):
        await fail()

    assert not psutil.pid_exists(pids[0] or 0)


async def test_a_second_interrupt_kills_at_once(redis_url: str, tmp_path: Path) -> None:
    deaf = (
        "import signal; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); "
        "signal.pause()"
    )
    spec = part(tmp_path, "gateway", deaf)
    pids: list[int | None] = []

    async def forever() -> None:
        async with running([spec], redis_url, tmp_path, grace_s=600) as (stack, _):
            await until(lambda: has_said(spec, "deaf"))
            pids.append(stack.parts[0].pid)
            task.cancel()
            asyncio.get_running_loop().call_later(0.05, task.cancel)
            await asyncio.Event().wait()

    task = asyncio.create_task(forever())
    with pytest.raises(asyncio.CancelledError):
        await task

    assert not psutil.pid_exists(pids[0] or 0)


async def test_valkey_is_durable_private_and_comes_back_with_its_data(tmp_path: Path) -> None:
    with open_data_folder(tmp_path / "data with space") as folder, runtime_folder({}) as runtime:
        url = f"unix://{runtime / 'valkey.sock'}"
        config_file = folder.valkey / "valkey.conf"
        config_file.write_text(server_config(folder.valkey, runtime / "valkey.sock"))
        spec = valkey_spec(find_server(), config_file, folder, os.environ)
        async with running([spec], url, folder.path) as (stack, view):
            with redis.Redis.from_url(url, retry_on_error=[redis.ConnectionError]) as client:
                settings = client.config_get("append*", "maxmemory-policy", "port", "save")
                client.set("kept", "yes")
                os.kill(stack.parts[0].pid or 0, signal.SIGKILL)
                await view.seen("valkey: started", times=2)
                while stack.parts[0].state != "ready":
                    await stack.look()
                assert client.get("kept") == b"yes"

    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "always"
    assert settings["maxmemory-policy"] == "noeviction"
    assert (settings["port"], settings["save"]) == ("0", "")


async def test_a_valkey_that_cannot_start_is_one_clear_error(tmp_path: Path) -> None:
    spec = part(
        tmp_path, "valkey", "print('Bad file format reading the append only file'); exit(1)"
    )
    with pytest.raises(ExceptionGroup) as caught:
        async with running([spec], "unix:///no/such.sock", tmp_path):
            pass

    assert caught.group_contains(ConfigError, match="valkey: Bad file format")


def test_events_are_lost_without_harm_when_nobody_can_read_them() -> None:
    reader, writer = os.pipe()
    os.close(reader)

    with io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True) as broken:
        LogView(Console(file=broken)).event("trainer-0: draining")


# --- status and --run -----------------------------------------------------------------------------


async def test_status_shows_each_part_with_its_memory(redis_url: str, tmp_path: Path) -> None:
    with open_data_folder(tmp_path):
        async with running([part(tmp_path, "gateway", SLEEP)], redis_url, tmp_path) as (stack, _):
            stack.status_file.set_ready(stack.statuses())
            status = read_status(tmp_path)
            result = CliRunner().invoke(app, ["status", "--data", str(tmp_path)])

    assert status is not None
    assert [part.name for part in status.parts] == ["up", "gateway"]
    assert result.exit_code == 0
    assert "PSS MB" in result.stdout
    assert "ready in" in result.stdout


def test_status_of_nothing_exits_1(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["status", "--data", str(tmp_path)])

    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -TERM $$", 143)])
async def test_run_exits_with_the_code_of_its_command(command: str, code: int) -> None:
    assert await run_command(command, os.environ) == code


async def test_a_cancelled_run_ends_the_command_and_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    task = asyncio.create_task(
        run_command(
            f"sleep 600 & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}; wait", os.environ
        )
    )
    await until(pid_file.exists)
    child = psutil.Process(int(pid_file.read_text()))

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
