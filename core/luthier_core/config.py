"""Every setting of every service: frozen dataclasses, built from one TOML file and a given environ.

A field has a default, a unit in its name and a docstring; a field without a default is required.
Unknown keys, wrong types and values out of range are refused with one line that names the key.
"""

import dataclasses
import json
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from luthier_core.errors import ConfigError

MIN_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One base model that this deployment serves."""

    name: str
    """What clients ask for, such as Qwen/Qwen3-8B."""
    path: str
    """A Hugging Face model folder on this machine."""
    tokenizer: str = ""
    """What clients load it from (`get_tokenizer`), such as Qwen/Qwen3-8B. Empty: `path`, which does
    for clients that have the same folder."""
    num_trainers: int = 1
    num_samplers: int = 1
    dtype: str = "auto"
    """float32 | bfloat16 | auto (bfloat16 on CUDA, float32 elsewhere)."""
    device: str = "auto"
    """cpu | cuda | auto (cuda where there is one)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """The HTTP front."""

    host: str = "127.0.0.1"
    port: int = 8080
    max_body_bytes: int = 64 * 1024 * 1024
    """Largest request body, decompressed. The SDK aims at 5 MB, but never splits a datum."""
    poll_hold_s: float = 25.0
    """How long retrieve_future is held open. The SDK's read timeout is 45 s."""
    recheck_s: float = 2.0
    """Every waiting future is looked at again this often, so a lost hint costs no more."""
    key_cache_s: float = 60.0
    """How long a looked-up API key is believed; a revoked key works no longer than this."""
    peek_bytes: int = 1024 * 1024
    """A result larger than this is announced by its size first, to clients that allow it."""
    max_open_polls: int = 20_000
    """Open retrieve_future requests of one gateway; beyond it 429."""
    idle_connection_s: float = 75.0
    """A connection on which no whole request head comes is closed after this."""
    tenant_requests_at_once: int = 16
    """Requests of one tenant that a gateway works on; polls are not counted. Half of its Redis
    connections: a flood from one tenant leaves the others room."""
    tenant_requests_waiting: int = 1024
    """Requests of one tenant that wait for their turn at a gateway; beyond it 429."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """What one request, run and tenant may ask for."""

    max_rank: int = 256
    max_datums: int = 1024
    max_tokens_per_request: int = 1_000_000
    max_pending_ops: int = 512
    """Admitted but unfinished ops of one run; beyond it 429 while something is executable."""
    max_pending_bytes: int = 64 * 1024 * 1024
    max_parked_bytes: int = 2 * 1024 * 1024 * 1024
    """Payload bytes that may wait above a gap of one run (reliability 2.3)."""
    max_seq_ahead: int = 4096
    max_num_samples: int = 1024
    custom_losses: bool = False
    """Whether losses that clients upload are run by the trainers, among everybody's requests;
    if not, the SDK runs them in the client."""
    max_queued_samples: int = 10_000
    """Sampling jobs of one base model that wait or run; beyond it 429."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """A trainer worker."""

    lease_s: float = 15.0
    lease_renew_s: float = 5.0
    num_threads: int = 1
    """Threads of the matrix products. Fixed, so that a run's bits do not depend on the machine."""
    logprob_chunk_tokens: int = 1024
    """Tokens whose logits exist at once; [T, vocab] is never materialised whole."""
    execution: str = "deterministic"
    """deterministic: each op alone, so that a run's bits do not depend on its neighbours | fused:
    small ops of several runs in one pass, faster, with the tolerance of docs/training-engine.md."""
    nonfinite: str = "fail"
    """A step whose gradient is not finite: fail it and keep the weights | apply it, as torch would,
    which makes the weights NaN: for comparisons with other services."""
    max_runs: int = 64
    """Runs that one worker owns at once; idle ones make room, and wait in the object store."""
    device_runs: int = 64
    """Runs of them whose weights and moments are on the device; the others are in host memory."""
    op_timeout_s: float = 120.0
    """An engine that is busy with one op for this long, and ten times what the op was expected to
    take, hangs: it is killed, and the op fails at the third time."""
    snapshot_execute_s: float = 60.0
    """A run's state is stored when a replay would take so much computing, ..."""
    snapshot_interval_s: float = 300.0
    """or this long after an op, ..."""
    snapshot_payload_bytes: int = 256 * 1024 * 1024
    """or after requests of so many bytes, ..."""
    snapshot_max_ops: int = 512
    """or so many requests; at the end of an optimizer step."""
    gap_timeout_s: float = 1800.0
    """How long ops wait for an earlier one of their run that has not arrived, before they fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerConfig:
    """A sampler worker."""

    engine: str = "torch"
    """torch | vllm: ours, or a vLLM server that the worker starts and watches."""
    vllm_python: str = ""
    """The interpreter of the environment that has vLLM, which needs other versions of libraries
    than we do; empty: our own."""
    vllm_max_loras: int = 8
    """Adapters that share one step of vLLM. It sets memory for rank 64 aside for each."""
    vllm_lm_head: bool = True
    """Take adapters on lm_head; vLLM has no logprobs of prompts then, so asking is refused."""
    vllm_arguments: str = ""
    """More arguments for vLLM's server, as in a shell: how it is spread over GPUs is its matter."""
    lease_s: float = 15.0
    lease_renew_s: float = 5.0
    num_threads: int = 1
    kv_block_tokens: int = 16
    """Tokens per KV-cache block. Smaller shares more prefixes and costs longer block tables."""
    num_kv_blocks: int = 0
    """0: chosen from kv_cache_bytes."""
    kv_cache_bytes: int = 128 * 1024 * 1024
    max_running: int = 64
    """Sequences that share one decode step."""
    max_step_tokens: int = 2048
    """Tokens of one step, prefill and decode together."""
    max_adapters: int = 64
    """Adapters kept on the device, least recently used out first."""
    host_adapter_bytes: int = 1024 * 1024 * 1024
    """Host memory for adapters that made room on the device: they come back without a download."""
    sample_logprobs: str = "raw"
    """raw | tempered: which distribution the logprobs of sampled tokens are of."""
    claim_idle_s: float = 30.0
    """A job that no live sampler touched for this long is claimed by another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceConfig:
    """What the use of one base model costs, in USD per million tokens."""

    model: str
    train: float
    prefill: float
    """Prompt tokens that were computed."""
    cached: float
    """Prompt tokens that came from the cache."""
    sample: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HousekeepingConfig:
    """What is done again and again: counting, expiry, sweeping."""

    runner: str = "registry"
    """registry: on a timer of its own; celery: by workers and a beat that are started beside it."""
    broker_url: str = field(default="", repr=False)
    """Redis of Celery and of rate counters; empty: the next database of redis_url."""
    usage_s: float = 30.0
    """Usage is counted, and metrics are kept, this often; limits on tokens hold to within it."""
    expiry_s: float = 300.0
    storage_s: float = 300.0
    keep_last: int = 0
    """Checkpoints of each kind that a run keeps, unless its owner sets another number; 0: all."""
    keep_last_s: float = 300.0
    sweep_s: float = 6 * 3600.0
    """How often objects that nothing needs are looked for."""
    trash_s: float = 24 * 3600.0
    """How long such an object is kept after it was first found; at least as long as any op takes
    to write files and then their manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingConfig:
    """Traces for OpenTelemetry; needs the extra `tracing`."""

    otlp_endpoint: str = ""
    """http://host:4318 of a collector that takes OTLP over HTTP; empty: no traces."""
    sample_ratio: float = 1.0
    """Of the requests that bring no trace of their own; those that do are as they say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole deployment. Every service reads the same file and uses its part."""

    redis_url: str = field(repr=False)
    """redis://host:port/0, rediss://... (TLS) or unix:///path/to/socket. Its user and password come
    from the environment (REDIS_USERNAME, REDIS_PASSWORD)."""
    store_url: str
    """file:///absolute/folder, or s3+http://host:port/bucket, s3+https://host/bucket?region=..."""
    registry_url: str
    """http://host:port or unix:///path/to/socket: where gateways find the registry."""
    secret_file: str
    """File with the server secret: 32 random bytes in hex, readable by its owner only."""
    registry_listen: str = ""
    """HOST:PORT at which the registry listens; empty: at registry_url. For where something stands
    between, such as a Service of Kubernetes, whose address the registry cannot take."""
    allow_volatile_redis: bool = False
    """Start on a Redis that may forget what it accepted: without AOF, or one that evicts."""
    public_url: str = ""
    """Base of signed download links; empty: the address that the client has asked.

    Needed behind a proxy that ends TLS or adds a path: the gateway does not see either.
    """
    models: tuple[ModelConfig, ...] = ()
    prices: tuple[PriceConfig, ...] = ()
    """By base model; usage of one that is not here has no cost."""
    storage_usd_per_gigabyte_month: float = 0.0
    """0: storage has no cost."""
    housekeeping: HousekeepingConfig = field(default_factory=HousekeepingConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    s3_access_key: str = field(default="", repr=False)
    """From the environment (AWS_ACCESS_KEY_ID) only, never from the file."""
    s3_secret_key: str = field(default="", repr=False)
    link_access_key: str = field(default="", repr=False)
    """Of an S3 identity that may only read archives and checkpoints' files: it signs the links.
    From the environment (LUTHIER_LINK_ACCESS_KEY); empty: the store's own key signs."""
    link_secret_key: str = field(default="", repr=False)
    """LUTHIER_LINK_SECRET_KEY. On a folder it alone signs the links. Another one ends all links."""

    def model(self, name: str) -> ModelConfig:
        """The base model of that name; ConfigError with the names there are."""
        for model in self.models:
            if model.name == name:
                return model
        raise ConfigError(f"no model {name!r} in the configuration; there are {self.model_names}")

    @property
    def model_names(self) -> list[str]:
        return [model.name for model in self.models]

    def side_redis_url(self) -> str:
        """Where the counters of rates are, and Celery's queues: what may be lost."""
        if self.housekeeping.broker_url:
            return self.housekeeping.broker_url
        url = urlsplit(self.redis_url)
        if url.scheme == "unix":
            query = dict(parse_qsl(url.query))
            query["db"] = str(int(query.get("db", "0")) + 1)
            return f"unix://{url.path}?{urlencode(query)}"
        database = url.path.strip("/") or "0"
        return urlunsplit(url._replace(path=f"/{int(database) + 1}"))

    def secret(self) -> bytes:
        """The server secret: API keys and service tokens are HMACs under it."""
        try:
            secret = bytes.fromhex(Path(self.secret_file).read_text().strip())
        except (OSError, ValueError) as error:
            raise ConfigError(f"secret_file {self.secret_file}: {error}") from error
        if len(secret) < MIN_SECRET_BYTES:  # an empty file is valid hex, and anybody's secret
            raise ConfigError(
                f"secret_file {self.secret_file}: {len(secret)} bytes; needed are "
                f"{MIN_SECRET_BYTES}, in hex"
            )
        return secret


_ENVIRON_ONLY = {"s3_access_key": "AWS_ACCESS_KEY_ID", "s3_secret_key": "AWS_SECRET_ACCESS_KEY"}
_ENVIRON_ONLY |= {
    "link_access_key": "LUTHIER_LINK_ACCESS_KEY",
    "link_secret_key": "LUTHIER_LINK_SECRET_KEY",
}


def load_config(path: Path, environ: Mapping[str, str]) -> Config:
    """The configuration in the TOML file at `path`, with credentials from `environ`."""
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse_config(table, environ)


def parse_config(table: Mapping[str, Any], environ: Mapping[str, str]) -> Config:
    """The configuration in a parsed TOML table; ConfigError names the key that is wrong."""
    for name in _ENVIRON_ONLY:
        if name in table:
            raise ConfigError(f"{name}: set {_ENVIRON_ONLY[name]} in the environment instead")
    secrets = {name: environ.get(variable, "") for name, variable in _ENVIRON_ONLY.items()}
    config: Config = _build(Config, {**table, **secrets}, "")
    config = _with_redis_password(config, environ)
    _check(config)
    return config


def _with_redis_password(config: Config, environ: Mapping[str, str]) -> Config:
    """The configuration with the user and password of Redis in its URLs, where they are given."""
    password = environ.get("REDIS_PASSWORD", "")
    if not password:
        return config
    login = f"{quote(environ.get('REDIS_USERNAME', ''), safe='')}:{quote(password, safe='')}@"

    def signed(url: str) -> str:
        parts = urlsplit(url)
        if not parts.hostname or "@" in parts.netloc:
            return url  # a socket's folder says who may, and a URL with a login has its own
        return urlunsplit(parts._replace(netloc=login + parts.netloc))

    return dataclasses.replace(
        config,
        redis_url=signed(config.redis_url),
        housekeeping=dataclasses.replace(
            config.housekeeping, broker_url=signed(config.housekeeping.broker_url)
        ),
    )


def dump_config(config: Config) -> str:
    """The configuration as TOML, without credentials: what `luthier up` writes for its parts."""
    lines: list[str] = []
    tables: list[str] = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name in _ENVIRON_ONLY:
            continue
        if item.name in ("models", "prices"):
            for part in value:
                tables += ["", f"[[{item.name}]]", *_toml_lines(part)]
        elif dataclasses.is_dataclass(value):
            tables += ["", f"[{item.name}]", *_toml_lines(value)]
        else:
            lines.append(f"{item.name} = {_toml_value(value)}")
    return "\n".join(lines + tables) + "\n"


def _toml_lines(part: Any) -> list[str]:
    names = [item.name for item in dataclasses.fields(part)]
    return [f"{name} = {_toml_value(getattr(part, name))}" for name in names]


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's; DEL is the one character that only TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value` as an instance of `kind`, checked field by field; `where` is the dotted key."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a table")
        hints = get_type_hints(kind)
        known = {item.name: item for item in dataclasses.fields(kind)}
        for key in value:
            if key not in known:
                raise ConfigError(f"{_dotted(where, key)}: unknown key; known are {sorted(known)}")
        for name, item in known.items():
            required = (
                item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            )
            if required and name not in value:
                raise ConfigError(f"{_dotted(where, name)}: required")
        built = {key: _build(hints[key], item, _dotted(where, key)) for key, item in value.items()}
        assert isinstance(kind, type)
        return kind(**built)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list")
        element = get_args(kind)[0]
        return tuple(_build(element, item, f"{where}[{i}]") for i, item in enumerate(value))
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _check(config: Config) -> None:
    names = config.model_names
    if len(set(names)) != len(names):
        raise ConfigError(f"models: a name is there twice: {names}")
    for model in config.models:
        if model.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"models.dtype: {model.dtype!r} is not auto, float32 or bfloat16")
        if model.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"models.device: {model.device!r} is not auto, cpu or cuda")
    if config.trainer.execution not in ("deterministic", "fused"):
        raise ConfigError("trainer.execution: must be deterministic or fused")
    if config.trainer.nonfinite not in ("fail", "apply"):
        raise ConfigError("trainer.nonfinite: must be fail or apply")
    if config.housekeeping.runner not in ("registry", "celery"):
        raise ConfigError("housekeeping.runner: must be registry or celery")
    if config.housekeeping.keep_last < 0:
        raise ConfigError("housekeeping.keep_last: must be 0 or more")
    if config.sampler.sample_logprobs not in ("raw", "tempered"):
        raise ConfigError("sampler.sample_logprobs: must be raw or tempered")
    _check_sampler_engine(config.sampler)
    if config.sampler.max_running > config.sampler.max_step_tokens:
        raise ConfigError("sampler.max_running: must not be above sampler.max_step_tokens")
    if not 0 <= config.tracing.sample_ratio <= 1:
        raise ConfigError(f"tracing.sample_ratio: {config.tracing.sample_ratio} is not 0..1")
    if not 0 <= config.gateway.port <= 65535:
        raise ConfigError(f"gateway.port: {config.gateway.port} is not 0..65535")
    if config.gateway.tenant_requests_at_once < 1:
        raise ConfigError("gateway.tenant_requests_at_once: must be 1 or more")
    if not 0 <= config.gateway.key_cache_s <= 60:
        raise ConfigError("gateway.key_cache_s: a revoked key may work for 60 s at most")
    if config.gateway.poll_hold_s > 40:
        raise ConfigError("gateway.poll_hold_s: the SDK gives up after 45 s, so at most 40")


def _check_sampler_engine(sampler: SamplerConfig) -> None:
    if sampler.engine not in ("torch", "vllm"):
        raise ConfigError(f"sampler.engine: {sampler.engine!r} is not torch or vllm")
    if sampler.engine == "vllm" and sampler.sample_logprobs != "raw":
        raise ConfigError("sampler.sample_logprobs: must be raw with sampler.engine vllm")
    if sampler.engine == "vllm" and sampler.num_kv_blocks:
        raise ConfigError("sampler.num_kv_blocks: with sampler.engine vllm set kv_cache_bytes")
    if sampler.vllm_max_loras < 1:
        raise ConfigError("sampler.vllm_max_loras: must be 1 or more")
    try:
        shlex.split(sampler.vllm_arguments)
    except ValueError as error:
        raise ConfigError(f"sampler.vllm_arguments: {error}") from error
