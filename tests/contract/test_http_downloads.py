"""Downloads over HTTP: external weights, archives, and links that open one object for a time."""

import io
import json
import random
import tarfile
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import aiohttp
import pytest
from tests.contract.gateway_client import Answer, Api, Run
from tests.contract.gateway_stack import KEYS, GatewayStack

from luthier_core.disk_blobs import DiskBlobs

PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors"}


def sdk(version: str, **headers: str) -> dict[str, str]:
    return {"User-Agent": f"AsyncTinker/Python {version}", **headers}


async def save(run: Run, name: str = "x", endpoint: str = "save_weights", **fields: Any) -> str:
    """Path of the checkpoint inside the API."""
    result = await run.api.result(await run.send(endpoint, path=name, **fields))
    return str(result["path"]).removeprefix("tinker://")


def url_of(path: str, tail: str = "") -> str:
    run_id, kind, name = path.split("/")
    return f"training_runs/{run_id}/checkpoints/{kind}/{name}{tail}"


async def fetch(url: str, **headers: str) -> Answer:
    """A GET without a key, as a download is made."""
    async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as response:
        return Answer(response.status, response.headers, await response.read())


@pytest.fixture
async def links(api: Api) -> dict[str, str]:
    """File name -> link, of external weights of a new run."""
    path = await save(await api.run(), endpoint="save_weights_external")
    return (await api.get(url_of(path, "/external_weights_urls"))).json()["urls"]


# --- external weights -----------------------------------------------------------------------------


async def test_external_weights_are_peft_files_that_their_links_open(api: Api):
    run = await api.run()
    result = await api.result(await run.send("save_weights_external", path="x", ttl_seconds=3600))
    assert result["path"] == f"tinker://{run.run_id}/external_weights/x"
    url = url_of(f"{run.run_id}/external_weights/x", "/external_weights_urls")
    answer = (await api.get(url)).json()
    assert answer["urls"].keys() == PEFT_FILES
    assert answer["expires"].endswith("+00:00")
    files = {name: (await fetch(url)).body for name, url in answer["urls"].items()}
    assert sum(map(len, files.values())) == result["size_bytes"]
    config = json.loads(files["adapter_config.json"])
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    (listed,) = (await api.get(f"training_runs/{run.run_id}/checkpoints")).json()["checkpoints"]
    assert listed["checkpoint_type"] == "external"
    assert listed["expires_at"] is not None


async def test_a_name_of_external_weights_that_exists_fails_the_save(api: Api):
    run = await api.run()
    await save(run, endpoint="save_weights_external")
    message = await api.failure(await run.send("save_weights_external", path="x"))
    assert "name='x' exists" in message


async def test_encrypted_external_weights_are_refused(api: Api):
    run = await api.run()
    fields = {"path": "x", "age_encryption_recipients": ["age1"]}
    request_id = await run.send("save_weights_external", **fields)
    assert "age_encryption_recipients" in await api.failure(request_id)


async def test_external_weights_are_hidden_from_sdks_that_cannot_read_them(api: Api):
    run = await api.run()
    path = await save(run, endpoint="save_weights_external")
    await save(run, "y")
    for url in ("checkpoints", f"training_runs/{run.run_id}/checkpoints"):
        for version, types in (
            ("0.27.2", {"training"}),
            ("0.28.0", {"training", "external"}),
            ("1.2.3", {"training", "external"}),
        ):
            listed = (await api.call("GET", url, headers=sdk(version))).json()["checkpoints"]
            mine = {row["checkpoint_type"] for row in listed if run.run_id in row["tinker_path"]}
            assert mine == types, (url, version)
    old = (await api.call("GET", "checkpoints", headers=sdk("0.20.0"))).json()
    new = (await api.get("checkpoints")).json()
    assert old["cursor"]["total_count"] < new["cursor"]["total_count"]
    assert (await api.call("DELETE", url_of(path))).status == 200


# --- archives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["save_weights", "save_weights_for_sampler"])
async def test_an_archive_is_a_tar_of_peft_files_behind_a_redirect(api: Api, endpoint: str):
    path = await save(await api.run(), endpoint=endpoint)
    url = url_of(path, "/archive")
    answers = [await archive(api, url, Accept="application/gzip") for _ in range(2)]
    for answer in answers:
        assert answer.status == 302
        left = parsedate_to_datetime(answer.headers["Expires"]).timestamp() - time.time()
        assert 10 * 60 < left <= 15 * 60
    tar = await fetch(answers[0].headers["Location"])
    with tarfile.open(fileobj=io.BytesIO(tar.body)) as held:
        assert set(held.getnames()) == PEFT_FILES
        config = held.extractfile("adapter_config.json")
        assert config is not None
        assert json.load(config)["base_model_name_or_path"]
    assert (await fetch(answers[1].headers["Location"])).body == tar.body


async def test_an_sdk_that_reads_json_is_told_the_link(api: Api):
    path = await save(await api.run())
    answer = await archive(api, url_of(path, "/archive"), Accept="application/json")
    assert answer.status == 200
    assert answer.json().keys() == {"url", "expires"}
    assert (await fetch(answer.json()["url"])).status == 200


