"""The life of a checkpoint in the registry: who reads it, until when; copies and archives."""

import io
import tarfile
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.registry_stack import Stack

from luthier_core import keys
from luthier_core.caller import CALLER, Caller
from luthier_core.checkpoints import read_files, read_manifest
from luthier_core.errors import BadRequest, CheckpointDamaged, InvalidField, NotFound
from luthier_core.records import CheckpointRecord, RunRecord

FILES = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"weights" * 1000,
    "optimizer.safetensors": b"moments" * 1000,
}


async def saved(stack: Stack, **changes: Any) -> tuple[RunRecord, CheckpointRecord]:
    run = await stack.run()
    return run, await stack.save(run, **{"files": FILES, **changes})


async def damage(stack: Stack, checkpoint: CheckpointRecord, name: str) -> None:
    """Other bytes of the same length in one of its files."""
    file = (await read_manifest(stack.blobs, checkpoint.manifest_key)).files[name]
    await stack.blobs.put(file.key, bytes(file.num_bytes))


async def listed(stack: Stack, run: RunRecord, tenant: str = "ann") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]]
    rows = (await stack.client.list_run_checkpoints(tenant, run.run_id))["checkpoints"]
    return rows


# --- published ------------------------------------------------------------------------------------


async def test_a_published_checkpoint_is_read_by_others_until_it_is_private_again(
    stack: Stack,
) -> None:
    run, checkpoint = await saved(stack)
    client, path = stack.client, checkpoint.tinker_path
    with pytest.raises(NotFound):
        await client.resolve("bob", path)
    for _ in range(2):  # a repeat is no error
        await client.publish("ann", run.run_id, "weights", "x")
        assert (await client.resolve("bob", path)).public
        assert [row["public"] for row in await listed(stack, run)] == [True]
    assert (await client.weights_info("bob", path))["base_model"] == "tiny"
    assert await listed(stack, run, "bob") == await listed(stack, run)
    assert (await client.list_checkpoints("bob", limit=9, offset=0))["checkpoints"] == []
    for _ in range(2):
        await client.unpublish("ann", run.run_id, "weights", "x")
        with pytest.raises(NotFound):
            await client.resolve("bob", path)
        with pytest.raises(NotFound):
            await listed(stack, run, "bob")
    assert not (await client.resolve("ann", path)).public


async def test_only_what_is_published_of_a_run_is_seen_by_others(stack: Stack) -> None:
    run, _ = await saved(stack, user_metadata={"secret": "1"})
    await stack.save(run, name="private", seq=2)
    await stack.client.publish("ann", run.run_id, "weights", "x")
    assert [row["checkpoint_id"] for row in await listed(stack, run, "bob")] == ["weights/x"]
    with pytest.raises(NotFound):
        await stack.client.resolve("bob", f"tinker://{run.run_id}/weights/private")
    with pytest.raises(NotFound):
        await stack.client.describe_run("bob", run.run_id)
    seen = await stack.client.describe_run("bob", run.run_id, accessible=True)
    assert seen["last_checkpoint"]["checkpoint_id"] == "weights/x"
    assert seen["user_metadata"] is None


async def test_nobody_else_changes_a_published_checkpoint(stack: Stack) -> None:
    run, checkpoint = await saved(stack)
    where = (run.run_id, "weights", "x")
    await stack.client.publish("ann", *where)
    for call in (
        stack.client.publish("bob", *where),
        stack.client.unpublish("bob", *where),
        stack.client.set_ttl("bob", *where, None),
        stack.client.delete_checkpoint("bob", *where),
    ):
        with pytest.raises(NotFound):
            await call
    assert (await stack.client.resolve("ann", checkpoint.tinker_path)).public


async def test_a_new_save_under_a_published_name_is_private(stack: Stack) -> None:
    run, checkpoint = await saved(stack)
    await stack.client.publish("ann", run.run_id, "weights", "x")
    await stack.save(run, seq=2, overwrite=True)
    with pytest.raises(NotFound):
        await stack.client.resolve("bob", checkpoint.tinker_path)


# --- expiry ---------------------------------------------------------------------------------------


