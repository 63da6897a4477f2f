"""The containers' own commands as processes: they start, pass their probes, serve, and drain."""

import asyncio
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
import redis.asyncio as redis
from redis.exceptions import NoPermissionError
from tests.deploy.pods import Cluster, running_cluster

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed"),
]


async def test_every_part_of_the_demo_starts_passes_its_probes_and_drains():
    with tempfile.TemporaryDirectory(prefix="lu-pods-") as folder:
        async with running_cluster("cpu-demo", Path(folder)) as cluster:
            assert {pod.name.split("-")[0] for pod in cluster.pods} == {
                *("redis", "registry", "housekeeping", "gateway", "trainer", "sampler")
            }
            for pod in cluster.pods:
                for kind in ("startup", "readiness", "liveness"):
                    assert await pod.probe(kind), f"{kind} of {pod.name}"
            await _operator_is_known(cluster)
            await _no_part_may_command_redis(cluster)
            # Redis last: the others say goodbye to it.
            pods = sorted(cluster.pods, key=lambda pod: pod.name.startswith("redis"))
            for group in (pods[:-1], pods[-1:]):
                await asyncio.gather(*(pod.stop() for pod in group))
            assert [pod.name for pod in pods if pod.was_killed] == []
            failed = [pod.name for pod in pods if pod.process and pod.process.returncode != 0]
            assert {name: cluster.log(f"{name}.log") for name in failed} == {}


async def _operator_is_known(cluster: Cluster) -> None:
    headers = {"X-API-Key": cluster.secrets["operator-key"]}
    url = f"{cluster.url}/api/v1"
    async with aiohttp.ClientSession(headers=headers) as http:
        async with http.get(f"{url}/healthz") as answer:
            assert answer.status == 200, await answer.text()
        async with http.get(f"{url}/admin/queues") as answer:
            assert answer.status == 200, await answer.text()
            assert (await answer.json())["models"][0]["base_model"] == "luthier/demo"


async def _no_part_may_command_redis(cluster: Cluster) -> None:
    async with _redis(cluster, "default", cluster.secrets["redis-admin-password"]) as operator:
        assert await operator.acl_log() == [], "a part is denied what it needs"
    for pod in (pod for pod in cluster.pods if pod.main.is_ours):
        login = cluster.environ(pod.main, pod)
        forbidden = ["CONFIG GET dir", "KEYS *", "FLUSHALL", "SHUTDOWN", "ACL LIST", "MONITOR"]
        if login["REDIS_USERNAME"] == "luthier":
            forbidden += ["EVAL x 0", "SCRIPT FLUSH", "FUNCTION DELETE luthier1"]
        async with _redis(cluster, login["REDIS_USERNAME"], login["REDIS_PASSWORD"]) as client:
            for command in forbidden:
                with pytest.raises(NoPermissionError):
                    await client.execute_command(*command.split())


def _redis(cluster: Cluster, username: str, password: str) -> redis.Redis:
    address = urlsplit(cluster.config().redis_url)
    assert address.hostname is not None
    assert address.port is not None
    return redis.Redis(
        host=address.hostname, port=address.port, username=username, password=password
    )
