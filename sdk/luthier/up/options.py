"""The options of `luthier up`, checked: a malformed one is a ConfigError of one line."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from luthier_core.errors import ConfigError
from luthier_core.records import USER_SCOPES

TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
SECTIONS = ("gateway", "limits", "trainer", "sampler", "housekeeping", "tracing")
TOP_SETTINGS = ("public_url", "prices", "storage_usd_per_gigabyte_month")
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A base model to serve: the name clients use, and a folder or Hugging Face id."""

    name: str
    where: str


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that clients send, and the tenant it stands for."""

    key: str = field(repr=False)
    tenant: str = "default"
    scopes: tuple[str, ...] = USER_SCOPES


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of the configuration file that differs from its default."""

    section: str
    """Empty: of the whole."""
    key: str
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """What `luthier up` was asked for."""

    data: Path
    host: str = "127.0.0.1"
    port: int = 8080
    """0: any free port."""
    models: tuple[ModelSource, ...] = ()
    """Empty: the demo model."""
    api_keys: tuple[ApiKey, ...] = ()
    """Empty: one key, made at the first start."""
    redis_url: str = ""
    """Empty: a Valkey of our own."""
    allow_volatile_redis: bool = False
    """Take a Redis that may forget what it accepted."""
    s3_url: str = ""
    """Empty: objects on this disk, under the data folder."""
    num_trainers: int = 1
    """Trainers per model."""
    num_samplers: int = 1
    """Samplers per model."""
    settings: tuple[Setting, ...] = ()
    """What else the configuration file is to say; its keys are checked with the whole."""
    command: str = ""
    """A shell command to run once everything is ready; its exit code ends the stack."""


def default_data_dir(environ: Mapping[str, str]) -> Path:
    """$XDG_DATA_HOME/luthier, or ~/.local/share/luthier. A relative $XDG_DATA_HOME is ignored."""
    base = environ.get("XDG_DATA_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / ".local" / "share"
    return root / "luthier"


def parse_models(texts: Sequence[str]) -> tuple[ModelSource, ...]:
    """NAME=PATH_OR_HF_ID, several; a name may be there once."""
    models = tuple(_parse_model(text) for text in texts)
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--model: the name {name!r} is there twice")
    return models


def _parse_model(text: str) -> ModelSource:
    name, equals, where = text.partition("=")
    if not equals or not where:
        raise ConfigError(f"--model {text!r}: expected NAME=PATH_OR_HF_ID")
    if not MODEL_NAME.fullmatch(name):
        raise ConfigError(f"--model {text!r}: a NAME has letters, digits, '.', '_', '-' and '/'")
    return ModelSource(name, where)


def parse_api_keys(texts: Sequence[str]) -> tuple[ApiKey, ...]:
    """KEY[=TENANT], several. A message never repeats the key: it may end in a log."""
    return tuple(_parse_api_key(text) for text in texts)


def _parse_api_key(text: str) -> ApiKey:
    # From the right: a key may end in base64's padding, a tenant has no "=".
    key, equals, tenant = text.rpartition("=")
    if not equals:
        key, tenant = text, "default"
    if not re.fullmatch(r"tml-[!-~]{1,250}", key):
        raise ConfigError("--api-key: a KEY starts with 'tml-' and has no spaces")
    if not TENANT.fullmatch(tenant):
        raise ConfigError(f"--api-key: TENANT {tenant!r} does not match {TENANT.pattern}")
    return ApiKey(key, tenant)


def parse_settings(texts: Sequence[str]) -> tuple[Setting, ...]:
    """[SECTION.]KEY=VALUE, several; VALUE is as in TOML, a string also without its quotes."""
    return tuple(_parse_setting(text) for text in texts)


def _parse_setting(text: str) -> Setting:
    name, _, value = text.partition("=")
    section, _, key = name.rpartition(".")
    if not value or not (section in SECTIONS or name in TOP_SETTINGS):
        raise ConfigError(
            f"--set {text!r}: expected SECTION.KEY=VALUE, such as limits.max_rank=64, with a "
            f"SECTION of {', '.join(SECTIONS)}; or KEY=VALUE with {', '.join(TOP_SETTINGS)}"
        )
    if name in ("gateway.host", "gateway.port"):
        raise ConfigError(f"--set {name}: is the option --{key}")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    return Setting(section, key, parsed)


def check_redis_url(url: str) -> str:
    """`url` if it is redis://, rediss:// or unix://. A message never repeats the password."""
    parts = _split(url, "--redis")
    if parts.scheme == "unix" and parts.path.startswith("/"):
        return url
    if parts.scheme in ("redis", "rediss") and parts.hostname:
        return url
    raise ConfigError(
        "--redis: expected redis://HOST[:PORT][/DATABASE], rediss://... or unix:///SOCKET"
    )


def check_s3_url(url: str) -> str:
    """`url` if it names a server and a bucket and carries no credentials."""
    parts = _split(url, "--s3")
    if parts.username is not None:
        raise ConfigError(
            "--s3: credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY only"
        )
    named = parts.hostname and BUCKET.fullmatch(parts.path.strip("/"))
    if parts.scheme not in ("s3+http", "s3+https") or not named:
        raise ConfigError("--s3: expected s3+http://HOST[:PORT]/BUCKET or s3+https://HOST/BUCKET")
    return url


def _split(url: str, option: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where the port is no number
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    return parts
