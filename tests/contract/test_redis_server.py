"""Which servers are taken for the operation log, asked of a real one."""

import pytest
import redis.asyncio as redis

from luthier_core.errors import ConfigError
from luthier_core.redis_server import check_server, too_old, volatile


async def test_a_server_with_aof_that_evicts_nothing_is_taken(valkey: redis.Redis):
    await check_server(valkey, allow_volatile=False)


@pytest.mark.parametrize(
    ("setting", "good", "bad", "said"),
    [
        ("appendonly", "yes", "no", "appendonly yes"),
        ("maxmemory-policy", "noeviction", "allkeys-lru", "maxmemory-policy noeviction"),
    ],
)
async def test_a_server_that_may_forget_is_refused_unless_that_is_allowed(
    valkey: redis.Redis, setting: str, good: str, bad: str, said: str
):
    await valkey.config_set(setting, bad)
    try:
        with pytest.raises(ConfigError, match=said):
            await check_server(valkey, allow_volatile=False)
        await check_server(valkey, allow_volatile=True)
    finally:
        await valkey.config_set(setting, good)


@pytest.mark.parametrize(
    ("info", "refused"),
    [
        ({"redis_version": "6.2.14"}, True),
        ({"redis_version": "7.0.0"}, False),
        ({"redis_version": "8.6.3"}, False),
        ({"redis_version": "7.2.4", "valkey_version": "7.2.5"}, False),
        ({"redis_version": "7.2.4", "valkey_version": "7.0.1"}, True),
    ],
)
def test_the_oldest_versions_are_redis_7_0_and_valkey_7_2(info: dict[str, str], refused: bool):
    assert (too_old(info) is not None) == refused


def test_what_is_wrong_is_one_sentence_that_says_what_to_set():
    assert volatile({"aof_enabled": 1, "maxmemory_policy": "noeviction"}) is None
    assert "\n" not in (volatile({"aof_enabled": 0}) or "")
