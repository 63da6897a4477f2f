"""The registry through its client: a real Valkey, a real disk store, a real Unix socket."""

import asyncio
import io
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.unit.registry_stack import Clock, Stack, serving
from tests.unit.test_registry_housekeeping import committed, job

from luthier_core import keys
from luthier_core.auth import key_hmac, service_token
from luthier_core.config import Config, dump_config
from luthier_core.errors import (
    BadRequest,
    BodyTooLarge,
    InvalidField,
    LuthierError,
    NotFound,
    Unauthorized,
    Unavailable,
    Unreadable,
    Unsupported,
)
from luthier_core.records import ApiKeyRecord, RecoveryRecord
from luthier_core.registry_client import RegistryClient

# --- who may ask ----------------------------------------------------------------------------------


async def test_only_the_service_token_opens_the_registry(stack: Stack, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("cd" * 32)
    async with RegistryClient(replace(stack.config, secret_file=str(other))) as stranger:
        await stranger.ready()
        with pytest.raises(Unauthorized):
            await stranger.create_session("ann")
        with pytest.raises(Unauthorized):
            await stranger.get_key("0" * 64)


async def test_an_api_key_is_found_by_its_hmac_alone(stack: Stack) -> None:
    name = key_hmac(stack.config.secret(), "tml-1234")
    record = ApiKeyRecord(tenant="ann", scopes=("train",), created_at=stack.clock())
    await stack.blobs.put(keys.api_key_record(name), record.to_bytes())
    assert (await stack.client.get_key(name)).key == record
    for wrong in ("0" * 64, "tml-1234", "..", "../keys", name.upper()):
        with pytest.raises(NotFound):
            await stack.client.get_key(wrong)


async def test_foreign_and_absent_are_the_same_not_found(stack: Stack) -> None:
    run = await stack.run()
    checkpoint = await stack.save(run)
    sampler = await stack.client.create_sampler(
        "ann", session_id=run.session_id, sampling_session_seq_id=0, base_model="tiny"
    )
    client = stack.client

    def calls(tenant: str, session: str, run_id: str, sampler_id: str, path: str) -> list[Any]:
        return [
            lambda: client.get_session(tenant, session),
            lambda: client.describe_session(tenant, session),
            lambda: client.heartbeat(tenant, session),
            lambda: client.finish_session(tenant, session, reason="success"),
            lambda: client.create_run(
                tenant, session_id=session, model_seq_id=9, base_model="tiny"
            ),
            lambda: client.describe_run(tenant, run_id),
            lambda: client.list_run_checkpoints(tenant, run_id),
            lambda: client.delete_checkpoint(tenant, run_id, "weights", "x"),
            lambda: client.create_sampler(
                tenant, session_id=session, sampling_session_seq_id=9, base_model="tiny"
            ),
            lambda: client.get_sampler(tenant, sampler_id),
            lambda: client.resolve(tenant, path),
            lambda: client.weights_info(tenant, path),
        ]

    async def answers(*ids: str) -> list[str]:
        return [await _refusal(call) for call in calls(*ids)]

    mine = (run.session_id, run.run_id, sampler.sampling_session_id, checkpoint.tinker_path)
    absent = tuple(item.replace(run.session_id, "f" * 32) for item in mine)
    foreign = await answers("bob", *mine)
    assert [text.replace(run.session_id, "f" * 32) for text in foreign] == await answers(
        "ann", *absent
    )
    assert (await client.list_checkpoints("bob", limit=9, offset=0))["checkpoints"] == []
    assert (await client.list_runs("bob", limit=9, offset=0))["training_runs"] == []
    assert (await client.list_sessions("bob", limit=9, offset=0))["sessions"] == []
    # Nothing of the above has changed what is ann's.
    assert (await client.get_session("ann", run.session_id)).status == "active"
    assert await client.resolve("ann", checkpoint.tinker_path) == checkpoint


async def _refusal(call: Callable[[], Awaitable[Any]]) -> str:
    with pytest.raises(NotFound) as caught:
        await call()
    return str(caught.value)


@pytest.mark.parametrize("bad", ["", ".", "..", "../runs", "a/b", "%2e%2e", "x\0", "é", "x" * 300])
async def test_an_id_that_is_none_is_not_found_and_touches_nothing(stack: Stack, bad: str) -> None:
    for call in (
        stack.client.get_session,
        stack.client.describe_run,
        stack.client.list_run_checkpoints,
        stack.client.get_sampler,
        stack.client.heartbeat,
    ):
        with pytest.raises(NotFound):
            await call("ann", bad)


@pytest.mark.parametrize("tenant", ["../bob", "a/b", "", "."])
async def test_a_tenant_that_is_none_is_refused(stack: Stack, tenant: str) -> None:
    with pytest.raises(InvalidField, match="X-Luthier-Tenant"):
        await stack.client.create_session(tenant)


# --- sessions -------------------------------------------------------------------------------------


async def test_a_session_is_repeated_under_its_idempotency_key_only(stack: Stack) -> None:
    first = await stack.client.create_session("ann", tags=["a"], idempotency_key="k")
    again = await stack.client.create_session("ann", tags=["b"], idempotency_key="k")
    assert again == first
    assert len(first.session_id) == 32
    others = [
        await stack.client.create_session("bob", idempotency_key="k"),
        await stack.client.create_session("ann", idempotency_key="l"),
        await stack.client.create_session("ann"),
        await stack.client.create_session("ann"),
    ]
    assert len({first.session_id, *(session.session_id for session in others)}) == 5
    page = await stack.client.list_sessions("ann", limit=2, offset=1)
    assert page["sessions"] == [others[2].session_id, others[1].session_id]
    assert page["cursor"] == {"offset": 1, "limit": 2, "total_count": 4}


async def test_the_first_reason_to_finish_wins(stack: Stack) -> None:
    session = await stack.client.create_session("ann")
    session_id = session.session_id
    assert (await stack.client.heartbeat("ann", session_id)).status == "active"
    await stack.client.finish_session("ann", session_id, reason="errored", detail="boom")
    await stack.client.finish_session("ann", session_id, reason="success")
    finished = await stack.client.heartbeat("ann", session_id)
    assert (finished.status, finished.finish_reason) == ("finished", "errored")
    assert finished.finish_detail == "boom"
    assert await stack.valkey.hget(keys.session_header(session_id), "status") == b"finished"


async def test_a_finished_session_takes_no_new_work_and_repeats_the_old(stack: Stack) -> None:
    run = await stack.run()
    wanted: dict[str, Any] = {"session_id": run.session_id, "base_model": "tiny"}
    sampler = await stack.client.create_sampler("ann", sampling_session_seq_id=0, **wanted)
    await stack.client.finish_session("ann", run.session_id, reason="success")
    with pytest.raises(BadRequest, match="is finished"):
        await stack.client.create_run("ann", model_seq_id=1, **wanted)
    with pytest.raises(BadRequest, match="is finished"):
        await stack.client.create_sampler("ann", sampling_session_seq_id=1, **wanted)
    assert await stack.client.create_run("ann", model_seq_id=0, **wanted) == run
    again = await stack.client.create_sampler("ann", sampling_session_seq_id=0, **wanted)
    assert again == sampler


async def test_a_session_names_its_runs_and_samplers(stack: Stack) -> None:
    run = await stack.run()
    session_id = run.session_id
    for number in (0, 1):
        await stack.client.create_sampler(
            "ann", session_id=session_id, sampling_session_seq_id=number, base_model="tiny"
        )
    assert await stack.client.describe_session("ann", session_id) == {
        "training_run_ids": [f"{session_id}:train:0"],
        "sampler_ids": [f"{session_id}:sample:0", f"{session_id}:sample:1"],
        "user_metadata": None,
        "display_name": None,
    }


# --- training runs --------------------------------------------------------------------------------


async def test_a_repeated_run_keeps_the_seed_drawn_first(stack: Stack) -> None:
    run = await stack.run(lora_config={"rank": 8, "train_mlp": False})
    again = await stack.client.create_run(
        "ann", session_id=run.session_id, model_seq_id=0, base_model="other"
    )
    assert again == run
    assert (run.lora.rank, run.lora.train_mlp, run.lora.train_attn) == (8, False, True)
    assert run.run_id == f"{run.session_id}:train:0"
    assert run.optimizer_config == {"type": "adamw"}
    assert (await stack.run(lora_config={"rank": 8, "seed": 5})).lora.seed == 5


async def test_racing_creations_of_one_run_agree(stack: Stack) -> None:
    session = await stack.client.create_session("ann")
    runs = await asyncio.gather(
        *(
            stack.client.create_run(
                "ann", session_id=session.session_id, model_seq_id=0, base_model="tiny"
            )
            for _ in range(8)
        )
    )
    assert {run.lora.seed for run in runs} == {runs[0].lora.seed}
    page = await stack.client.list_runs("ann", limit=9, offset=0)
    assert page["cursor"]["total_count"] == 1


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"base_model": "gpt"}, InvalidField, r"base_model='gpt'.*\['tiny', 'other'\]"),
        ({"base_model": None}, InvalidField, "base_model is required"),
        ({"lora_config": {"rank": 0}}, InvalidField, "lora_config.rank"),
        ({"lora_config": {"rank": 257}}, InvalidField, r"rank=257 must be 1\.\.256"),
        (
            {"lora_config": dict.fromkeys(("train_attn", "train_mlp", "train_unembed"), False)},
            InvalidField,
            "one of train_attn, train_mlp, train_unembed",
        ),
        ({"model_seq_id": -1}, InvalidField, "model_seq_id"),
        ({"user_metadata": {"a": 1}}, InvalidField, "user_metadata.a"),
        ({"optimizer_config": {"type": "dimuon"}}, Unsupported, "must be adamw"),
        ({"source_path": "tinker://x"}, InvalidField, "path="),
        ({"user_metadata": {"a": "x" * 2**20}}, BodyTooLarge, "at most"),
    ],
)
async def test_a_run_that_cannot_be_is_refused_by_field_and_allowed_values(
    stack: Stack, changes: dict[str, Any], error: type[LuthierError], says: str
) -> None:
    with pytest.raises(error, match=says):
        await stack.run(**changes)
    assert (await stack.client.list_runs("ann", limit=9, offset=0))["training_runs"] == []