async def test_a_checkpoint_past_its_expiry_is_gone_for_every_reader(stack: Stack) -> None:
    run, checkpoint = await saved(stack)
    where = (run.run_id, "weights", "x")
    client = stack.client
    await client.publish("ann", *where)
    await client.set_ttl("ann", *where, 3600)
    (row,) = await listed(stack, run)
    assert row["expires_at"] is not None
    await client.archive("ann", *where)
    stack.clock.now += timedelta(hours=1)
    for reader in ("ann", "bob"):
        for call in (
            client.resolve(reader, checkpoint.tinker_path),
            client.weights_info(reader, checkpoint.tinker_path),
            client.checkpoint_files(reader, *where),
            client.archive(reader, *where),
            client.set_ttl(reader, *where, None),
            client.publish(reader, *where),
        ):
            with pytest.raises(NotFound):
                await call
    assert await listed(stack, run) == []


async def test_an_expiry_can_be_moved_and_taken_away(stack: Stack) -> None:
    run, checkpoint = await saved(stack, ttl_seconds=3600)
    where = (run.run_id, "weights", "x")
    await stack.client.set_ttl("ann", *where, 7200)
    stack.clock.now += timedelta(hours=1, minutes=30)
    assert await stack.client.resolve("ann", checkpoint.tinker_path)
    await stack.client.set_ttl("ann", *where, None)
    stack.clock.now += timedelta(days=9)
    assert (await stack.client.resolve("ann", checkpoint.tinker_path)).expires_at is None
    assert [row["expires_at"] for row in await listed(stack, run)] == [None]
    with pytest.raises(InvalidField, match="ttl_seconds"):
        await stack.client.set_ttl("ann", *where, 0)


# --- downloads ------------------------------------------------------------------------------------


async def test_an_archive_holds_the_peft_files_and_is_made_once(stack: Stack) -> None:
    run, checkpoint = await saved(stack)
    where = (run.run_id, "weights", "x")
    key = await stack.client.archive("ann", *where)
    tar = await stack.blobs.get(key)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        held = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    assert held == {name: FILES[name] for name in held}
    assert held.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    manifest = await read_manifest(stack.blobs, checkpoint.manifest_key)
    await stack.blobs.delete(manifest.files["adapter_model.safetensors"].key)
    assert await stack.client.archive("ann", *where) == key
    assert await stack.blobs.get(key) == tar
    files = await stack.client.checkpoint_files("ann", *where)
    assert files.keys() == held.keys()


async def test_files_that_have_changed_make_no_archive(stack: Stack) -> None:
    run, checkpoint = await saved(stack)
    await damage(stack, checkpoint, "adapter_model.safetensors")
    with pytest.raises(CheckpointDamaged, match="sha256"):
        await stack.client.archive("ann", run.run_id, "weights", "x")
    assert [i.key async for i in stack.blobs.list(keys.archive("ann", "")[:-4])] == []


@pytest.mark.parametrize("ending", ["delete_checkpoint", "unpublish"])
async def test_the_archive_goes_with_its_checkpoint(stack: Stack, ending: str) -> None:
    run, _ = await saved(stack)
    where = (run.run_id, "weights", "x")
    await stack.client.publish("ann", *where)
    key = await stack.client.archive("bob", *where)
    await getattr(stack.client, ending)("ann", *where)
    assert await stack.blobs.size(key) is None


async def test_external_weights_are_listed_only_when_asked_for(stack: Stack) -> None:
    run, _ = await saved(stack)
    await stack.save(run, kind="external_weights", seq=2)
    for external, ids in ((True, ["external_weights/x", "weights/x"]), (False, ["weights/x"])):
        page = await stack.client.list_checkpoints("ann", limit=9, offset=0, external=external)
        assert [row["checkpoint_id"] for row in page["checkpoints"]] == ids
        assert page["cursor"]["total_count"] == len(ids)


# --- copies ---------------------------------------------------------------------------------------


async def copied(stack: Stack, path: str, tenant: str = "ann", **fields: Any) -> str:
    wanted = {"source_path": path, "destination_project_id": "p", **fields}
    return await stack.client.copy_weights(tenant, wanted)


