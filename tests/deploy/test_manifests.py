"""The manifests say what the code understands: flags, ports, paths, variables, secrets, models."""

import argparse
import importlib.util
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.deploy.manifests import (
    OURS,
    OVERLAYS,
    ROOT,
    WORKLOADS,
    Container,
    config_text,
    containers,
    name_of,
    named,
    of_kind,
    render,
)

from luthier.up import bootstrap
from luthier_core.config import Config, parse_config
from luthier_core.ops_server import Ops, build_app, parse_address
from luthier_core.service import service_parser, worker_parser
from luthier_registry.tasks import __main__ as tasks

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)

PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "luthier_gateway": lambda: service_parser("gateway"),
    "luthier_registry": lambda: service_parser("registry"),
    "luthier_registry.tasks": tasks.parser,
    "luthier_trainer": lambda: worker_parser("trainer"),
    "luthier_sampler": lambda: worker_parser("sampler"),
    "luthier.up.bootstrap": bootstrap.parser,
}
PROGRAMS = {*PARSERS, "luthier.up.download", "luthier_model.demo"}
SECRETS = {
    "server-secret": "00" * 32,
    "operator-key": "k" * 40,
    "redis-admin-password": "r",
    "redis-housekeeping-password": "h",
    "redis-password": "p",
    "s3-access-key": "a",
    "s3-secret-key": "s",
}
S3_LOGIN = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
REDIS_LOGIN = ("REDIS_USERNAME", "REDIS_PASSWORD")
READ_BY_LIBRARIES = {"HF_HUB_OFFLINE"}


def module_of(argv: list[str]) -> str:
    assert argv[:2] == ["python", "-m"], argv
    return argv[2]


def ours(overlay: str) -> list[Container]:
    return [container for container in containers(overlay) if container.is_ours]


def parsed(container: Container) -> argparse.Namespace:
    argv = container.argv(SECRETS)
    return PARSERS[module_of(argv)]().parse_args(argv[3:])


def config_of(overlay: str) -> Config:
    environ = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s", "REDIS_PASSWORD": "p"}
    return parse_config(tomllib.loads(config_text(overlay)), environ)


def variables_read() -> set[str]:
    """Names that our code takes from the environment."""
    sources = (path.read_text() for path in (ROOT / "core").rglob("*.py"))
    pattern = re.compile(r"""environ(?:\.get\(|\[)["']([A-Z_0-9]+)|: "(AWS_[A-Z_]+)\"""")
    return {a or b for text in sources for a, b in pattern.findall(text)}


def port_of(container: Container, name: str) -> int:
    (port,) = (p["containerPort"] for p in container.spec["ports"] if p["name"] == name)
    return int(port)


@every_overlay
def test_the_configuration_is_one_that_the_parts_take(overlay: str):
    config = config_of(overlay)
    assert config.models
    assert config.gateway.host == "0.0.0.0"


@every_overlay
def test_every_command_is_one_that_the_code_has(overlay: str):
    found = ours(overlay)
    assert {name_of(c.workload).split("-")[0] for c in found} == {
        *("gateway", "registry", "housekeeping", "trainer", "sampler")
    }
    for container in found:
        module = module_of(container.argv(SECRETS))
        assert module in PROGRAMS
        assert importlib.util.find_spec(module) is not None
        if module in PARSERS:
            assert parsed(container).config == Path("/etc/luthier/luthier.toml")


@every_overlay
def test_names_are_those_of_pods_so_that_no_two_parts_share_one(overlay: str):
    for container in ours(overlay):
        if not container.is_init:
            assert parsed(container).name == container.pod_name


@every_overlay
def test_workers_serve_a_model_of_the_configuration_that_is_where_it_says(overlay: str):
    config, served = config_of(overlay), set()
    for container in ours(overlay):
        role = name_of(container.workload).split("-")[0]
        if role not in ("trainer", "sampler"):
            continue
        if container.is_init:
            argv = container.argv(SECRETS)
            (folder,) = (word for word in argv if word.startswith("/models/"))
            assert folder in {model.path for model in config.models}
        else:
            model = config.model(parsed(container).model)
            served.add((role, model.name))
    assert served == {(r, m.name) for r in ("trainer", "sampler") for m in config.models}


@every_overlay
def test_a_fetched_model_is_pinned_by_a_commit(overlay: str):
    for container in ours(overlay):
        argv = container.argv(SECRETS)
        if module_of(argv) == "luthier.up.download":
            repo, folder, revision = argv[3:]
            assert re.fullmatch(r"[0-9a-f]{40}", revision)
            assert folder == f"/models/{revision}"
            assert "/" in repo
            # Clients have no folder of ours.
            (model,) = (model for model in config_of(overlay).models if model.path == folder)
            assert model.tokenizer == repo