async def test_a_run_from_a_checkpoint_takes_its_model_and_lora(stack: Stack) -> None:
    source = await stack.run(lora_config={"rank": 4, "seed": 9, "train_attn": False})
    path = (await stack.save(source)).tinker_path
    run = await stack.run(base_model=None, source_path=path)
    assert (run.base_model, run.lora, run.source_path) == ("tiny", source.lora, path)
    with pytest.raises(InvalidField, match="the checkpoint is of 'tiny'"):
        await stack.run(base_model="other", source_path=path)
    sampler_path = (await stack.save(source, kind="sampler_weights", seq=2)).tinker_path
    with pytest.raises(InvalidField, match="only a training checkpoint"):
        await stack.run(base_model=None, source_path=sampler_path)
    with pytest.raises(NotFound):
        await stack.run("bob", base_model=None, source_path=path)


async def test_runs_are_listed_latest_first_with_their_last_checkpoints(stack: Stack) -> None:
    first, second = await stack.run(user_metadata={"k": "v"}), await stack.run()
    await stack.save(first, name="a", seq=1)
    last = await stack.save(first, name="b", seq=2)
    sampler = await stack.save(first, name="a", seq=3, kind="sampler_weights")
    await stack.save(first, name="gone", seq=4, ttl_seconds=1)
    stack.clock.now += timedelta(minutes=1)
    requested = stack.clock.now + timedelta(hours=1)
    await committed(stack, first, 1, from_ms=int(requested.timestamp() * 1000))
    await job(stack, "usage")
    page = await stack.client.list_runs("ann", limit=20, offset=0)
    assert page["cursor"] == {"offset": 0, "limit": 20, "total_count": 2}
    newest, oldest = page["training_runs"]
    assert oldest["training_run_id"] == second.run_id
    assert oldest["last_checkpoint"] is None
    assert oldest["last_request_time"] == second.created_at.isoformat()
    assert newest == {
        "training_run_id": first.run_id,
        "base_model": "tiny",
        "model_owner": "ann",
        "is_lora": True,
        "corrupted": False,
        "lora_rank": 32,
        "last_request_time": requested.isoformat(),
        "last_checkpoint": last.row(),
        "last_sampler_checkpoint": sampler.row(),
        "user_metadata": {"k": "v"},
    }
    assert await stack.client.describe_run("ann", first.run_id) == {**newest, "recovered": []}


