"""A gateway with everything behind it, as processes: registry, trainer, sampler, Valkey, disk."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.contract.gateway_client import BASE_MODEL
from tests.tiny_qwen3 import TWO_LAYERS, save_tiny_qwen3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier_core import keys
from luthier_core.auth import key_hmac
from luthier_core.blobs import open_blobs
from luthier_core.config import (
    Config,
    GatewayConfig,
    LimitsConfig,
    ModelConfig,
    SamplerConfig,
    TracingConfig,
    dump_config,
)
from luthier_core.records import ApiKeyRecord
from luthier_core.testing import running_valkey

KEYS = {"ann": "tml-key-of-ann", "bob": "tml-key-of-bob"}
"""Tenant -> its API key."""

LETTERS = [chr(code) for code in range(33, 127)]
"""Token id -> what it decodes to; one token more is the end of a sequence."""
EOS = len(LETTERS)
VOCAB_SIZE = EOS + 1
TOKENIZER = "tiny/letters"
MAX_CONTEXT_TOKENS = 64
CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}!{{ tool.function.name }}{% endfor %}"
    "{% for message in messages %}{{ message.role[0] + message.content }}/{% endfor %}a"
)
"""Short: a conversation is to fit the context."""

LIMITS = LimitsConfig(
    max_rank=16,
    max_datums=8,
    max_num_samples=32,
    max_seq_ahead=64,
    max_pending_ops=48,
    custom_losses=True,
)
MAX_BODY_BYTES = 256 * 1024
POLL_HOLD_S = 1.0
CLAIM_IDLE_S = 2.0
"""Short: a test waits for it when a sampler has died."""

ROLES = ("registry", "gateway", "trainer", "sampler")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0

_ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class GatewayStack:
    """What is running."""

    config: Config
    url: str
    folder: Path
    ops: Mapping[str, str]
    """Role -> URL of its ops port."""


def save_tiny_model(folder: Path) -> None:
    """A random Qwen3 with a tokenizer of one printable character a token."""
    save_tiny_qwen3(
        folder,
        seed=11,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_CONTEXT_TOKENS,
        eos_token_id=EOS,
        **TWO_LAYERS,
    )
    vocab = {letter: index for index, letter in enumerate(LETTERS)} | {"<eos>": EOS}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)


@contextlib.contextmanager
def running_gateway_stack(
    folder: Path,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    otlp_endpoint: str = "",
    store_url: str = "",
) -> Iterator[GatewayStack]:
    """All parts, ready; `folder` must have a short path, for the sockets in it.

    On a store in S3 the environment must have its keys; else the store is in `folder`.
    """
    with running_valkey() as redis_url:
        config = configure(folder, redis_url, max_body_bytes, otlp_endpoint, store_url=store_url)
        with running_services(folder, config) as stack:
            yield stack


@contextlib.contextmanager
def another_sampler(stack: GatewayStack, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """One more sampler of the stack's model, which may not be ready yet."""
    process = _start(stack.folder, "sampler", name, "--model", BASE_MODEL)
    try:
        yield process
    finally:
        _stop([process])


@contextlib.contextmanager
def running_services(folder: Path, config: Config) -> Iterator[GatewayStack]:
    """Every part on a Redis that is there, ready; `folder` holds the configuration."""
    ops = {role: f"127.0.0.1:{free_port()}" for role in ROLES}
    stack = GatewayStack(
        config,
        f"http://127.0.0.1:{config.gateway.port}",
        folder,
        {role: f"http://{address}" for role, address in ops.items()},
    )
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for role in ROLES:
            model = () if role in ("registry", "gateway") else ("--model", BASE_MODEL)
            processes[role] = _start(folder, role, role, "--ops", ops[role], *model)
        _wait_until_healthy(stack, folder, processes)
        yield stack
    finally:
        _stop(processes.values())


def configure(
    folder: Path,
    redis_url: str,
    max_body_bytes: int = MAX_BODY_BYTES,
    otlp_endpoint: str = "",
    *,
    store_keys: bool = True,
    store_url: str = "",
) -> Config:
    """Writes the configuration, the secret, the model and the records of the API keys."""
    save_tiny_model(folder / "model")
    secret = os.urandom(32)
    (folder / "secret").write_text(secret.hex())
    config = Config(
        redis_url=redis_url,
        store_url=store_url or f"file://{folder}/objects",
        s3_access_key=os.environ.get("AWS_ACCESS_KEY_ID", ""),
        s3_secret_key=os.environ.get("AWS_SECRET_ACCESS_KEY", ""),
        registry_url=f"unix://{folder}/registry.sock",
        secret_file=str(folder / "secret"),
        models=(
            ModelConfig(
                name=BASE_MODEL, path=str(folder / "model"), tokenizer=TOKENIZER, dtype="float32"
            ),
        ),
        gateway=GatewayConfig(
            port=free_port(), max_body_bytes=max_body_bytes, poll_hold_s=POLL_HOLD_S
        ),
        limits=LIMITS,
        sampler=SamplerConfig(claim_idle_s=CLAIM_IDLE_S),
        tracing=TracingConfig(otlp_endpoint=otlp_endpoint),
    )
    (folder / "config.toml").write_text(dump_config(config))
    if store_keys:
        asyncio.run(_store_keys(config))
    return config


async def _store_keys(config: Config) -> None:
    async with open_blobs(config) as blobs:
        for tenant, key in KEYS.items():
            record = ApiKeyRecord(tenant=tenant, created_at=datetime.now(UTC))
            name = keys.api_key_record(key_hmac(config.secret(), key))
            await blobs.put(name, record.to_bytes())


def _start(folder: Path, role: str, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    """One service; the end of its standard input stops it, however this process ends."""
    argv = [sys.executable, "-m", f"luthier_{role}", "--config", str(folder / "config.toml")]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [*argv, "--name", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, **_ENVIRON},
        )


def _stop(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """All drain at once; who does not within STOP_TIMEOUT_S is killed."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(
    stack: GatewayStack, folder: Path, processes: Mapping[str, subprocess.Popen[bytes]]
) -> None:
    """Returns once every part is ready.

    RuntimeError with its last words as soon as one has ended, TimeoutError with those of all.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        for role, process in processes.items():
            if process.poll() is not None:
                said = _last_words(folder, role)
                raise RuntimeError(f"{role} ended with {process.returncode}:\n{said}")
        try:
            with urllib.request.urlopen(f"{stack.url}/api/v1/healthz", timeout=5):
                return
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            pass
        time.sleep(0.05)
    logs = {role: _last_words(folder, role) for role in processes}
    raise TimeoutError(f"the stack did not get ready: {logs}")


def _last_words(folder: Path, role: str) -> str:
    return (folder / f"{role}.log").read_text(errors="replace")[-2000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
