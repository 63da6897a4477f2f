"""The life of one `luthier up`: prepare, start, watch, drain. Returns the exit code."""

import asyncio
import contextlib
import errno
import shlex
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from luthier.up.access import ADMIN_SCOPES, register_keys
from luthier.up.folder import DataFolder, open_data_folder, runtime_folder, write_private
from luthier.up.models import check_models, fetch_models
from luthier.up.options import ApiKey, UpOptions
from luthier.up.plan import PartSpec, build_config, service_specs, valkey_spec
from luthier.up.probes import open_probes
from luthier.up.process import dies_with_parent, signal_group
from luthier.up.stack import Stack
from luthier.up.status import StatusFile
from luthier.up.valkey import find_server, server_config
from luthier.up.view import View, open_view
from luthier_core.config import dump_config
from luthier_core.errors import ConfigError

KILLED = 130
"""Exit code after a second Ctrl-C."""
RUN_READY_S = 300.0
"""How long `--run` waits for the stack before it gives up."""
COMMAND_GRACE_S = 5.0


def run_up(options: UpOptions, environ: Mapping[str, str]) -> int:
    """Runs the stack until a signal or the end of `--run`; ConfigError where it cannot start."""
    return asyncio.run(_interruptible(options, environ))


async def _interruptible(options: UpOptions, environ: Mapping[str, str]) -> int:
    """The first signal cancels, which drains; the second cancels the drain, which kills."""
    num_signals = 0
    up = asyncio.ensure_future(_up(options, environ))

    def on_signal() -> None:
        nonlocal num_signals
        num_signals += 1
        up.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    try:
        return await up
    except asyncio.CancelledError:
        return 0 if num_signals == 1 else KILLED
    except BaseExceptionGroup as group:
        if known := group.subgroup(ConfigError):
            raise _first(known) from None
        raise


def _first(group: BaseExceptionGroup[ConfigError]) -> ConfigError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _up(options: UpOptions, environ: Mapping[str, str]) -> int:
    with (
        open_data_folder(options.data) as folder,
        runtime_folder(environ) as runtime,
        open_view(quiet_stdout=bool(options.command)) as view,
    ):
        check_models(options.models)
        port = free_port(options.host, options.port)
        secret = folder.secret()
        api_keys = options.api_keys or (_own_key(folder, view),)
        config = build_config(
            options,
            folder,
            models=await fetch_models(options.models, folder, environ, view.say),
            port=port,
            redis_url=options.redis_url or f"unix://{runtime / 'valkey.sock'}",
            registry_socket=runtime / "registry.sock",
            environ=environ,
        )
        write_private(folder.config_file, dump_config(config))
        admin_key = ApiKey(folder.admin_key(), scopes=ADMIN_SCOPES)
        await register_keys(config, secret, [*api_keys, admin_key])
        specs = service_specs(config, folder, environ)
        if not options.redis_url:
            specs.insert(0, _prepare_valkey(folder, runtime, environ))
        url = _base_url(options.host, port)
        status_file = StatusFile(folder.status_file, url, _process_start_s())
        async with open_probes(
            config.redis_url, url=url, registry_url=config.registry_url
        ) as probes:
            if options.redis_url:
                await probes.check_redis(allow_volatile=options.allow_volatile_redis)
            stack = Stack(specs, probes, view, status_file)
            try:
                async with stack.running():
                    return await _serve(stack, options, folder, api_keys[0], environ)
            finally:
                folder.endpoint_file.unlink(missing_ok=True)
                folder.status_file.unlink(missing_ok=True)


async def _serve(
    stack: Stack,
    options: UpOptions,
    folder: DataFolder,
    api_key: ApiKey,
    environ: Mapping[str, str],
) -> int:
    """From the start of the parts to the exit code."""
    try:
        async with asyncio.timeout(RUN_READY_S if options.command else None):
            await stack.watch_until_ready()
    except TimeoutError:
        stack.view.say(f"not ready after {RUN_READY_S:g} s; the parts' logs are in {folder.logs}")
        return 1
    status = stack.status_file
    ready_after_s = status.set_ready(stack.statuses())
    write_private(folder.endpoint_file, f"{status.url}\n")
    shown_key = (
        "YOUR_KEY" if options.api_keys else f"$(cat {shlex.quote(str(folder.api_key_file))})"
    )
    stack.view.say(f"ready in {ready_after_s:.1f} s: {status.url}")
    stack.view.say(f"export TINKER_BASE_URL={status.url} TINKER_API_KEY={shown_key}")
    if not options.command:
        await stack.watch()
    async with asyncio.TaskGroup() as group:
        watch = group.create_task(stack.watch())
        code = await run_command(
            options.command,
            {**environ, "TINKER_BASE_URL": status.url, "TINKER_API_KEY": api_key.key},
        )
        watch.cancel()
    return code


def _own_key(folder: DataFolder, view: View) -> ApiKey:
    """The key that this stack made for itself, shown when it is made and never again."""
    key, is_new = folder.api_key()
    if is_new:
        view.say(f"made an API key: {key} (shown only now; it is kept in {folder.api_key_file})")
    else:
        view.say(f"the API key is in {folder.api_key_file}")
    return ApiKey(key)


def _prepare_valkey(folder: DataFolder, runtime: Path, environ: Mapping[str, str]) -> PartSpec:
    config_file = folder.valkey / "valkey.conf"
    write_private(config_file, server_config(folder.valkey, runtime / "valkey.sock"))
    return valkey_spec(find_server(), config_file, folder, environ)


def free_port(host: str, port: int) -> int:
    """`port` if this machine can listen on it, any free one for 0; ConfigError if it is busy."""
    if not 0 <= port <= 65535:  # getaddrinfo would take it modulo 65536
        raise ConfigError(f"--port {port}: expected 0..65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            # As the gateway does: connections of a former stack that linger are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port}: in use on {host}; choose another, or 0 for any free port"
            ) from None
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from None
    except UnicodeError as error:  # a name that cannot be one
        raise ConfigError(f"--host {host}: {error}") from None


def _base_url(host: str, port: int) -> str:
    """Where clients on this machine reach the gateway."""
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _process_start_s() -> float:
    """When this process began, so that time to ready counts Python's own start."""
    return psutil.Process().create_time()


async def run_command(command: str, environ: Mapping[str, str]) -> int:
    """The exit code of a shell command, as a shell says it. Cancelling ends it and its children."""
    process = await asyncio.create_subprocess_shell(
        command, env=dict(environ), start_new_session=True, preexec_fn=dies_with_parent()
    )
    try:
        code = await process.wait()
    except asyncio.CancelledError:
        signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COMMAND_GRACE_S):
                await process.wait()
        raise
    finally:
        signal_group(process.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code