async def test_a_run_says_how_it_came_back_each_time_its_trainer_had_died(stack: Stack):
    run = await stack.run()
    for epoch in (2, 10):
        event = RecoveryRecord(
            epoch=epoch,
            at=stack.clock(),
            cause="trainer died",
            worker="trainer-1",
            from_seq=4,
            to_seq=6,
            outcome="exact",
            seconds=0.5,
        )
        await stack.blobs.put(keys.run_recovery("ann", run.run_id, epoch), event.to_bytes())
    described = await stack.client.describe_run("ann", run.run_id)
    assert [event["epoch"] for event in described["recovered"]] == [10, 2]
    assert described["recovered"][0]["cause"] == "trainer died"


# --- checkpoints ----------------------------------------------------------------------------------


async def test_checkpoints_of_all_runs_come_in_pages_newest_first(stack: Stack) -> None:
    first, second = await stack.run(), await stack.run()
    saved = [await stack.save(first, name=f"n{n}", seq=n) for n in range(3)]
    saved.append(await stack.save(second))
    page = await stack.client.list_checkpoints("ann", limit=2, offset=1)
    assert [row["tinker_path"] for row in page["checkpoints"]] == [
        record.tinker_path for record in (saved[2], saved[1])
    ]
    assert page["cursor"] == {"offset": 1, "limit": 2, "total_count": 4}
    of_first = await stack.client.list_run_checkpoints("ann", first.run_id)
    assert of_first == {"checkpoints": [r.row() for r in reversed(saved[:3])], "cursor": None}