async def test_a_copy_outlives_its_source_in_a_run_of_its_own(stack: Stack) -> None:
    run, checkpoint = await saved(stack, ttl_seconds=3600, user_metadata={"step": "4"})
    path = await copied(stack, checkpoint.tinker_path)
    assert path.endswith("/weights/x")
    assert path != checkpoint.tinker_path
    await stack.client.delete_checkpoint("ann", run.run_id, "weights", "x")
    stack.clock.now += timedelta(days=1)
    copy = await stack.client.resolve("ann", path)
    assert (copy.user_metadata, copy.expires_at) == ({"step": "4"}, None)
    assert await read_files(stack.blobs, copy.manifest_key) == FILES
    runs = await stack.client.list_runs("ann", limit=9, offset=0, project_id="p")
    assert [row["training_run_id"] for row in runs["training_runs"]] == [copy.run_id]
    assert [row["tinker_path"] for row in await listed(stack, copy)] == [path]  # type: ignore[arg-type]
    with pytest.raises(BadRequest):
        await stack.client.create_run(
            "ann",
            session_id=copy.run_id.partition(":")[0],
            model_seq_id=0,
            base_model="tiny",
        )


async def test_a_copy_is_made_once_under_one_key(stack: Stack) -> None:
    run, checkpoint = await saved(stack)
    path = await copied(stack, checkpoint.tinker_path, idempotency_key="k")
    await stack.client.delete_checkpoint("ann", run.run_id, "weights", "x")
    assert await copied(stack, checkpoint.tinker_path, idempotency_key="k") == path
    with pytest.raises(NotFound):
        await copied(stack, checkpoint.tinker_path, idempotency_key="l")
    with pytest.raises(BadRequest):
        await copied(stack, checkpoint.tinker_path + "y", idempotency_key="k")


async def test_a_copy_belongs_to_the_key_that_makes_it_and_to_its_project(stack: Stack) -> None:
    _, checkpoint = await saved(stack)
    token = CALLER.set(Caller("ann", "0123456789ab", frozenset({"train"}), project_id="p"))
    try:
        path = await copied(stack, checkpoint.tinker_path)
        with pytest.raises(InvalidField, match="project_id='red'"):
            await copied(stack, checkpoint.tinker_path, destination_project_id="red")
    finally:
        CALLER.reset(token)
    session_id = path.removeprefix("tinker://").partition(":")[0]
    session = await stack.client.get_session("ann", session_id)
    assert (session.project_id, session.key_id) == ("p", "0123456789ab")


async def test_a_copy_may_take_a_place_in_a_session(stack: Stack) -> None:
    run, checkpoint = await saved(stack)
    place = {"session_id": run.session_id, "model_seq_id": 5, "destination_project_id": None}
    path = await copied(stack, checkpoint.tinker_path, **place, ttl_seconds=3600)
    assert path == f"tinker://{run.session_id}:train:5/weights/x"
    assert (await stack.client.resolve("ann", path)).expires_at is not None
    assert await copied(stack, checkpoint.tinker_path, **place) == path
    with pytest.raises(BadRequest, match="no copy"):
        await copied(stack, checkpoint.tinker_path, **{**place, "model_seq_id": 0})


async def test_another_tenants_weights_are_copied_with_its_files_or_not_at_all(
    stack: Stack,
) -> None:
    _, checkpoint = await saved(stack)
    with pytest.raises(NotFound):
        await copied(stack, checkpoint.tinker_path, "bob")
    path = await copied(stack, checkpoint.tinker_path, "bob", access_tenant="ann")
    async for info in stack.blobs.list("t/ann/"):
        await stack.blobs.delete(info.key)
    copy = await stack.client.resolve("bob", path)
    assert await read_files(stack.blobs, copy.manifest_key) == FILES
    assert copy.size_bytes == sum(map(len, FILES.values()))


async def test_a_copy_of_a_file_that_has_changed_stores_nothing(stack: Stack) -> None:
    _, checkpoint = await saved(stack)
    await damage(stack, checkpoint, "optimizer.safetensors")
    with pytest.raises(CheckpointDamaged, match="sha256"):
        await copied(stack, checkpoint.tinker_path, "bob", access_tenant="ann")
    stored = [info.key async for info in stack.blobs.list("t/bob/")]
    assert not [key for key in stored if key.endswith("optimizer.safetensors") or "/man/" in key]


