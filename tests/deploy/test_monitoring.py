"""Alerts, their tests, runbooks and dashboards name each other, and metrics that there are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier_core import metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = sorted((ROOT / "deploy" / "dashboards").glob("*.json"))
KEDA = ROOT / "deploy" / "k8s" / "components" / "keda" / "sampler.yaml"
DERIVED = re.compile(r"_(bucket|sum|count)$")


def alerts() -> list[dict[str, Any]]:
    text = (PROMETHEUS / "alerts.yaml").read_text()
    (group,) = yaml.safe_load(text)["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def exposed() -> dict[str, set[str]]:
    """Name of a sample -> its labels."""
    found = {}
    for metric in vars(metrics).values():
        if hasattr(metric, "_name"):
            name = metric._name + "_total" * (metric._type == "counter")
            found[name] = {*metric._labelnames, "le", "base_model", "instance"}
    return found


def expressions() -> dict[str, str]:
    """Where it is used -> PromQL."""
    found = {rule["alert"]: rule["expr"] for rule in alerts()}
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = target["expr"]
    keda = yaml.safe_load(KEDA.read_text())
    found["keda"] = keda["spec"]["triggers"][0]["metadata"]["query"]
    return found


@pytest.mark.parametrize("where", expressions())
def test_a_query_is_about_metrics_and_labels_that_there_are(where: str):
    known, query = exposed(), expressions()[where]
    names = re.findall(r"\b(luthier_\w+)", query)
    assert names or "up{" in query or "process_" in query
    labels: set[str] = set()
    for name in names:
        assert name in known or DERIVED.sub("", name) in known, name
        labels |= known.get(name, known.get(DERIVED.sub("", name), set()))
    if names:
        used = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', query))
        for group in re.findall(r"by \(([^)]*)\)", query):
            used |= {label.strip() for label in group.split(",")}
        assert used <= labels, used - labels


def test_every_alert_has_a_runbook_and_every_runbook_an_alert():
    text = (ROOT / "docs" / "runbooks.md").read_text()
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == [rule["alert"] for rule in alerts()]
    for rule in alerts():
        assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not():
    cases = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text())["tests"]
    fires, quiet = set(), set()
    for case in cases:
        for check in case["alert_rule_test"]:
            (fires if check["exp_alerts"] else quiet).add(check["alertname"])
    names = {rule["alert"] for rule in alerts()}
    assert fires == quiet == names


def test_every_metric_is_on_a_dashboard_or_in_an_alert():
    text = " ".join(expressions().values())
    assert {name for name in exposed() if name not in text} == set()


def test_dashboards_are_told_apart():
    loaded = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert len({board["uid"] for board in loaded}) == len(loaded) == 3
    for board in loaded:
        ids = [panel["id"] for panel in board["panels"]]
        assert len(ids) == len(set(ids))


def test_prometheus_looks_for_the_label_that_pods_have():
    config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    keep = job["relabel_configs"][0]
    assert keep["source_labels"][0].endswith("label_luthier_dev_metrics")
    assert config["rule_files"] == ["alerts.yaml"]
    assert 'up{job="luthier"}' in (PROMETHEUS / "alerts.yaml").read_text()
    assert job["job_name"] == "luthier"