@every_overlay
def test_every_variable_is_read_by_somebody(overlay: str):
    read = variables_read()
    assert {*S3_LOGIN, *REDIS_LOGIN} <= read
    for container in ours(overlay):
        words = " ".join([*container.spec["command"], *container.spec.get("args", [])])
        put_in = set(re.findall(r"\$\((\w+)\)", words))
        given = set(container.environ)
        assert put_in <= given
        if container.is_init:
            assert given - put_in - read - READ_BY_LIBRARIES <= {"POD_NAME"}
        else:
            assert given - put_in - read == set()


@every_overlay
def test_every_part_has_the_logins_that_its_configuration_needs(overlay: str):
    needed = {*S3_LOGIN, *REDIS_LOGIN}
    for container in ours(overlay):
        if module_of(container.argv(SECRETS)) in PARSERS:
            assert needed <= set(container.environ)


@every_overlay
def test_every_port_is_where_the_part_listens(overlay: str):
    config = config_of(overlay)
    for container in ours(overlay):
        if container.is_init:
            continue
        host, port = parse_address(parsed(container).ops)
        assert (host, port) == ("0.0.0.0", port_of(container, "ops"))
    assert config.gateway.port == port_of(_main_container(overlay, "gateway"), "http")
    _, port = config.registry_listen.rsplit(":", 1)
    assert int(port) == port_of(_main_container(overlay, "registry"), "http")