async def test_an_sdk_that_sends_two_accept_headers_is_redirected(
    api: Api, http: aiohttp.ClientSession
):
    path = await save(await api.run())
    headers = [("Accept", "application/json"), ("accept", "application/gzip")]
    async with http.get(
        f"{api.url}/api/v1/{url_of(path, '/archive')}",
        headers=[*headers, ("X-API-Key", KEYS["ann"])],
        allow_redirects=False,
    ) as response:
        assert response.status == 302


async def archive(api: Api, url: str, **headers: str) -> Answer:
    """The answer itself, not what it leads to."""
    return await api.call("GET", url, headers=headers, allow_redirects=False)


# --- links ----------------------------------------------------------------------------------------


async def test_a_link_can_be_read_in_ranges(links: dict[str, str]):
    url = links["adapter_model.safetensors"]
    whole = await fetch(url)
    assert whole.status == 200
    assert int(whole.headers["Content-Length"]) == len(whole.body)
    part = await fetch(url, Range="bytes=10-19")
    assert (part.status, part.body) == (206, whole.body[10:20])
    assert part.headers["Content-Range"] == f"bytes 10-19/{len(whole.body)}"
    tail = await fetch(url, Range="bytes=-5")
    assert tail.body == whole.body[-5:]
    assert (await fetch(url, Range=f"bytes={len(whole.body)}-")).status == 416
    assert whole.headers["Content-Disposition"] == "attachment"
    assert whole.headers["Referrer-Policy"] == "no-referrer"


async def test_a_link_opens_nothing_else_and_nothing_after_its_time(
    api: Api,
    links: dict[str, str],
    gateway_stack: GatewayStack,
    second_gateway: Callable[..., Any],
):
    """Reliability S10: 100 tries in 10 classes, and no byte of an object."""
    rng = random.Random(10)
    url, other = links.values()
    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    expires, signature = int(query["expires"]), query["signature"]
    root = Path(gateway_stack.config.store_url.removeprefix("file://"))
    base = f"{parts.scheme}://{parts.netloc}"
    path, key = parts.path, unquote(parts.path).removeprefix("/api/v1/files/")
    deleted = await save(await api.run())
    gone = (await archive(api, url_of(deleted, "/archive"))).headers["Location"]
    assert (await api.call("DELETE", url_of(deleted))).status == 200
    rotated = (await second_gateway(link_secret_key="another")).url

    def signed(secret: bytes, now: float) -> str:
        return base + DiskBlobs(root, "", secret, clock=lambda: now).signed_url(key, 60)

    def at(time: object, sign: str) -> str:
        return f"{base}{path}?expires={time}&signature={sign}"

    def of(other_path: str) -> str:
        return f"{base}{other_path}?{parts.query}"

    outside = ["../secret", "%2e%2e/secret", "t/%2e%2e/../secret", "keys/x.json"]
    secret, now = gateway_stack.config.secret(), time.time()
    classes: dict[str, Callable[[], str]] = {
        "expired": lambda: signed(secret, now - rng.uniform(61, 1e6)),
        "another time": lambda: at(expires + rng.randint(1, 10**6), signature),
        "no time": lambda: at(rng.choice(["", "x", "-1", "9" * 20]), signature),
        "another signature": lambda: at(expires, rng.randbytes(32).hex()),
        "half a signature": lambda: at(expires, signature[: rng.randrange(64)]),
        "another secret": lambda: signed(rng.randbytes(32), now),
        "another object": lambda: of(urlsplit(other).path),
        "out of the folder": lambda: of(f"/api/v1/files/{rng.choice(outside)}"),
        "another method": lambda: url,
        "deleted or rotated": lambda: rng.choice([gone, rotated + url.removeprefix(base)]),
    }
    details = set()
    async with aiohttp.ClientSession() as http:
        for name, make in classes.items():
            methods = ["HEAD", "PUT", "DELETE", "POST"] if name == "another method" else ["GET"]
            for _ in range(10):
                attempt, headers = make(), rng.choice([{}, {"Range": "bytes=0-9"}])
                async with http.request(rng.choice(methods), attempt, headers=headers) as response:
                    body = await response.read()
                assert response.status in (401, 403, 404, 405), (name, attempt)
                assert not body or body.startswith(b'{"detail"'), (name, attempt)
                if response.status == 403:
                    details.add(body)
    assert len(details) == 1
    print(f"S10: {10 * len(classes)} tries in {len(classes)} classes, 0 bytes")


async def test_a_link_to_a_deleted_object_tells_nothing(api: Api):
    path = await save(await api.run())
    answer = await archive(api, url_of(path, "/archive"))
    assert (await api.call("DELETE", url_of(path))).status == 200
    assert (await fetch(answer.headers["Location"])).status == 403


async def test_downloads_of_what_is_absent_are_404(api: Api):
    run = await api.run()
    for tail in ("/archive", "/external_weights_urls"):
        assert (await api.get(url_of(f"{run.run_id}/weights/none", tail))).status == 404