async def test_listing_reads_no_object(stack: Stack) -> None:
    run = await stack.run()
    record = await stack.save(run)
    async for info in stack.blobs.list(""):
        await stack.blobs.delete(info.key)
    page = await stack.client.list_checkpoints("ann", limit=9, offset=0)
    assert page["checkpoints"] == [record.row()]
    runs = (await stack.client.list_runs("ann", limit=9, offset=0))["training_runs"]
    assert [item["last_checkpoint"] for item in runs] == [record.row()]


async def test_an_expired_checkpoint_is_gone_for_every_call(stack: Stack) -> None:
    run = await stack.run()
    path = (await stack.save(run, ttl_seconds=3600)).tinker_path
    await stack.client.resolve("ann", path)
    stack.clock.now += timedelta(hours=1)
    for call in (stack.client.resolve, stack.client.weights_info):
        with pytest.raises(NotFound):
            await call("ann", path)
    assert (await stack.client.list_checkpoints("ann", limit=9, offset=0))["checkpoints"] == []
    with pytest.raises(NotFound):
        await stack.client.delete_checkpoint("ann", run.run_id, "weights", "x")


async def test_a_deleted_checkpoint_is_off_the_list_and_its_name_is_free(stack: Stack) -> None:
    run = await stack.run()
    path = (await stack.save(run)).tinker_path
    await stack.client.delete_checkpoint("ann", run.run_id, "weights", "x")
    with pytest.raises(NotFound):
        await stack.client.resolve("ann", path)
    with pytest.raises(NotFound):
        await stack.client.delete_checkpoint("ann", run.run_id, "weights", "x")
    with pytest.raises(NotFound):
        await stack.client.delete_checkpoint("ann", run.run_id, "ephemeral", "x")
    assert (await stack.client.list_run_checkpoints("ann", run.run_id))["checkpoints"] == []
    await stack.save(run, seq=2)


async def test_weights_info_says_what_to_create(stack: Stack) -> None:
    run = await stack.run(lora_config={"rank": 4, "train_unembed": False})
    for kind in ("weights", "sampler_weights"):
        path = (await stack.save(run, kind=kind, seq=1 + len(kind))).tinker_path
        assert await stack.client.weights_info("ann", path) == {
            "base_model": "tiny",
            "is_lora": True,
            "lora_rank": 4,
            "train_unembed": False,
            "train_mlp": True,
            "train_attn": True,
        }
    with pytest.raises(InvalidField, match="tinker_path="):
        await stack.client.weights_info("ann", "tinker://nonsense")


# --- samplers -------------------------------------------------------------------------------------


async def test_a_sampling_session_is_bound_to_its_weights_for_good(stack: Stack) -> None:
    run = await stack.run()
    checkpoint = await stack.save(run, kind="sampler_weights")
    wanted: dict[str, Any] = {"session_id": run.session_id, "sampling_session_seq_id": 0}
    sampler = await stack.client.create_sampler("ann", model_path=checkpoint.tinker_path, **wanted)
    assert sampler.sampling_session_id == f"{run.session_id}:sample:0"
    assert (sampler.base_model, sampler.weights) == ("tiny", checkpoint.manifest_key)
    await stack.client.delete_checkpoint("ann", run.run_id, "sampler_weights", "x")
    assert await stack.client.create_sampler("ann", base_model="other", **wanted) == sampler
    assert await stack.client.get_sampler("ann", sampler.sampling_session_id) == sampler


