"""Is this Redis fit to hold the operation log? Asked once at every service's start.

Only INFO is read: application users of a shared server may not see its configuration.
"""

import logging
from collections.abc import Mapping
from typing import Any, cast

import redis.asyncio as redis

from luthier_core.errors import ConfigError

log = logging.getLogger(__name__)

FLOOR = {"redis": (7, 0), "valkey": (7, 2)}
"""Oldest versions with function libraries and sharded pub/sub (reliability 2.4)."""

_LUA_FIXES = {"redis": (8, 2, 2), "valkey": (8, 1, 4)}
"""First versions with the fixes of CVE-2025-49844, -46817 and -46818 (Lua)."""


async def check_server(client: redis.Redis, *, allow_volatile: bool) -> None:
    """ConfigError, with what to set, for a server that is too old or may forget what it took.

    With `allow_volatile` one that may forget is let through with a warning.
    """
    info = await cast(Any, client.info("everything"))
    if problem := too_old(info):
        raise ConfigError(problem)
    if problem := volatile(info):
        if not allow_volatile:
            raise ConfigError(f"{problem} (or --allow-volatile-redis, for play)")
        log.warning("%s: accepted requests may be lost", problem)
    name, version = server_version(info)
    if version < _LUA_FIXES[name]:
        # A distribution may have the fixes under an older version, so this is no refusal.
        log.warning(
            "%s %s: see that it has the fixes of CVE-2025-49844, CVE-2025-46817, CVE-2025-46818",
            name,
            ".".join(str(part) for part in version),
        )


def server_version(info: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """(redis or valkey, version). Valkey also says that it is some Redis, for old clients."""
    name = "valkey" if "valkey_version" in info else "redis"
    return name, tuple(int(part) for part in str(info[f"{name}_version"]).split(".")[:3])


def too_old(info: Mapping[str, Any]) -> str | None:
    """What is wrong with the server's version, in one sentence."""
    name, version = server_version(info)
    if version >= FLOOR[name]:
        return None
    found = ".".join(str(part) for part in version)
    return f"{name} {found} is too old: Redis 7.0 or newer, or Valkey 7.2 or newer, is needed"


def volatile(info: Mapping[str, Any]) -> str | None:
    """Why the server may forget, and what to set."""
    if not int(info.get("aof_enabled", 0)):
        return "Redis keeps no append-only file: set `appendonly yes` and `appendfsync always`"
    policy = str(info.get("maxmemory_policy", ""))
    if policy != "noeviction":
        return f"Redis evicts keys when it is full ({policy}): set `maxmemory-policy noeviction`"
    return None
