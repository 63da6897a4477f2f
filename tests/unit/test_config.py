"""The one configuration file: what is refused, with which words, and that a dump reads back."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier_core.config import (
    Config,
    GatewayConfig,
    ModelConfig,
    dump_config,
    load_config,
    parse_config,
)
from luthier_core.errors import ConfigError

REQUIRED = {
    "redis_url": "unix:///run/valkey.sock",
    "store_url": "file:///data",
    "registry_url": "unix:///run/registry.sock",
    "secret_file": "/data/secret",
}
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI"}


def test_four_places_are_enough_and_the_rest_has_defaults():
    config = parse_config(REQUIRED, {})
    assert config == Config(**REQUIRED)
    assert config.gateway == GatewayConfig()
    assert config.models == ()


@pytest.mark.parametrize("name", REQUIRED)
def test_a_place_that_is_missing_is_named(name: str):
    table = {key: value for key, value in REQUIRED.items() if key != name}
    with pytest.raises(ConfigError, match=f"^{name}: required$"):
        parse_config(table, {})


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"redis": "x"}, ["redis: unknown key", "redis_url"]),
        ({"gateway": {"prot": 1}}, ["gateway.prot: unknown key", "'port'"]),
        ({"gateway": {"port": "8080"}}, ["gateway.port: expected int", "'8080'"]),
        ({"gateway": {"port": True}}, ["gateway.port: expected int", "True"]),
        ({"gateway": {"port": 70_000}}, ["gateway.port: 70000", "0..65535"]),
        ({"gateway": {"poll_hold_s": "1"}}, ["gateway.poll_hold_s: expected float", "'1'"]),
        ({"gateway": {"poll_hold_s": 60}}, ["gateway.poll_hold_s", "at most 40"]),
        ({"gateway": {"key_cache_s": 61}}, ["gateway.key_cache_s", "60 s at most"]),
        ({"gateway": {"tenant_requests_at_once": 0}}, ["tenant_requests_at_once", "1 or more"]),
        ({"gateway": 8080}, ["gateway: expected a table"]),
        ({"redis_url": 1}, ["redis_url: expected str", "1"]),
        ({"models": "tiny"}, ["models: expected a list"]),
        ({"models": [{"name": "tiny"}]}, ["models[0].path: required"]),
        ({"models": [{"name": "a", "path": "/a", "gpu": 1}]}, ["models[0].gpu: unknown key"]),
        ({"models": [{"name": "a", "path": "/a", "dtype": "int8"}]}, ["models.dtype: 'int8'"]),
        ({"models": [{"name": "a", "path": "/a", "device": "tpu"}]}, ["models.device: 'tpu'"]),
        ({"models": [{"name": "a", "path": "/a"}] * 2}, ["models", "there twice", "'a'"]),
        ({"trainer": {"execution": "x"}}, ["trainer.execution", "deterministic or fused"]),
        ({"trainer": {"nonfinite": "x"}}, ["trainer.nonfinite", "fail or apply"]),
        ({"sampler": {"sample_logprobs": "x"}}, ["sampler.sample_logprobs", "raw or tempered"]),
        ({"sampler": {"engine": "tgi"}}, ["sampler.engine", "'tgi'", "torch or vllm"]),
        (
            {"sampler": {"engine": "vllm", "sample_logprobs": "tempered"}},
            ["sampler.sample_logprobs", "must be raw"],
        ),
        ({"sampler": {"vllm_max_loras": 0}}, ["sampler.vllm_max_loras", "1 or more"]),
        ({"sampler": {"vllm_arguments": "'"}}, ["sampler.vllm_arguments", "No closing quotation"]),
        ({"sampler": {"max_step_tokens": 1}}, ["sampler.max_step_tokens", "max_running"]),
        ({"trainer": {"max_runs": 1.5}}, ["trainer.max_runs: expected int", "1.5"]),
        ({"s3_secret_key": "x"}, ["s3_secret_key", "AWS_SECRET_ACCESS_KEY"]),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(table: dict[str, Any], said: list[str]):
    with pytest.raises(ConfigError) as refused:
        parse_config({**REQUIRED, **table}, {})
    for words in said:
        assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_whole_number_does_for_seconds():
    config = parse_config({**REQUIRED, "gateway": {"poll_hold_s": 20}}, {})
    assert config.gateway.poll_hold_s == 20.0
    assert isinstance(config.gateway.poll_hold_s, float)


def test_a_file_that_is_absent_or_no_toml_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_config(tmp_path / "absent.toml", {})
    (tmp_path / "wrong.toml").write_text("redis_url = ")
    with pytest.raises(ConfigError, match=r"wrong\.toml"):
        load_config(tmp_path / "wrong.toml", {})


def test_an_unknown_model_is_answered_with_those_there_are():
    table = {**REQUIRED, "models": [{"name": "tiny", "path": "/tiny"}]}
    config = parse_config(table, {})
    assert config.model("tiny").path == "/tiny"
    with pytest.raises(ConfigError, match=r"'huge'.*\['tiny'\]"):
        config.model("huge")


# --- round trip -----------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any value of the right type in every field that has no rule of its own."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    values = {
        str: text,
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False, max_value=40),
    }
    ruled = {"port", "dtype", "device", "sample_logprobs", "execution", "nonfinite"}
    ruled |= {"max_running", "max_step_tokens"}
    ruled |= {"s3_access_key", "s3_secret_key", "tenant_requests_at_once", "key_cache_s", "runner"}
    ruled |= {"engine", "vllm_max_loras", "vllm_arguments"}
    ruled |= {"keep_last", "link_access_key", "link_secret_key"}
    ruled |= {"sample_ratio"}

    def part(kind: type[Any]) -> Any:
        chosen = {}
        for item in dataclasses.fields(kind):
            if item.type in values and item.name not in ruled:
                chosen[item.name] = draw(values[item.type])
            elif dataclasses.is_dataclass(item.type):
                chosen[item.name] = part(item.type)
        return kind(**chosen)

    models = draw(st.lists(st.just(ModelConfig), max_size=2))
    config: Config = part(Config)
    unique = {model.name: model for model in map(part, models)}
    return dataclasses.replace(config, models=tuple(unique.values()))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(configs())
def test_a_dump_reads_back_as_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory, config: Config
):
    path = tmp_path_factory.getbasetemp() / "config.toml"
    path.write_text(dump_config(config))
    assert load_config(path, {}) == config


# --- secrets --------------------------------------------------------------------------------------


def test_credentials_come_from_the_environment_and_are_never_shown():
    config = parse_config(REQUIRED, CREDENTIALS)
    assert config.s3_access_key == CREDENTIALS["AWS_ACCESS_KEY_ID"]
    assert config.s3_secret_key == CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
    for shown in (repr(config), str(config), dump_config(config)):
        assert not any(secret in shown for secret in CREDENTIALS.values())


def test_the_server_secret_is_read_from_its_file_and_never_shown(tmp_path: Path):
    secret = "0123456789abcdef" * 4
    file = tmp_path / "secret"
    file.write_text(f"{secret}\n")
    config = parse_config({**REQUIRED, "secret_file": str(file)}, {})
    assert config.secret() == bytes.fromhex(secret)
    assert secret not in repr(config) + dump_config(config)


@pytest.mark.parametrize("content", ["", "\n", "ab" * 31, "zz" * 32, "0" * 63])
def test_a_secret_that_is_no_32_bytes_is_refused_without_being_quoted(tmp_path: Path, content: str):
    file = tmp_path / "secret"
    file.write_text(content)
    config = parse_config({**REQUIRED, "secret_file": str(file)}, {})
    with pytest.raises(ConfigError, match="secret_file") as refused:
        config.secret()
    assert content.strip() == "" or content not in str(refused.value)


def test_an_absent_secret_file_is_named(tmp_path: Path):
    config = parse_config({**REQUIRED, "secret_file": str(tmp_path / "gone")}, {})
    with pytest.raises(ConfigError, match="gone"):
        config.secret()


def test_the_login_of_redis_comes_from_the_environment_and_is_escaped():
    table = {**REQUIRED, "redis_url": "redis://redis:6379/0"}
    login = {"REDIS_USERNAME": "luthier", "REDIS_PASSWORD": "p@ss/word:1"}
    config = parse_config(table, login)
    assert config.redis_url == "redis://luthier:p%40ss%2Fword%3A1@redis:6379/0"
    assert config.side_redis_url() == "redis://luthier:p%40ss%2Fword%3A1@redis:6379/1"
    assert "p%40ss" not in repr(config)


def test_a_socket_needs_no_login():
    assert parse_config(REQUIRED, {"REDIS_PASSWORD": "x"}) == parse_config(REQUIRED, {})
