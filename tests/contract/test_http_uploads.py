"""Adapters made elsewhere over HTTP: adopted as checkpoints, or refused with nothing stored."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.contract.adapter_uploads import CONFIG, GOOD, HOSTILE, MODULE, RANK, hostile, weights
from tests.contract.gateway_client import Api, Run, datum, logprobs_of
from tests.contract.gateway_stack import GatewayStack, running_gateway_stack
from tests.stores.rgw import ACCESS_KEY, SECRET_KEY

from luthier_core import keys
from luthier_core.blobs import open_blobs

NUM_HOSTILE = 140
MIN_SHARE = 0.05


@pytest.fixture(scope="module")
def s3_stack(s3_endpoint: str) -> Iterator[GatewayStack]:
    with (
        pytest.MonkeyPatch.context() as environ,
        tempfile.TemporaryDirectory(prefix="lu-up-") as folder,
    ):
        environ.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        environ.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        store_url = f"s3+http://{s3_endpoint}/luthier"
        with running_gateway_stack(Path(folder), store_url=store_url) as stack:
            yield stack


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def gateway_stack(request: pytest.FixtureRequest, gateway_stack: GatewayStack) -> GatewayStack:
    """On S3 too: a store that has got every byte may keep what is then refused."""
    if request.param == "disk":
        return gateway_stack
    stack: GatewayStack = request.getfixturevalue("s3_stack")
    return stack


async def uploaded(api: Api) -> dict[str, Any]:
    answer = await GOOD.send(api)
    assert answer.status == 200, answer
    return answer.json()


async def run_from(api: Api, path: str, **fields: Any) -> Run:
    wanted = {"session_id": await api.session(), "model_seq_id": 0, "path": path}
    created = await api.result(
        await api.accepted("load_weights", {**wanted, "optimizer": False, **fields})
    )
    return Run(api, created["model_id"])


async def logprobs(run: Run) -> list[list[float]]:
    request_id = await run.forward_backward(datum([7, 8, 9]), forward_only=True)
    return logprobs_of(await run.api.training_output(request_id))


async def test_an_adapter_made_elsewhere_is_trained_on_and_sampled_from(api: Api):
    paths = await uploaded(api)
    info = (await api.post("weights_info", {"tinker_path": paths["tinker_path"]})).json()
    assert (info["lora_rank"], info["train_attn"], info["train_mlp"]) == (RANK, True, False)
    run = await run_from(api, paths["tinker_path"])
    plain = await logprobs(await api.run())
    assert await logprobs(run) != plain
    await run.forward_backward()
    await api.result(await run.step())
    for path in paths.values():
        sampler = await api.sampler(model_path=path)
        await api.samples(await sampler.send())


async def test_what_was_saved_here_is_the_same_after_a_way_through_files(api: Api):
    """The archive of a checkpoint, uploaded, is that checkpoint but for the optimizer."""
    import io
    import json
    import tarfile

    first = await api.run()
    await first.forward_backward()
    await first.step(learning_rate=0.1)
    saved = await api.result(await first.send("save_weights", path="x"))
    url = f"training_runs/{first.run_id}/checkpoints/weights/x/archive"
    link = (await api.call("GET", url, headers={"Accept": "application/json"})).json()["url"]
    with tarfile.open(fileobj=io.BytesIO((await api.call("GET", link)).body)) as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    attempt = type(GOOD)(
        json.loads(files["adapter_config.json"]), files["adapter_model.safetensors"]
    )
    paths = (await attempt.send(api)).json()
    again = await run_from(api, paths["tinker_path"])
    assert await logprobs(again) == await logprobs(await run_from(api, saved["path"]))


async def test_an_upload_has_no_moments_and_says_so(api: Api):
    paths = await uploaded(api)
    wanted = {"session_id": await api.session(), "model_seq_id": 0, "optimizer": True}
    request_id = await api.accepted("load_weights", {**wanted, "path": paths["tinker_path"]})
    assert "no optimizer.safetensors" in await api.failure(request_id)


async def test_a_repeat_is_answered_like_the_first(api: Api):
    first = await GOOD.send(api, X_Idempotency_Key="once")
    assert first.status == 200
    assert (await GOOD.send(api, X_Idempotency_Key="once")).json() == first.json()
    other = type(GOOD)(CONFIG, weights(2))
    answer = await other.send(api, X_Idempotency_Key="once")
    assert (answer.status, "X-Idempotency-Key" in answer.detail) == (400, True)


@pytest.mark.parametrize("fields", [{"base_model": "other"}, {"num_bytes": "x"}, {"sha256": "0"}])
async def test_an_announcement_names_the_field_that_is_wrong(api: Api, fields: dict[str, Any]):
    wanted = {"base_model": "x", "adapter_config": CONFIG, "num_bytes": 1, "sha256": "0" * 64}
    answer = await api.post("uploads", {**wanted, "name": "x", **fields})
    assert answer.status in (400, 422)
    assert next(iter(fields)) in answer.detail


async def test_hostile_uploads_store_nothing_and_become_no_checkpoint(
    api: Api, gateway_stack: GatewayStack
):
    """Reliability S9: archives and upload sequences, 0 writes outside, 0 adopted."""

    async def stored() -> set[str]:
        async with open_blobs(gateway_stack.config) as blobs:
            found = {info.key async for info in blobs.list("t/")}
        return {key for key in found if not key.startswith(keys.upload_record("ann", "")[:-5])}

    await uploaded(api)  # a server that refuses all would prove nothing
    before = {key for key in await stored() if "/audit/" not in key}
    accepted = []
    for kind, attempt in hostile(NUM_HOSTILE):
        answer = await attempt.send(api)
        if not 400 <= answer.status < 500:
            accepted.append((kind, attempt, answer))
    assert not accepted
    assert {key for key in await stored() if "/audit/" not in key} == before
    share = (NUM_HOSTILE // len(HOSTILE)) / NUM_HOSTILE
    assert share >= MIN_SHARE
    print(
        f"S9 uploads: {NUM_HOSTILE} hostile in {len(HOSTILE)} classes of at least {share:.1%}, "
        f"0 adopted, 0 stored; module {MODULE}"
    )
