"""The Valkey server of the embedded stack: its command line and its configuration."""

from pathlib import Path

from luthier_core.errors import ConfigError
from luthier_core.testing import valkey_binary

MAX_MEMORY = "512mb"
"""Enough for 800,000 retained ops (reliability 2.4: 617 B each) on a machine that also trains."""


def find_server() -> str:
    """Path of a server binary, or a ConfigError that says how to get one."""
    try:
        return valkey_binary()
    except FileNotFoundError as error:
        raise ConfigError(f"{error}, or pass --redis URL") from None


def server_config(data: Path, socket: Path) -> str:
    """The server's configuration file: durable on every write, on a private socket, no port.

    Source: reliability 2.4. With appendfsync always a torn tail holds only writes that nobody was
    told of, so loading a truncated file is safe.
    """
    lines = [
        "port 0",
        f"unixsocket {_quoted(socket)}",
        "unixsocketperm 700",
        f"dir {_quoted(data)}",
        "daemonize no",
        "appendonly yes",
        "appendfsync always",
        "no-appendfsync-on-rewrite no",
        "aof-load-truncated yes",
        'save ""',
        f"maxmemory {MAX_MEMORY}",
        "maxmemory-policy noeviction",
        "maxmemory-clients 0",
        "client-output-buffer-limit pubsub 32mb 8mb 60",
        "timeout 0",
        "busy-reply-threshold 100",
    ]
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
