"""What `kubectl kustomize` makes of an overlay, and its containers one by one."""

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy" / "k8s"
OVERLAYS = ("cpu-demo", "gpu")
WORKLOADS = ("Deployment", "StatefulSet")
OURS = "luthier/"
"""Prefix of the images that deploy/Dockerfile makes."""

Manifest = dict[str, Any]


@functools.cache
def render(overlay: str) -> tuple[Manifest, ...]:
    """Every object of an overlay, in the order of their creation."""
    kubectl = shutil.which("kubectl")
    assert kubectl, "kubectl is not on PATH"
    made = subprocess.run(
        [kubectl, "kustomize", str(K8S / "overlays" / overlay)],
        check=True,
        capture_output=True,
        text=True,
    )
    return tuple(yaml.safe_load_all(made.stdout))


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    return [item for item in render(overlay) if item["kind"] in kinds]


def name_of(item: Manifest) -> str:
    return str(item["metadata"]["name"])


def named(overlay: str, kind: str, name: str) -> Manifest:
    """The one object of this kind and name; AssertionError if there is none."""
    found = [item for item in of_kind(overlay, kind) if name_of(item) == name]
    assert found, f"{overlay}: no {kind} {name}"
    return found[0]


@dataclass(frozen=True, slots=True)
class Container:
    """One container of a workload."""

    overlay: str
    workload: Manifest
    spec: Manifest
    is_init: bool

    @property
    def pod(self) -> Manifest:
        return dict(self.workload["spec"]["template"]["spec"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.workload["spec"]["template"]["metadata"]["labels"])

    @property
    def pod_name(self) -> str:
        """Of its first pod; a Deployment's have random letters in the place of the number."""
        return f"{name_of(self.workload)}-0"

    @property
    def is_ours(self) -> bool:
        return str(self.spec["image"]).startswith(OURS)

    @property
    def environ(self) -> dict[str, Manifest]:
        """Name -> where its value comes from."""
        return {item["name"]: item for item in self.spec.get("env", [])}

    def value(self, item: Manifest, secrets: dict[str, str], pod_name: str = "") -> str:
        """Of one environment variable."""
        if "value" in item:
            return str(item["value"])
        source = item["valueFrom"]
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == "metadata.name"
            return pod_name or self.pod_name
        if "secretKeyRef" in source:
            return secrets[source["secretKeyRef"]["key"]]
        reference = source["configMapKeyRef"]
        data = named(self.overlay, "ConfigMap", reference["name"])["data"]
        return str(data[reference["key"]])

    def variables(self, secrets: dict[str, str], pod_name: str = "") -> dict[str, str]:
        return {name: self.value(item, secrets, pod_name) for name, item in self.environ.items()}

    def argv(self, secrets: dict[str, str], pod_name: str = "") -> list[str]:
        """Command and arguments, as the kubelet puts variables into them."""
        values = self.variables(secrets, pod_name)
        words = [*self.spec["command"], *self.spec.get("args", [])]
        return [re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], word) for word in words]


def containers(overlay: str) -> Iterator[Container]:
    """Init containers first, as they run."""
    for workload in of_kind(overlay, *WORKLOADS):
        pod = workload["spec"]["template"]["spec"]
        for spec in pod.get("initContainers", []):
            yield Container(overlay, workload, spec, is_init=True)
        for spec in pod["containers"]:
            yield Container(overlay, workload, spec, is_init=False)


def config_text(overlay: str) -> str:
    """luthier.toml as the parts of an overlay read it."""
    (found,) = (
        item for item in of_kind(overlay, "ConfigMap") if "luthier.toml" in item.get("data", {})
    )
    return str(found["data"]["luthier.toml"])
