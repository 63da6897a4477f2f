"""Limits and usage over HTTP: what is counted, what is refused and how, on a real stack."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import aiohttp
import pytest
from tests.contract.gateway_client import BASE_MODEL, Api, Run, datum
from tests.contract.gateway_stack import GatewayStack

from luthier_core import keys
from luthier_core.auth import key_hmac, key_id
from luthier_core.blobs import open_blobs
from luthier_core.config import PriceConfig
from luthier_core.oplog import Oplog, connect
from luthier_core.records import ApiKeyRecord, Limits, OrgRecord
from luthier_gateway import quotas

DAY = timedelta(days=1)
Member = Callable[..., Awaitable[Api]]


@pytest.fixture
async def member(gateway_stack: GatewayStack, http: aiohttp.ClientSession) -> AsyncIterator[Member]:
    """Makes a tenant with one key; limits of the key, or of the whole tenant."""
    numbers = iter(range(1000))

    async with open_blobs(gateway_stack.config) as blobs:

        async def make(limits: dict[str, Any] | None = None, *, of_key: bool = False) -> Api:
            org, now = f"m{datetime.now(UTC):%H%M%S%f}-{next(numbers)}", datetime.now(UTC)
            given = Limits(**(limits or {}))
            record = OrgRecord(
                org_id=org, name=org, created_at=now, limits=Limits() if of_key else given
            )
            await blobs.put_if_absent(keys.org_record(org), record.to_bytes())
            key = f"tml-{org}"
            name = key_hmac(gateway_stack.config.secret(), key)
            scopes = ("read", "train", "sample", "admin", "operator")
            api_key = ApiKeyRecord(
                tenant=org, scopes=scopes, created_at=now, limits=given if of_key else Limits()
            )
            await blobs.put(keys.api_key_record(name), api_key.to_bytes())
            api = Api(http, gateway_stack.url, key)
            api.org, api.key_id = org, key_id(name)  # type: ignore[attr-defined]
            return api

        yield make


async def run_job(api: Api, name: str) -> None:
    answer = await api.post(f"admin/jobs/{name}")
    assert answer.status == 200, answer
    assert "error" not in answer.json()


async def refusal(run: Run) -> str:
    """The message with which training fails, once its tenant's use is known."""
    for _ in range(1000):  # what is known of it is a second old at most
        outcome = (await run.api.outcome(await run.forward_backward())).json_or_none()
        if outcome is not None:
            return str(outcome["error"])
    raise AssertionError("nothing is refused")


def today() -> str:
    now = datetime.now(UTC)
    start, end = (now - DAY).date().isoformat(), (now + DAY).date().isoformat()
    return f"starting_on={start}T00:00&ending_before={end}T00:00"


