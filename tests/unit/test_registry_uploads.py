"""Uploads in the registry: adopted whole or not at all, and swept if they never are."""

import hashlib
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.registry_stack import Stack
from tests.unit.test_registry_housekeeping import has_org, job

from luthier_core import keys
from luthier_core.checkpoints import read_files
from luthier_core.errors import BadRequest, NotFound
from luthier_core.records import UploadRecord

WEIGHTS = b"weights"
SWITCHES = {"train_attn": True, "train_mlp": False, "train_unembed": False}


async def announced(stack: Stack, **fields: Any) -> UploadRecord:
    await has_org(stack)
    wanted = {
        "base_model": "tiny",
        "adapter_config": {"r": 4},
        "num_bytes": len(WEIGHTS),
        "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
        "name": "x",
        **fields,
    }
    return await stack.client.create_upload("ann", wanted)


async def came(stack: Stack, upload: UploadRecord) -> None:
    prefix = keys.checkpoint_prefix("ann", upload.run_id, 0, 0)
    await stack.blobs.put(f"{prefix}adapter_model.safetensors", WEIGHTS)


async def test_an_upload_is_two_checkpoints_with_the_same_files(stack: Stack) -> None:
    upload = await announced(stack, ttl_seconds=60, user_metadata={"from": "elsewhere"})
    with pytest.raises(BadRequest, match="have not come"):
        await stack.client.adopt_upload("ann", upload.upload_id, SWITCHES)
    await came(stack, upload)
    for _ in range(2):  # a repeat changes nothing
        paths = await stack.client.adopt_upload("ann", upload.upload_id, SWITCHES)
    assert (await stack.client.upload("ann", upload.upload_id))[1] == paths
    records = [await stack.client.resolve("ann", path) for path in paths]
    assert [record.kind for record in records] == ["weights", "sampler_weights"]
    assert len({record.manifest_key for record in records}) == 1
    files = await read_files(stack.blobs, records[0].manifest_key)
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    listed = (await stack.client.list_checkpoints("ann", limit=9, offset=0))["checkpoints"]
    assert {row["tinker_path"] for row in listed} == set(paths)
    assert all(row["expires_at"] for row in listed)


async def test_an_upload_is_its_tenants_alone(stack: Stack) -> None:
    upload = await announced(stack)
    await came(stack, upload)
    with pytest.raises(NotFound):
        await stack.client.upload("bob", upload.upload_id)
    with pytest.raises(NotFound):
        await stack.client.adopt_upload("bob", upload.upload_id, SWITCHES)


async def test_what_is_never_finished_is_swept(stack: Stack) -> None:
    upload = await announced(stack)
    await came(stack, upload)
    await job(stack, "sweep")
    stack.clock.now += timedelta(days=2)
    assert (await job(stack, "sweep"))["deleted"] == 2
    with pytest.raises(NotFound):
        await stack.client.upload("ann", upload.upload_id)


async def test_what_was_adopted_is_kept_when_the_announcement_is_swept(stack: Stack) -> None:
    upload = await announced(stack)
    await came(stack, upload)
    paths = await stack.client.adopt_upload("ann", upload.upload_id, SWITCHES)
    await job(stack, "sweep")
    stack.clock.now += timedelta(days=2)
    assert (await job(stack, "sweep"))["deleted"] == 1
    record = await stack.client.resolve("ann", paths[0])
    assert (await read_files(stack.blobs, record.manifest_key)).keys()