@every_overlay
def test_every_probe_asks_for_what_the_part_answers(overlay: str):
    answered = {route.resource.canonical for route in build_app(Ops("x")).router.routes()}
    for container in ours(overlay):
        if container.is_init:
            continue
        probes = [container.spec[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
        for probe in probes:
            assert probe["httpGet"]["path"] in answered
            assert probe["httpGet"]["port"] == "ops"
        assert probes[2]["httpGet"]["path"] == "/livez"  # a lost Redis must not kill the part


@every_overlay
def test_every_service_leads_to_a_port_of_a_pod(overlay: str):
    for service in of_kind(overlay, "Service"):
        pods = _selected(overlay, service["spec"]["selector"])
        assert pods, name_of(service)
        for port in service["spec"]["ports"]:
            for pod in pods:
                named_ports = {
                    p["name"]: p["containerPort"]
                    for c in pod["spec"]["template"]["spec"]["containers"]
                    for p in c.get("ports", [])
                }
                assert port["targetPort"] in named_ports


@every_overlay
def test_the_addresses_in_the_configuration_are_services(overlay: str):
    config = config_of(overlay)
    redis, registry = config.redis_url.split("@")[1], config.registry_url.split("//")[1]
    for address in (redis.split("/")[0], registry):
        host, port = address.split(":")
        assert int(port) in {p["port"] for p in named(overlay, "Service", host)["spec"]["ports"]}
    ingress = named(overlay, "Ingress", "gateway")
    backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    ports = named(overlay, "Service", backend["name"])["spec"]["ports"]
    assert backend["port"]["name"] in {port["name"] for port in ports}


@every_overlay
def test_budgets_scalers_and_rules_are_about_something(overlay: str):
    workloads = {(item["kind"], name_of(item)) for item in of_kind(overlay, *WORKLOADS)}
    for scaler in of_kind(overlay, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in workloads
    for item in of_kind(overlay, "PodDisruptionBudget"):
        assert _selected(overlay, item["spec"]["selector"]["matchLabels"])
    for policy in of_kind(overlay, "NetworkPolicy"):
        wanted = policy["spec"]["podSelector"].get("matchLabels", {})
        assert _selected(overlay, wanted), name_of(policy)
    classes = {name_of(item) for item in of_kind(overlay, "PriorityClass")}
    for item in of_kind(overlay, *WORKLOADS):
        assert item["spec"]["template"]["spec"]["priorityClassName"] in classes


@every_overlay
def test_a_network_rule_opens_a_port_that_is_there(overlay: str):
    for policy in of_kind(overlay, "NetworkPolicy"):
        pods = _selected(overlay, policy["spec"]["podSelector"].get("matchLabels", {}))
        for rule in policy["spec"].get("ingress", []):
            open_ports = {port["port"] for port in rule["ports"]}
            for pod in pods:
                listening = {
                    p["containerPort"]
                    for c in pod["spec"]["template"]["spec"]["containers"]
                    for p in c["ports"]
                }
                assert open_ports <= listening, name_of(policy)


@every_overlay
def test_only_the_gateway_is_open_to_users(overlay: str):
    assert [name_of(item) for item in of_kind(overlay, "Ingress")] == ["gateway"]
    assert named(overlay, "NetworkPolicy", "default-deny")["spec"] == {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
    }
    for item in of_kind(overlay, "Service"):
        assert item["spec"].get("type", "ClusterIP") == "ClusterIP"


@pytest.fixture(scope="module")
def made_secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run([ROOT / "deploy" / "secrets.sh", folder], check=True)
    return folder


@every_overlay
def test_every_secret_is_one_that_is_made(overlay: str, made_secrets: Path):
    made = {path.name for path in made_secrets.iterdir()}
    assert made == set(SECRETS)
    used = set()
    for workload in of_kind(overlay, *WORKLOADS):
        pod = workload["spec"]["template"]["spec"]
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            for item in container.get("env", []):
                if reference := item.get("valueFrom", {}).get("secretKeyRef"):
                    assert reference["name"] == "luthier"
                    used.add(reference["key"])
        for volume in pod["volumes"]:
            if secret := volume.get("secret"):
                assert secret["secretName"] == "luthier"
                used |= {item["key"] for item in secret["items"]}
    assert used == made
    assert not of_kind(overlay, "Secret"), "secrets are referred to, never written here"


def test_the_secrets_that_are_made_work(made_secrets: Path):
    secret = (made_secrets / "server-secret").read_text().strip()
    assert len(bytes.fromhex(secret)) == 32
    assert bootstrap.read_key(made_secrets / "operator-key")
    assert made_secrets.stat().st_mode & 0o777 == 0o700
    # Compose mounts the file itself, for a user who is nobody on this machine.
    assert all(path.stat().st_mode & 0o004 for path in made_secrets.iterdir())


@every_overlay
def test_what_a_part_reads_is_mounted_where_it_looks(overlay: str):
    config = config_of(overlay)
    for container in ours(overlay):
        if module_of(container.argv(SECRETS)) not in PARSERS:
            continue
        mounts = {m["mountPath"]: m for m in container.spec["volumeMounts"]}
        assert "/etc/luthier/luthier.toml" in mounts
        folder = str(Path(config.secret_file).parent)
        (volume,) = (v for v in container.pod["volumes"] if v["name"] == mounts[folder]["name"])
        assert Path(config.secret_file).name in {i["path"] for i in volume["secret"]["items"]}


@every_overlay
def test_images_are_targets_of_the_dockerfile_with_the_same_command(overlay: str):
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    entrypoints = _entrypoints(dockerfile)
    for container in ours(overlay):
        role = container.spec["image"].removeprefix(OURS).split(":")[0]
        assert role in entrypoints
        if not container.is_init:
            assert container.spec["command"] == entrypoints[role]


def test_overlays_differ_in_what_they_serve():
    assert {model.name for o in OVERLAYS for model in config_of(o).models} == {
        *("luthier/demo", "Qwen/Qwen3-8B")
    }
    gpus = [c for c in ours("gpu") if "nvidia.com/gpu" in c.spec["resources"]["limits"]]
    assert {name_of(c.workload) for c in gpus} == {"trainer-qwen3-8b", "sampler-qwen3-8b"}
    assert not [i for i in render("gpu") if name_of(i) == "minio"]


# --- compose --------------------------------------------------------------------------------------


def test_compose_runs_what_the_code_has():
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    table = tomllib.loads((ROOT / "deploy" / "compose.toml").read_text())
    config = parse_config(table, {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s"})
    entrypoints = _entrypoints((ROOT / "deploy" / "Dockerfile").read_text())
    services: dict[str, Any] = compose["services"]
    for name, service in services.items():
        if not service["image"].startswith(OURS):
            continue
        role = service["image"].removeprefix(OURS).split(":")[0]
        argv = [*service.get("entrypoint", entrypoints[role]), *service.get("command", [])]
        module = module_of(argv)
        if module in PARSERS:
            arguments = PARSERS[module]().parse_args(argv[3:])
            assert f"./compose.toml:{arguments.config}:ro" in service["volumes"], name
            reads = [config.secret_file, getattr(arguments, "operator_key_file", None)]
            mounted = {secret["target"] for secret in service["secrets"]}
            assert mounted == {str(path) for path in reads if path}, name
            if hasattr(arguments, "model"):
                assert config.model(arguments.model).path == "/models/demo"
            if hasattr(arguments, "ops"):
                assert parse_address(arguments.ops) == ("0.0.0.0", 9090)
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
    for url in (config.redis_url, config.store_url, config.registry_url):
        assert re.search(r"//(\w+):", url)[1] in services  # type: ignore[index]


# --- helpers --------------------------------------------------------------------------------------


def _entrypoints(dockerfile: str) -> dict[str, list[str]]:
    """Target -> its ENTRYPOINT."""
    found: dict[str, list[str]] = {}
    target = ""
    for line in dockerfile.splitlines():
        if match := re.match(r"FROM .* AS (\S+)", line):
            target = match[1]
        if line.startswith("ENTRYPOINT "):
            found[target] = yaml.safe_load(line.removeprefix("ENTRYPOINT "))
    return found


def _main_container(overlay: str, workload: str) -> Container:
    (found,) = (c for c in ours(overlay) if name_of(c.workload) == workload and not c.is_init)
    return found


def _selected(overlay: str, wanted: dict[str, str]) -> list[dict[str, Any]]:
    return [
        item
        for item in of_kind(overlay, *WORKLOADS)
        if wanted.items() <= item["spec"]["template"]["metadata"]["labels"].items()
    ]
