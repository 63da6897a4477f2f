"""A real Prometheus scrapes the demo, and faults fire alerts.

The rules are those of deploy/prometheus with seconds for minutes in `for`, so that nobody waits.
"""

import asyncio
import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import yaml
from tests.deploy.manifests import ROOT
from tests.deploy.pods import Cluster, running_cluster

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed"),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
FIRES_S = 120.0
ENGINE = "luthier_trainer.engine_child"


class Prometheus:
    """One server, asked by its HTTP API."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self._url, self._http = url, http

    async def ask(self, path: str) -> Any:
        async with self._http.get(f"{self._url}/api/v1/{path}") as answer:
            return (await answer.json())["data"]

    async def firing(self) -> set[str]:
        alerts = (await self.ask("alerts"))["alerts"]
        return {a["labels"]["alertname"] for a in alerts if a["state"] == "firing"}

    async def until_fires(self, name: str) -> None:
        """Returns once this alert fires; AssertionError with those that do after FIRES_S."""
        deadline = time.monotonic() + FIRES_S
        while name not in (firing := await self.firing()):
            assert time.monotonic() < deadline, f"{name} does not fire; {firing} do"
            await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def running_prometheus(cluster: Cluster, folder: Path) -> AsyncIterator[Prometheus]:
    rules = (ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text()
    loaded = yaml.safe_load(rules)
    for rule in loaded["groups"][0]["rules"]:
        if "for" in rule:
            rule["for"] = rule["for"].replace("m", "s")
    (folder / "alerts.yaml").write_text(yaml.safe_dump(loaded))
    pods = [pod for pod in cluster.pods if pod.labels.get("luthier.dev/metrics") == "true"]
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [
            {
                "job_name": "luthier",
                "honor_labels": True,
                "static_configs": [
                    {"targets": [f"{pod.address}:{pod.port('ops')}" for pod in pods]}
                ],
            }
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"{cluster.network.address()}:9090"
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={folder}/prometheus.yaml",
            f"--storage.tsdb.path={folder}/tsdb",
            f"--web.listen-address={address}",
            stdout=log,
            stderr=log,
        )
    try:
        async with aiohttp.ClientSession() as http:
            prometheus = Prometheus(f"http://{address}", http)
            await _until(lambda: prometheus.ask("rules"), cluster, "prometheus.log")
            yield prometheus
    finally:
        process.terminate()
        await process.wait()


async def _until(ask: Callable[[], Any], cluster: Cluster, log: str) -> None:
    deadline = time.monotonic() + FIRES_S
    while True:
        try:
            await ask()
            return
        except (aiohttp.ClientError, KeyError):
            assert time.monotonic() < deadline, cluster.log(log)
            await asyncio.sleep(0.2)


async def test_prometheus_reads_every_part_and_faults_fire_alerts():
    with tempfile.TemporaryDirectory(prefix="lu-prom-") as name:
        folder = Path(name)
        async with (
            running_cluster("cpu-demo", folder) as cluster,
            running_prometheus(cluster, folder) as prometheus,
        ):
            await _all_targets_are_up(prometheus)
            await _all_rules_are_well(prometheus)
            assert await prometheus.firing() == set()

            async with aiohttp.ClientSession() as http:
                ann, bob = [
                    Tenant(cluster, http, await cluster.new_key(tenant))
                    for tenant in ("ann", "bob")
                ]
                await _ask_for_the_run_of_another(ann, bob)
                await prometheus.until_fires("LuthierForeignIds")

                await _kill_engines(cluster, ann, 4)
                await prometheus.until_fires("LuthierEngineDies")

            (sampler,) = cluster.pods_of("sampler")
            assert sampler.process is not None
            sampler.process.send_signal(signal.SIGSTOP)
            try:
                await prometheus.until_fires("LuthierPartDown")
                await prometheus.until_fires("LuthierNoWorker")
            finally:
                sampler.process.send_signal(signal.SIGCONT)


async def _all_targets_are_up(prometheus: Prometheus) -> None:
    deadline = time.monotonic() + FIRES_S
    while True:
        targets = (await prometheus.ask("targets"))["activeTargets"]
        if len(targets) == 5 and all(target["health"] == "up" for target in targets):
            return
        assert time.monotonic() < deadline, targets
        await asyncio.sleep(0.5)


async def _all_rules_are_well(prometheus: Prometheus) -> None:
    written = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())
    deadline = time.monotonic() + FIRES_S
    while True:
        (group,) = (await prometheus.ask("rules"))["groups"]
        if all(rule["health"] == "ok" for rule in group["rules"]):
            break
        assert time.monotonic() < deadline, group["rules"]
        await asyncio.sleep(0.5)
    assert len(group["rules"]) == len(written["groups"][0]["rules"])


class Tenant:
    """Who uses the stack, by bare HTTP."""

    def __init__(self, cluster: Cluster, http: aiohttp.ClientSession, key: str) -> None:
        self._url, self._http, self._key = f"{cluster.url}/api/v1", http, key

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        headers = {"X-API-Key": self._key}
        async with self._http.post(f"{self._url}/{path}", json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    async def new_run(self) -> str:
        """The id of a run that a trainer has created: its engine is up."""
        _, session = await self.post("create_session", tags=[], sdk_version="0.38.0")
        status, created = await self.post(
            "create_model",
            session_id=session["session_id"],
            model_seq_id=0,
            base_model="luthier/demo",
            lora_config={"rank": 4},
        )
        assert status == 200, created
        request_id, status = created["request_id"], 408
        while status == 408:  # it is held for long
            status, created = await self.post("retrieve_future", request_id=request_id)
        assert status == 200, created
        return str(created["model_id"])


async def _ask_for_the_run_of_another(ann: Tenant, bob: Tenant) -> None:
    """A run of ann's, asked for by bob: once, and when that was seen, thirty times more."""
    run_id = await ann.new_run()
    for count in (1, 30):
        for _ in range(count):
            status, _ = await bob.post("get_info", model_id=run_id)
            assert status == 404
        await asyncio.sleep(3)  # three scrapes: what is first seen with a value never increased


async def _kill_engines(cluster: Cluster, ann: Tenant, times: int) -> None:
    """Kill the engine so many times, each once it works."""
    (trainer,) = cluster.pods_of("trainer")
    assert trainer.process is not None
    worker = psutil.Process(trainer.process.pid)
    for _ in range(times):
        await ann.new_run()
        for child in worker.children():
            if ENGINE in child.cmdline():
                child.kill()
