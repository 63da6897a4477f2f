"""VllmServer: a vLLM server as a child process, watched, and started again when it dies or hangs.

It listens on a Unix socket in a private folder: no other user, and no port, reaches it.
"""

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from luthier_core.config import ModelConfig, SamplerConfig
from luthier_core.errors import BadRequest, ConfigError, LuthierError
from luthier_sampler.admission import MAX_TOPK_LOGPROBS
from luthier_sampler.vllm_api import MAX_LORA_RANK

log = logging.getLogger(__name__)

START_S = 1800.0
"""Loading a large model from a slow disk takes minutes; this is when it counts as hung."""
START_CHECK_S = 0.1
START_PAUSES_S = (1.0, 5.0, 25.0)
"""Before each further try to start one that does not come up."""
CHECK_S = 5.0
CHECK_TIMEOUT_S = 20.0
MAX_MISSED_CHECKS = 3
"""One that does not answer so many in a row hangs, and is killed."""
CONNECT_S = 30.0
MAX_LINE_BYTES = 8 * 1024 * 1024
"""Of one event of a stream: the first repeats the prompt."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What adapters can be on while vLLM leaves lm_head as it is."""


class ServerGone(Exception):
    """The server died, or was killed as it did not answer: what it was asked may be asked again."""


class VllmServer:
    """start() it, post() to it, close() it; in between there is one server after the other."""

    def __init__(
        self, argv: Sequence[str], *, environ: Mapping[str, str], socket_path: Path
    ) -> None:
        self.incarnation = 0
        """Counts the servers that came up."""
        self._argv = argv
        self._environ = dict(environ)
        self._socket_path = socket_path
        self._pid = 0
        self._up = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        # A connection of its own for each request: a broken one then means a broken server, and
        # closing it is how a request is cancelled.
        self._session = aiohttp.ClientSession(
            "http://vllm",
            connector=aiohttp.UnixConnector(str(socket_path), limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            headers={"Content-Type": "application/json"},
            read_bufsize=MAX_LINE_BYTES,
        )

    async def start(self, ended: asyncio.Event) -> None:
        """Returns once it is up. ConfigError if it does not come up; `ended` if it later cannot."""
        self._keeping = asyncio.create_task(self._keep())
        self._keeping.add_done_callback(lambda _: ended.set())
        try:
            await self.up()
        except BaseException:
            await self.close()
            raise

    async def up(self) -> int:
        """Waits until a server is up, and says which; ConfigError if there will be none."""
        assert self._keeping is not None, "not started"
        waiting = asyncio.create_task(self._up.wait())
        try:
            await asyncio.wait({waiting, self._keeping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        self.check()
        return self.incarnation

    def check(self) -> None:
        """ConfigError if servers do not come up any more."""
        if self._keeping is not None and self._keeping.done() and not self._keeping.cancelled():
            self._keeping.result()

    def kill(self, incarnation: int) -> None:
        """That server has gone or must: another one follows. Fine if one has."""
        if incarnation == self.incarnation and self._up.is_set():
            self._up.clear()
            self._kill()

    @contextlib.asynccontextmanager
    async def post(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response to a POST. BadRequest or LuthierError has its complaint; ServerGone."""
        try:
            async with self._session.post(path, data=orjson.dumps(body)) as response:
                if response.status != HTTPStatus.OK:
                    raise await self._complaint(response)
                yield response
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGone(repr(error)) from error

    async def get(self, path: str) -> Any:
        async with self._session.get(path) as response:
            return orjson.loads(await response.read())

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
        await self._session.close()

    # --- the child --------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """One server after the other; ConfigError once they do not come up any more."""
        pauses_s = iter(START_PAUSES_S)
        while True:
            process = await asyncio.create_subprocess_exec(
                *self._argv,
                env=self._environ,
                stdin=asyncio.subprocess.PIPE,  # its end tells it that we have ended
                start_new_session=True,  # so that its processes can be killed with it
            )
            self._pid = process.pid
            log.info("the vLLM server has been started, pid %d", process.pid)
            try:
                if await self._comes_up(process):
                    pauses_s = iter(START_PAUSES_S)
                    self.incarnation += 1
                    self._up.set()
                    await self._until_it_ends(process)
            finally:
                self._up.clear()
                self._kill()
                code = await process.wait()
                self._socket_path.unlink(missing_ok=True)
            log.error("the vLLM server has ended with %d", code)
            pause_s = next(pauses_s, None)
            if pause_s is None:
                raise ConfigError(f"the vLLM server does not start: its last exit code is {code}")
            await asyncio.sleep(pause_s)

    async def _comes_up(self, process: asyncio.subprocess.Process) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_S):
                while process.returncode is None:
                    if await self.is_healthy():
                        return True
                    await asyncio.sleep(START_CHECK_S)
        return False

    async def _until_it_ends(self, process: asyncio.subprocess.Process) -> None:
        ending = asyncio.create_task(process.wait())
        num_missed = 0
        try:
            while num_missed < MAX_MISSED_CHECKS:
                done, _ = await asyncio.wait({ending}, timeout=CHECK_S)
                if done:
                    return
                num_missed = 0 if await self.is_healthy() else num_missed + 1
            log.error("the vLLM server does not answer: killing it")
        finally:
            ending.cancel()

    async def is_healthy(self) -> bool:
        """Whether it answers, and its engine lives."""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S), self._session.get("/health") as response:
                return response.status == HTTPStatus.OK
        except (aiohttp.ClientError, OSError):  # a TimeoutError is one
            return False

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)

    async def _complaint(self, response: aiohttp.ClientResponse) -> Exception:
        """What a response other than 200 means: vLLM says {"error": {"message": ...}}."""
        text = (await response.read())[:2000].decode(errors="replace")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = str(orjson.loads(text)["error"]["message"])
        if HTTPStatus.BAD_REQUEST <= response.status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return BadRequest(f"vLLM: {text}")
        if await self.is_healthy():
            return LuthierError(f"vLLM: {text}")
        return ServerGone(text)


async def start_arguments(
    model: ModelConfig, settings: SamplerConfig, socket_path: Path, *, has_gpu: bool
) -> list[str]:
    """The command of the server; ConfigError if the interpreter has no vLLM."""
    python = settings.vllm_python or sys.executable
    await _check_interpreter(python)
    dtype = {"auto": "bfloat16" if has_gpu else "float32"}.get(model.dtype, model.dtype)
    # On a CPU the base model is an adapter too (VllmEngine).
    max_adapters = settings.max_adapters + (not has_gpu)
    max_loras = min(settings.vllm_max_loras, settings.max_adapters) + (not has_gpu)
    return [
        *(python, str(Path(__file__).with_name("vllm_launch.py")), str(socket_path.parent)),
        *("--uds", str(socket_path)),
        *("--model", model.path, "--served-model-name", model.name, "--dtype", dtype),
        # Its sampling defaults would stand for what a request leaves out.
        *("--generation-config", "vllm"),
        *("--enable-lora", "--max-lora-rank", str(MAX_LORA_RANK)),
        *("--max-loras", str(max_loras), "--max-cpu-loras", str(max_adapters)),
        # With lm_head among them, vLLM 0.32 dies of a request for prompt logprobs.
        *(() if settings.vllm_lm_head else ("--lora-target-modules", *TARGETS)),
        *("--max-num-seqs", str(settings.max_running)),
        *("--max-num-batched-tokens", str(settings.max_step_tokens)),
        *("--kv-cache-memory-bytes", str(settings.kv_cache_bytes)),
        *("--max-model-len", "-1"),  # the model's context, or what the KV cache holds
        *("--max-logprobs", str(MAX_TOPK_LOGPROBS), "--logprobs-mode", "raw_logprobs"),
        *("--enable-prompt-tokens-details", "--disable-uvicorn-access-log"),
        # Compiling costs a CPU minutes at each start.
        *(() if has_gpu else ("--enforce-eager",)),
        *shlex.split(settings.vllm_arguments),
    ]


def start_environ(environ: Mapping[str, str], folder: Path, *, num_threads: int) -> dict[str, str]:
    """What the server's processes see: no credentials, none of our packages, no network."""
    dropped = ("AWS_", "PYTHONPATH", "PYTHONHOME")
    kept = {name: value for name, value in environ.items() if not name.startswith(dropped)}
    return kept | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_RPC_BASE_PATH": str(folder),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(num_threads),
    }


async def _check_interpreter(python: str) -> None:
    finds = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        process = await asyncio.create_subprocess_exec(python, "-c", finds)
    except OSError as error:
        raise ConfigError(f"sampler.vllm_python: {python}: {error.strerror}") from error
    if await process.wait():
        raise ConfigError(
            f"sampler.vllm_python: {python} has no vLLM; name an interpreter that has"
        )