async def test_a_run_begins_from_weights_that_another_tenant_allows_to_read(stack: Stack) -> None:
    _, checkpoint = await saved(stack)
    session = await stack.client.create_session("bob")
    wanted = {
        "session_id": session.session_id,
        "model_seq_id": 0,
        "source_path": checkpoint.tinker_path,
    }
    with pytest.raises(NotFound):
        await stack.client.create_run("bob", **wanted)
    run = await stack.client.create_run("bob", **wanted, access_tenant="ann")
    assert run.lora.rank == checkpoint.lora.rank
    assert await stack.client.resolve("bob", checkpoint.tinker_path, access_tenant="ann")


# --- sessions and keys ----------------------------------------------------------------------------


async def test_sessions_are_found_by_every_filter_and_in_pages(stack: Stack) -> None:
    client = stack.client
    sessions = [
        await client.create_session(
            "ann",
            display_name=f"Sweep number {index}",
            user_metadata={"lr": str(index % 2)},
            project_id="even" if index % 2 == 0 else None,
        )
        for index in range(4)
    ]
    ids = [session.session_id for session in sessions]
    await client.finish_session("ann", ids[0], reason="errored", detail="boom")
    await client.set_project("ann", ids[3], "moved")
    run = await client.create_run("ann", session_id=ids[1], model_seq_id=0, base_model="tiny")
    await stack.save(run)

    async def found(tenant: str = "ann", **wanted: Any) -> list[str]:
        answer = await client.search_sessions(tenant, wanted)
        return [session["session_id"] for session in answer["sessions"]]

    assert await found() == ids[::-1]
    assert await found("bob") == []
    assert await found(session_id=ids[2]) == [ids[2]]
    assert await found(session_id=ids[2], display_name="3 SWEEP") == [ids[3], ids[2]]
    assert await found(display_name="number elephant") == []
    assert await found(user_metadata={"lr": "1"}) == [ids[3], ids[1]]
    assert await found(project_ids=["moved", "even"]) == [ids[3], ids[2], ids[0]]
    finished = {"type": "client_finished"}
    assert await found(statuses=[finished]) == [ids[0]]
    assert await found(statuses=[{**finished, "reasons": ["success"]}]) == []
    assert await found(statuses=[{"type": "active"}, finished]) == ids[::-1]
    assert await found(statuses=[{"type": "failed"}, {"type": "cancelled"}]) == []

    first = await client.search_sessions("ann", {"limit": 3})
    assert [session["checkpoints_count"] for session in first["sessions"]] == [0, 0, 1]
    second = await client.search_sessions("ann", {"limit": 3, "cursor": first["next_cursor"]})
    assert [session["session_id"] for session in second["sessions"]] == [ids[0]]
    assert second["sessions"][0]["status"] == {
        "type": "client_finished",
        "reason": {"type": "errored"},
        "detail": "boom",
    }
    assert second["next_cursor"] is None
    own = first["sessions"][0]["owner"]
    assert await found(owner={"type": "user", "owner_urns": [own]}) == ids[::-1]
    with pytest.raises(NotFound):
        await found("bob", owner={"type": "user", "owner_urns": [own]})


async def test_runs_of_a_project_follow_their_session(stack: Stack) -> None:
    runs = [await stack.run() for _ in range(3)]
    for run in runs[:2]:
        await stack.client.set_project("ann", run.session_id, "p")

    async def of_project(project_id: str) -> list[str]:
        page = await stack.client.list_runs("ann", limit=1, offset=0, project_id=project_id)
        assert page["cursor"]["total_count"] >= len(page["training_runs"])
        return [row["training_run_id"] for row in page["training_runs"]]

    assert await of_project("p") == [runs[1].run_id]
    await stack.client.set_project("ann", runs[1].session_id, "a b&c")
    assert await of_project("p") == [runs[0].run_id]
    assert await of_project("a b&c") == [runs[1].run_id]
    with pytest.raises(NotFound):
        await stack.client.set_project("bob", runs[0].session_id, "p")