async def test_tokens_are_counted_by_run_session_key_and_project(member: Member):
    api = await member()
    session = await api.session(project_id="blue")
    run = await api.run(session)
    await api.training_output(await run.forward_backward())
    sampler = await api.sampler(session)
    response = await sampler.sample()
    await run_job(api, "usage")
    await run_job(api, "usage")
    generated = sum(len(sequence.tokens) // 4 for sequence in response.sequences)
    expected = {
        "run": {run.run_id: (3, 0), sampler.session_id: (0, generated)},
        "session": {session: (3, generated)},
        "key": {api.key_id: (3, generated)},  # type: ignore[attr-defined]
        "project": {"blue": (3, generated)},
    }
    org = api.org  # type: ignore[attr-defined]
    for group, rows in expected.items():
        answer = (await api.get(f"admin/orgs/{org}/usage?by={group}&{today()}")).json()
        found = {
            row[group]: (row["trained_tokens"], row["sampled_tokens"]) for row in answer["rows"]
        }
        assert found == rows
    events = (await api.get(f"billing/usage/events?{today()}")).json()
    kinds = {event["event_info"]["type"] for event in events["data"]}
    assert kinds == {"training", "sampling_prefill", "sampling_sample"}
    assert {event["estimated_cost_usd"] for event in events["data"]} == {None}
    text = await api.get(f"admin/orgs/{org}/usage?by=run&format=csv&{today()}")
    assert text.headers["Content-Type"].startswith("text/csv")
    assert run.run_id in text.body.decode()
    assert (await api.get(f"admin/orgs/{org}/usage?format=xml&{today()}")).status == 400


async def test_what_has_no_project_has_an_empty_cell_in_the_csv(member: Member):
    api = await member()
    await api.training_output(await (await api.run()).forward_backward())
    await run_job(api, "usage")
    org = api.org  # type: ignore[attr-defined]
    text = await api.get(f"admin/orgs/{org}/usage?by=project&format=csv&{today()}")
    assert text.body.decode().splitlines()[1].startswith(",3,")


async def test_the_metrics_of_every_op_are_listed(member: Member, api: Api):
    mine = await member()
    run = await mine.run()
    await mine.training_output(await run.forward_backward())
    await mine.result(await run.step())
    await mine.failure(await run.send("load_weights", path=f"tinker://{run.run_id}/weights/none"))
    await mine.result(await run.send("save_weights_for_sampler", path="a"))
    page = (await mine.get(f"training_runs/{run.run_id}/metrics")).json()
    assert [(entry["seq"], entry["state"]) for entry in page["entries"]] == [
        (0, "completed"),
        (1, "completed"),
        (2, "completed"),
        (3, "failed"),
        (4, "completed"),
    ]
    assert page["entries"][1]["metrics"]["loss:sum"] > 0
    assert "grad_norm" in " ".join(page["entries"][2]["metrics"])
    gap = page["entries"][4]["metrics"]
    assert 0 < gap["logprob_gap:max"] < 1e-5
    assert gap["logprob_gap:alarm"] == 0
    assert (await api.get(f"training_runs/{run.run_id}/metrics")).status == 404


async def test_a_trace_tells_when_each_op_and_sample_of_a_session_waited_and_ran(
    member: Member, stranger: Api, http: aiohttp.ClientSession
):
    api = await member()
    session = await api.session()
    run, sampler = await api.run(session), await api.sampler(session)
    await api.training_output(await run.forward_backward())
    await api.result(await run.step())
    await sampler.sample()
    for counted in (False, True):
        if counted:
            await run_job(api, "usage")
        answer = await api.get(f"sessions/{session}/trace_export")
        assert answer.status == 200, answer
        export = answer.json()
        assert export["status"] == "ready"
        async with http.get(export["url"]) as file:
            events = json.loads(await file.read())["traceEvents"]
        names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
        begun = [event for event in events if event["ph"] == "b" and "args" in event]
        assert [(names[e["pid"]], e["name"], e["args"]["seq"]) for e in begun] == [
            (run.run_id, "create_model", 0),
            (run.run_id, "forward_backward", 1),
            (run.run_id, "optim_step", 2),
            (sampler.session_id, "sample", "0"),
        ]
        assert begun[1]["args"]["num_tokens"] == 3
        assert {event["args"]["worker"] for event in begun} == {"trainer", "sampler"}
        for event in begun:
            of_it = [e["ts"] for e in events if e.get("id") == event["id"]]
            assert len(of_it) == 4
            assert of_it == sorted(of_it)
    assert (await stranger.get(f"sessions/{session}/trace_export")).status == 404


async def test_requests_above_the_rate_wait(member: Member):
    api = await member({"requests_per_s": 0.1}, of_key=True)  # one in ten seconds
    answers = [await api.get("get_server_capabilities") for _ in range(4)]
    # The window may end between two of them: it does so once at most.
    assert [answer.status for answer in answers].count(429) >= 2
    refused = next(answer for answer in answers if answer.status == 429)
    assert "requests per second" in refused.detail
    assert refused.headers["Retry-After"] == "10"


async def test_what_is_refused_for_its_rate_costs_redis_nothing(
    member: Member, gateway_stack: GatewayStack
):
    api = await member({"requests_per_s": 0.1})
    answers = [await api.get("get_server_capabilities") for _ in range(40)]
    refused = sum(answer.status == 429 for answer in answers)
    assert refused >= 36
    async with connect(gateway_stack.config.side_redis_url()) as counters:
        subject = api.org  # type: ignore[attr-defined]
        names = [name async for name in counters.scan_iter(f"rate:{subject}:*")]
        counted = sum(int(value) for value in await counters.mget(names))
    # One more in each window is how the gateway learns that it is spent.
    assert counted == len(answers) - refused + len(names)


@pytest.fixture
async def queuer(
    member: Member,
    second_gateway: Callable[..., Any],
    http: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """A run of a tenant that may queue 100 bytes, at a gateway that looks each time."""
    monkeypatch.setattr(quotas, "BELIEVED_S", -1.0)
    gateway, api = await second_gateway(), await member({"queued_bytes": 100})
    return await Api(http, gateway.url, f"tml-{api.org}").run()  # type: ignore[attr-defined]


async def test_more_bytes_in_the_queue_than_a_tenant_may_have_are_refused(
    queuer: Run, oplog_of_stack: Oplog
):
    await queuer.api.training_output(await queuer.forward_backward())
    header = keys.run_header(queuer.run_id)
    await cast(Any, oplog_of_stack.redis.hincrby(header, "bytes", 200))  # that nobody executes
    answer = await queuer.post_message(queuer.message(datum()))
    assert answer.status == 429
    assert "200 bytes are queued; the limit is 100" in answer.detail
    await cast(Any, oplog_of_stack.redis.hincrby(header, "bytes", -200))
    assert (await queuer.post_message(queuer.message(datum(), seq_id=2))).status == 200


async def test_bytes_that_wait_for_an_earlier_seq_do_not_keep_it_out(queuer: Run):
    later = [await queuer.forward_backward(seq_id=seq) for seq in (4, 3, 2)]
    await queuer.api.training_output(await queuer.forward_backward(seq_id=1))
    for request_id in later:
        await queuer.api.training_output(request_id)


async def test_a_run_too_many_is_refused_and_a_repeat_of_one_that_is_there_is_not(member: Member):
    api = await member({"concurrent_runs": 1})
    session = await api.session()
    await api.run(session)
    again = await api.run_unchecked(session)  # as after a lost answer
    assert again.run_id == f"{session}:train:0"
    wanted = {"session_id": session, "base_model": "tiny/base", "lora_config": {"rank": 4}}
    answer = await api.post("create_model", {**wanted, "model_seq_id": 1})
    assert answer.status == 429
    assert "the limit is 1" in answer.detail


@pytest.mark.parametrize("of_key", [False, True])
async def test_beyond_the_tokens_of_a_day_training_fails_with_the_reason_and_sampling_waits(
    member: Member, of_key: bool
):
    api = await member({"trained_tokens_per_day": 3, "sampled_tokens_per_day": 1}, of_key=of_key)
    session = await api.session()
    run, sampler = await api.run(session), await api.sampler(session)
    await api.training_output(await run.forward_backward())
    await sampler.sample()
    await run_job(api, "usage")
    assert "the limit is 3" in await refusal(run)
    refused = await sampler.post()
    assert refused.status == 429
    assert "the limit is 1" in refused.detail
    # The run goes on: nothing waits for the seq that was refused.
    await api.result(await run.send("save_weights", path="after"))


@pytest.mark.parametrize("of_key", [False, True])
async def test_beyond_the_money_of_a_month_training_and_sampling_are_refused(
    member: Member, second_gateway: Callable[..., Any], http: aiohttp.ClientSession, of_key: bool
):
    a_dollar = dict.fromkeys(("train", "prefill", "cached", "sample"), 1e6)  # each token
    prices = (PriceConfig(model=BASE_MODEL, **a_dollar),)
    first = await member({"usd_per_month": 2.5}, of_key=of_key)
    gateway = await second_gateway(prices=prices)
    api = Api(http, gateway.url, f"tml-{first.org}")  # type: ignore[attr-defined]
    session = await api.session()
    run, sampler = await api.run(session), await api.sampler(session)
    await api.training_output(await run.forward_backward())
    await run_job(api, "usage")
    assert "USD were spent this month (UTC); the limit is 2.5" in await refusal(run)
    refused = await sampler.post()
    assert (refused.status, "the limit is 2.5" in refused.detail) == (429, True)


async def test_beyond_the_stored_bytes_a_save_fails_with_the_reason(member: Member):
    api = await member({"stored_bytes": 1})
    run = await api.run()
    await api.result(await run.send("save_weights", path="first"))
    await run_job(api, "storage")
    assert "Delete checkpoints" in await api.failure(await run.send("save_weights", path="second"))


async def test_beyond_the_stored_bytes_nothing_is_copied(member: Member):
    api = await member({"stored_bytes": 1}, of_key=True)
    run = await api.run()
    saved = await api.result(await run.send("save_weights", path="first"))
    await run_job(api, "storage")
    copy = {"source_path": saved["path"], "destination_project_id": "p"}
    refused = await api.post("copy_weights", copy)
    assert (refused.status, "Delete checkpoints" in refused.detail) == (400, True)
