"""What every part tells whoever runs it, on its ops port."""

from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.contract.gateway_client import BASE_MODEL, Api, datum, float32
from tests.contract.gateway_stack import ROLES, GatewayStack

from luthier_core import metrics

EVERY_PROCESS = ("python_", "process_")


class Scrape:
    """The samples of one part's /metrics."""

    def __init__(self, text: str) -> None:
        self.families = {family.name for family in text_string_to_metric_families(text)}
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """Of one sample; 0 if there is none, as a counter's that was never counted up."""
        return self.samples.get((name, frozenset(labels.items())), 0.0)


@pytest.fixture
def scrape(gateway_stack: GatewayStack, http: aiohttp.ClientSession) -> Any:
    async def scrape(role: str) -> Scrape:
        async with http.get(f"{gateway_stack.ops[role]}/metrics") as answer:
            assert answer.status == 200
            return Scrape(await answer.text())

    return scrape


@pytest.mark.parametrize("path", ["livez", "readyz"])
@pytest.mark.parametrize("role", ROLES)
async def test_a_part_that_serves_is_alive_and_ready(
    gateway_stack: GatewayStack, http: aiohttp.ClientSession, role: str, path: str
):
    async with http.get(f"{gateway_stack.ops[role]}/{path}") as answer:
        assert (answer.status, await answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("role", ROLES)
async def test_a_part_exposes_its_own_metrics_and_those_of_a_process(scrape: Any, role: str):
    families = (await scrape(role)).families
    foreign = {f for f in families if not f.startswith((f"luthier_{role}_", *EVERY_PROCESS))}
    assert foreign == set()
    assert f"luthier_{role}_" in " ".join(families)


async def test_users_cannot_read_metrics(gateway_stack: GatewayStack, http: aiohttp.ClientSession):
    async with http.get(f"{gateway_stack.url}/metrics") as answer:
        assert answer.status == 401


async def test_a_request_is_counted_under_its_route(scrape: Any, api: Api):
    route = {"method": "GET", "route": "/api/v1/training_runs/{run_id}", "status": "404"}
    before = (await scrape("gateway")).value("luthier_gateway_requests_total", **route)
    await api.get("training_runs/not-a-run")
    after = await scrape("gateway")
    assert after.value("luthier_gateway_requests_total", **route) == before + 1
    assert after.value("luthier_gateway_request_seconds_count", route=route["route"]) > 0


async def test_asking_for_another_tenants_run_is_counted(scrape: Any, api: Api, stranger: Api):
    run = await api.run()
    assert (await stranger.post("get_info", {"model_id": run.run_id})).status == 404
    found = (await scrape("gateway")).samples
    assert sum(v for (name, _), v in found.items() if name == "luthier_gateway_foreign_ids_total")


async def test_what_is_trained_is_counted(scrape: Any, api: Api):
    kind = {"kind": "forward_backward", "base_model": BASE_MODEL}
    before = (await scrape("trainer")).value("luthier_trainer_tokens_total", **kind)
    run = await api.run()
    await api.training_output(await run.forward_backward(datum([1, 2, 3]), datum([4, 5])))
    await api.result(await run.step())
    after = await scrape("trainer")
    assert after.value("luthier_trainer_tokens_total", **kind) == before + 5
    for effect in ("execute", "commit"):
        labels = {"effect": effect, "base_model": BASE_MODEL}
        assert after.value("luthier_trainer_effect_seconds_count", **labels) >= 3
    assert after.value("luthier_trainer_owned_runs", base_model=BASE_MODEL) >= 1


async def test_the_gap_between_samplers_and_trainer_is_measured(scrape: Any, api: Api):
    name = "luthier_trainer_logprob_gap_nats"
    before = await scrape("trainer")
    run = await api.run()
    policy = {
        "weights": None,
        "logprobs": float32([-4.0, -4.5, -5.0]),
        "advantages": float32([1.0, 1.0, 1.0]),
    }
    sent = datum([3, 4, 5], **policy)
    await api.training_output(await run.forward_backward(sent, loss_fn="importance_sampling"))
    after, labels = await scrape("trainer"), {"base_model": BASE_MODEL}
    assert after.value(f"{name}_count", **labels) == before.value(f"{name}_count", **labels) + 1
    assert after.value(f"{name}_sum", **labels) > before.value(f"{name}_sum", **labels)


async def test_what_is_sampled_is_counted(scrape: Any, api: Api):
    labels = {"base_model": BASE_MODEL}
    before = (await scrape("sampler")).value("luthier_sampler_sampled_tokens_total", **labels)
    sampler = await api.sampler()
    accepted = (
        await sampler.post(num_samples=2, sampling_params={"max_tokens": 4, "stop": []})
    ).json()
    await api.samples(accepted["request_id"])
    after = await scrape("sampler")
    assert after.value("luthier_sampler_sampled_tokens_total", **labels) == before + 8
    assert after.value("luthier_sampler_requests_total", outcome="completed", **labels) >= 1


async def test_queues_are_told_by_model_and_tenant(scrape: Any, api: Api):
    found = await scrape("registry")
    for role in ("trainer", "sampler"):
        labels = {"base_model": BASE_MODEL, "role": role, "state": "ready"}
        assert found.value("luthier_registry_live_workers", **labels) == 1
    assert found.value("luthier_registry_redis_memory_bytes") > 0
    assert ("luthier_registry_live_runs", frozenset({("base_model", BASE_MODEL)})) in found.samples


def test_every_metric_has_a_unit_or_counts_something():
    units = ("_total", "_seconds", "_bytes", "_nats", "_tokens", "_ops_max")
    counts = {  # gauges of things
        *("open_polls", "generation_mismatch", "owned_runs", "sequences", "max_running"),
        *("kv_blocks", "adapters", "queue_depth", "live_runs", "live_workers", "job_result"),
    }
    defined = [m for m in vars(metrics).values() if hasattr(m, "_name")]
    assert len(defined) > 35
    for metric in defined:
        name = metric._name + ("_total" if metric._type == "counter" else "")
        assert name.endswith(units) or name.split("_", 2)[2] in counts, name
