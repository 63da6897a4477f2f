"""Back a deployment up, lose it, restore it: lists, checkpoints and runs are what they were."""

import asyncio
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.contract.gateway_client import Api, Run, datum, logprobs_of
from tests.contract.gateway_stack import KEYS, GatewayStack, configure, running_services

from luthier_core.config import Config, dump_config
from luthier_core.testing import running_valkey
from luthier_registry.backup.__main__ import main

LISTS = ("training_runs", "checkpoints", "sessions")


def backup(what: str, folder: Path, saved: Path) -> subprocess.CompletedProcess[str]:
    argv = [what, "--config", str(folder / "config.toml"), "--folder", str(saved)]
    command = [sys.executable, "-m", "luthier_registry.backup", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False)


async def prepare(stack: GatewayStack) -> tuple[str, str]:
    """(run id, path of a checkpoint) after some training."""
    async with aiohttp.ClientSession() as http:
        api = Api(http, stack.url, KEYS["ann"])
        run = await api.run()
        for _ in range(3):
            await step(api, run)
        saved = await api.result(await run.send("save_weights", path="middle"))
        return run.run_id, str(saved["path"])


async def step(api: Api, run: Run) -> tuple[Any, float]:
    """Logprobs and norm of the gradient of one training step."""
    output = await api.training_output(await run.forward_backward(datum([1, 2, 3, 4])))
    metrics = (await api.result(await run.step()))["metrics"]
    return logprobs_of(output), float(metrics["grad_norm"])


async def look(stack: GatewayStack, run_id: str, path: str) -> dict[str, Any]:
    """What users see: their lists, what the run does next, and what its checkpoint gives."""
    async with aiohttp.ClientSession() as http:
        api = Api(http, stack.url, KEYS["ann"])
        seen: dict[str, Any] = {name: (await api.get(name)).json() for name in LISTS}
        seen["first result"] = (await api.outcome(f"{run_id}:1")).body
        seen["info"] = (await api.post("weights_info", {"tinker_path": path})).json()
        run = Run(api, run_id, next_seq=8)  # 3 x 2 ops and a save
        seen["next step"] = await step(api, run)
        again = await api.run()
        request = await again.send("load_weights", path=path, optimizer=True)
        await api.result(request)
        seen["step after the checkpoint"] = await step(api, again)
        return seen


@pytest.mark.slow
def test_a_restored_deployment_is_the_one_that_was_saved():
    with (
        tempfile.TemporaryDirectory(prefix="lu-bk-") as name,
        tempfile.TemporaryDirectory(prefix="lu-bk-") as other,
        running_valkey() as redis_url,
        running_valkey() as empty_url,
    ):
        folder, new = Path(name), Path(other)
        config = configure(folder, redis_url)
        with running_services(folder, config) as stack:
            assert backup("save", folder, folder / "early").returncode == 2  # workers are alive
            run_id, path = asyncio.run(prepare(stack))
        saved = backup("save", folder, folder / "saved")
        assert saved.returncode == 0, saved.stderr
        with running_services(folder, config) as stack:
            expected = asyncio.run(look(stack, run_id, path))

        fresh = moved(config, folder, new, empty_url)
        restored = backup("restore", new, folder / "saved")
        assert restored.returncode == 0, restored.stderr
        with running_services(new, fresh) as stack:
            assert asyncio.run(look(stack, run_id, path)) == expected


def moved(config: Config, folder: Path, new: Path, redis_url: str) -> Config:
    """The same deployment elsewhere, with the secret and without its data."""
    shutil.copytree(folder / "model", new / "model")
    shutil.copy(folder / "secret", new / "secret")
    (model,) = config.models
    fresh = replace(
        config,
        redis_url=redis_url,
        store_url=f"file://{new}/objects",
        registry_url=f"unix://{new}/registry.sock",
        secret_file=str(new / "secret"),
        models=(replace(model, path=str(new / "model")),),
    )
    (new / "config.toml").write_text(dump_config(fresh))
    return fresh


def test_half_a_backup_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "secret").write_text("00" * 32)
    config = Config(
        redis_url="redis://nowhere:1/0",
        store_url=f"file://{tmp_path}/objects",
        registry_url="http://nowhere:1",
        secret_file=str(tmp_path / "secret"),
    )
    (tmp_path / "luthier.toml").write_text(dump_config(config))
    (tmp_path / "saved").mkdir()
    argv = ["--config", f"{tmp_path}/luthier.toml", "--folder", f"{tmp_path}/saved"]
    assert main(["restore", *argv]) == 2
    assert "no complete backup" in capsys.readouterr().err
