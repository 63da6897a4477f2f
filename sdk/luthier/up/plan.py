"""Which processes a stack has, and the one configuration file that they share. Pure."""

import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from luthier.up.folder import DataFolder
from luthier.up.options import Setting, UpOptions
from luthier_core.config import Config, GatewayConfig, ModelConfig, dump_config, parse_config
from luthier_core.errors import ConfigError

WORKER_ROLES = ("trainer", "sampler")

# One thread per matrix product: a run's bits must not depend on how busy the machine is. One malloc
# arena: threads of glibc otherwise keep 64 MB each. The Hub is not asked at run time.
PART_ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "2",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSpec:
    """How to start one part."""

    name: str
    role: str
    """valkey | registry | gateway | trainer | sampler"""
    argv: Sequence[str]
    log_file: Path
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    port: int | None = None
    """The TCP port it listens on; only the gateway has one."""
    watches_stdin: bool = True
    """False: it does not notice when its standard input closes, so the kernel must tell it."""
    keep_fds: tuple[int, ...] = ()
    """Descriptors that it inherits."""


def build_config(
    options: UpOptions,
    folder: DataFolder,
    *,
    models: Sequence[tuple[str, Path]],
    port: int,
    redis_url: str,
    registry_socket: Path,
    environ: Mapping[str, str],
) -> Config:
    """The configuration of every part; credentials come from `environ` and are not written."""
    config = Config(
        redis_url=redis_url,
        allow_volatile_redis=options.allow_volatile_redis,
        store_url=options.s3_url or f"file://{quote(str(folder.objects))}",
        registry_url=f"unix://{registry_socket}",
        secret_file=str(folder.secret_file),
        models=tuple(
            ModelConfig(
                name=name,
                path=str(path),
                num_trainers=options.num_trainers,
                num_samplers=options.num_samplers,
            )
            for name, path in models
        ),
        gateway=GatewayConfig(host=options.host, port=port),
        s3_access_key=environ.get("AWS_ACCESS_KEY_ID", ""),
        s3_secret_key=environ.get("AWS_SECRET_ACCESS_KEY", ""),
    )
    if options.s3_url and not (config.s3_access_key and config.s3_secret_key):
        raise ConfigError("--s3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return _with_settings(config, options.settings, environ) if options.settings else config


def _with_settings(
    config: Config, settings: Sequence[Setting], environ: Mapping[str, str]
) -> Config:
    """`config` with what the settings say; ConfigError names a key or value that is wrong."""
    table = tomllib.loads(dump_config(config))
    for setting in settings:
        (table[setting.section] if setting.section else table)[setting.key] = setting.value
    return parse_config(table, environ)


def service_specs(config: Config, folder: DataFolder, environ: Mapping[str, str]) -> list[PartSpec]:
    """Registry, gateway, and per model its trainers and samplers; names are unique in the stack."""

    def spec(role: str, name: str, *arguments: str, port: int | None = None) -> PartSpec:
        config_arguments = ("--config", str(folder.config_file), "--name", name)
        return PartSpec(
            name=name,
            role=role,
            argv=(sys.executable, "-m", f"luthier_{role}", *config_arguments, *arguments),
            log_file=folder.log_file(name),
            environ={**environ, **PART_ENVIRON},
            port=port,
        )

    return [
        spec("registry", "registry"),
        spec("gateway", "gateway", port=config.gateway.port),
        *(spec(role, name, "--model", model) for role, name, model in _workers(config)),
    ]


def _workers(config: Config) -> Iterator[tuple[str, str, str]]:
    """(role, name, model) of each worker."""
    for role in WORKER_ROLES:
        index = 0
        for model in config.models:
            for _ in range(model.num_trainers if role == "trainer" else model.num_samplers):
                yield role, f"{role}-{index}", model.name
                index += 1


def valkey_spec(
    server: str, config_file: Path, folder: DataFolder, environ: Mapping[str, str]
) -> PartSpec:
    """The embedded Valkey. It inherits the lock on DIR: nobody else may open its files."""
    return PartSpec(
        name="valkey",
        role="valkey",
        argv=(server, str(config_file)),
        log_file=folder.log_file("valkey"),
        environ=environ,
        watches_stdin=False,
        keep_fds=(folder.lock_fd,),
    )
