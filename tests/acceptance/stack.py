"""A real stack for tests: `luthier up` as a process, stopped, started and hurt at will."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tinker

from luthier_core import keys
from luthier_core.blobs import open_blobs
from luthier_core.checkpoints import TinkerPath, read_files
from luthier_core.config import load_config
from luthier_core.records import CheckpointRecord

BASE_MODEL = "luthier/demo"

# A test that is not through by then has failed; nothing is measured with these.
READY_S = 120.0
STOP_S = 60.0
ANSWER_S = 120.0

LAST_WORDS = 4000
"""Characters of a log that an error shows."""


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float) -> None:
    """Returns once the condition holds; TimeoutError if it does not within timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and waits for init to notice does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True, slots=True)
class Answer:
    """What the gateway answered to one request."""

    status: int
    body: bytes


class Stack:
    """One `luthier up` on one data folder."""

    def __init__(self, data: Path, model: Path, *options: str) -> None:
        self.data = data
        self.model = model
        self._argv = [
            *(sys.executable, "-m", "luthier.cli", "up", "--data", str(data)),
            *("--model", f"{BASE_MODEL}={model}", *options),
        ]
        self._log = data.with_suffix(".log")
        self._port = 0
        """Any free one at the first start and the same from then on: clients keep their URL."""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once everything is ready; RuntimeError with its output once a process ends."""
        for left in ("endpoint", "status.json"):  # by a stack that was killed
            (self.data / left).unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._argv, "--port", str(self._port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._has_endpoint, "luthier up", timeout_s=READY_S)
        self._port = int(self.url.rpartition(":")[2])

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """The exit code of `luthier up` after a signal to it."""
        assert self._process is not None
        self._process.send_signal(sent)
        return self._process.wait(STOP_S)

    def end(self) -> None:
        """Stops whatever still runs, however the test ended."""
        if self._process is None or self._process.poll() is not None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.stop()
        self._process.kill()
        self._process.wait(STOP_S)

    @property
    def url(self) -> str:
        return (self.data / "endpoint").read_text().strip()

    @property
    def api_key(self) -> str:
        """The key that the stack made for itself."""
        return (self.data / "api-key").read_text().strip()

    def processes(self) -> list[psutil.Process]:
        """`luthier up` and everything it has started that runs now."""
        assert self._process is not None
        up = psutil.Process(self._process.pid)
        return [up, *up.children(recursive=True)]

    def kill(self, *parts: str, sent: signal.Signals = signal.SIGKILL) -> None:
        """A signal to some parts at once; returns when the supervisor has noticed their ends."""
        pids = {part: self._pid(part) for part in parts}
        for part, pid in pids.items():
            assert pid is not None, f"{part} does not run"
            os.kill(pid, sent)
        for part, pid in pids.items():
            wait_until(lambda: self._pid(part) != pid, f"end of {part}", timeout_s=ANSWER_S)  # noqa: B023

    def kill_engine(self, trainer: str) -> None:
        """SIGKILL to the engine child of a trainer, which itself lives on."""
        pid = self._pid(trainer)
        assert pid is not None, f"{trainer} does not run"
        (engine,) = psutil.Process(pid).children()
        engine.kill()

    def num_restarts(self, part: str) -> int:
        return int(self._status(part)["restarts"])

    def wait_ready(self) -> None:
        """Returns once every model can train and sample."""
        wait_until(self._is_healthy, "healthz", timeout_s=READY_S)

    def service(self, api_key: str) -> tinker.ServiceClient:
        """The official SDK's client of this stack."""
        return tinker.ServiceClient(base_url=self.url, api_key=api_key)

    def request(self, method: str, path: str, body: Any = None, *, api_key: str) -> Answer:
        """One request as it goes over the wire: bytes as protobuf, anything else as JSON."""
        headers = {"X-API-Key": api_key, "Accept": "application/x-protobuf"}
        if isinstance(body, bytes):
            headers["Content-Type"] = "application/x-protobuf"
        elif body is not None:
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(
            f"{self.url}/api/v1/{path}", data=body, headers=headers, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
                return Answer(response.status, response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read())

    def retrieve(self, request_id: str, *, api_key: str) -> Answer:
        return self.request("POST", "retrieve_future", {"request_id": request_id}, api_key=api_key)

    def saved_files(self, tinker_path: str, tenant: str) -> dict[str, bytes]:
        """The files of a checkpoint, as they lie in the object store."""

        async def read() -> dict[str, bytes]:
            path = TinkerPath.parse(tinker_path)
            name = keys.name_record(tenant, path.run_id, path.kind, path.name)
            async with open_blobs(load_config(self.data / "luthier.toml", {})) as blobs:
                record = CheckpointRecord.from_bytes(await blobs.get(name))
                return await read_files(blobs, record.manifest_key)

        return asyncio.run(read())

    def _has_endpoint(self) -> bool:
        self._check_running()
        with contextlib.suppress(FileNotFoundError):  # nothing has been started yet
            self._check_parts()
        return (self.data / "endpoint").exists()

    def _check_running(self) -> None:
        """RuntimeError with its last words if `luthier up` has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            said = self._log.read_text(errors="replace")[-LAST_WORDS:]
            raise RuntimeError(f"luthier up ended with {self._process.returncode}:\n{said}")

    def _check_parts(self) -> None:
        """RuntimeError with its last words if a part has ended, though it is to start again."""
        for status in self._statuses():
            if status["restarts"] or status["state"] == "restarting":
                log = self.data / "logs" / f"{status['name']}.log"
                said = log.read_text(errors="replace")[-LAST_WORDS:]
                raise RuntimeError(f"{status['name']} ended at its start:\n{said}")

    def _is_healthy(self) -> bool:
        self._check_running()
        try:
            return self.request("GET", "healthz", api_key="").status == 200
        except OSError:  # the gateway is being started again
            return False

    def _pid(self, part: str) -> int | None:
        pid = self._status(part)["pid"]
        return int(pid) if pid else None

    def _status(self, part: str) -> dict[str, Any]:
        self._check_running()
        return next(status for status in self._statuses() if status["name"] == part)

    def _statuses(self) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = json.loads((self.data / "status.json").read_text())["parts"]
        return parts


@contextlib.contextmanager
def running_stack(data: Path, model: Path, *options: str) -> Iterator[Stack]:
    """A stack that is ready; nothing of it runs after the block."""
    stack = Stack(data, model, *options)
    try:
        stack.start()
        yield stack
    finally:
        stack.end()