async def test_weights_may_be_named_with_their_base_model_but_not_with_another(
    stack: Stack,
) -> None:
    run = await stack.run()
    path = (await stack.save(run, kind="sampler_weights")).tinker_path
    wanted: dict[str, Any] = {"session_id": run.session_id, "model_path": path}
    sampler = await stack.client.create_sampler(
        "ann", base_model="tiny", sampling_session_seq_id=0, **wanted
    )
    assert (sampler.base_model, sampler.model_path) == ("tiny", path)
    with pytest.raises(InvalidField, match=r"base_model='other'.*'tiny'"):
        await stack.client.create_sampler(
            "ann", base_model="other", sampling_session_seq_id=1, **wanted
        )


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({}, InvalidField, "base_model or model_path is required"),
        ({"base_model": "gpt"}, InvalidField, r"\['tiny', 'other'\]"),
        ({"model_path": "file:///etc/passwd"}, InvalidField, "model_path="),
        ({"model_path": "tinker://r/external_weights/x"}, InvalidField, "model_path="),
        ({"model_path": "tinker://r/weights/x"}, NotFound, "tinker://r/weights/x"),
    ],
)
async def test_a_sampling_session_that_cannot_be_is_refused(
    stack: Stack, changes: dict[str, Any], error: type[LuthierError], says: str
) -> None:
    session = await stack.client.create_session("ann")
    with pytest.raises(error, match=says):
        await stack.client.create_sampler(
            "ann", session_id=session.session_id, sampling_session_seq_id=0, **changes
        )


# --- transport ------------------------------------------------------------------------------------


@asynccontextmanager
async def raw_http(stack: Stack) -> AsyncIterator[aiohttp.ClientSession]:
    """Requests that the client would not make."""
    headers = {
        "Authorization": f"Bearer {service_token(stack.config.secret())}",
        "X-Luthier-Tenant": "ann",
    }
    connector = aiohttp.UnixConnector(stack.socket)
    async with aiohttp.ClientSession(
        "http://registry", connector=connector, headers=headers
    ) as http:
        yield http


async def test_a_body_that_cannot_be_read_is_refused(stack: Stack) -> None:
    bodies = [(b"{", Unreadable), (b" " * (2**20 + 1), BodyTooLarge)]
    async with raw_http(stack) as http:
        for body, error in bodies:
            async with http.post("/runs", data=io.BytesIO(body)) as response:
                answer = await response.json()
                assert (response.status, answer["error"]) == (error.status, error.__name__)


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "offset=-1", "offset=٣"])
async def test_a_page_out_of_range_is_refused(stack: Stack, query: str) -> None:
    async with raw_http(stack) as http, http.get(f"/runs?{query}") as response:
        assert response.status == 400
        assert "must be" in (await response.json())["detail"]


async def test_an_unknown_route_is_not_found(stack: Stack) -> None:
    async with raw_http(stack) as http:
        for method, path in (("GET", "/nothing"), ("PUT", "/runs"), ("DELETE", "/sessions")):
            async with http.request(method, path) as response:
                answer = await response.json()
                assert (response.status, answer["error"]) == (404, "NotFound")


async def test_a_registry_that_is_not_there_is_unavailable(config: Config) -> None:
    async with RegistryClient(config) as client:
        with pytest.raises(Unavailable):
            await client.create_session("ann")
        with pytest.raises(Unavailable):
            await client.ready()


async def test_a_call_survives_a_restart_of_the_registry(config: Config) -> None:
    async with RegistryClient(config) as client:
        async with serving(config, Clock()):
            session = await client.create_session("ann")
        async with serving(config, Clock()):
            assert await client.get_session("ann", session.session_id) == session


@pytest.mark.parametrize("ends_by", ["SIGTERM", "closed stdin"])
async def test_the_process_serves_until_it_is_told_to_stop(
    config: Config, tmp_path: Path, ends_by: str
) -> None:
    file = tmp_path / "luthier.toml"
    file.write_text(dump_config(config))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "luthier_registry", "--config", str(file), "--name", "registry"),
        stdin=asyncio.subprocess.PIPE,
    )
    try:
        async with RegistryClient(config) as client:
            async with asyncio.timeout(30):
                while not await _is_ready(client):
                    assert process.returncode is None
            await client.create_session("ann")
        if ends_by == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        else:
            assert process.stdin is not None
            process.stdin.close()
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _is_ready(client: RegistryClient) -> bool:
    try:
        await client.ready()
    except Unavailable:
        return False
    return True


async def test_a_wrong_configuration_ends_the_start_with_one_line(
    config: Config, tmp_path: Path
) -> None:
    file = tmp_path / "luthier.toml"
    file.write_text(dump_config(replace(config, registry_url="ftp://x")))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "luthier_registry", "--config", str(file)),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate()
    assert process.returncode == 2
    # The last: what a store cannot do is said before.
    assert stderr.decode().splitlines()[-1] == (
        "registry_url: 'ftp://x' is not unix:///path or http://host:port"
    )
