"""Downloads over HTTP: external weights, archives, and links that open one object for a time."""

import io
import json
import tarfile
import time
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
    links: dict[str, str], gateway_stack: GatewayStack
):
    url, other = links.values()
    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    root = Path(gateway_stack.config.store_url.removeprefix("file://"))
    past = DiskBlobs(root, "", gateway_stack.config.secret(), clock=lambda: 1000.0)
    base = f"{parts.scheme}://{parts.netloc}"
    key = unquote(parts.path).removeprefix("/api/v1/files/")
    wrong = [
        base + parts.path,
        f"{base}{parts.path}?expires={int(query['expires']) + 1}&signature={query['signature']}",
        f"{base}{parts.path}?expires=x&signature={query['signature']}",
        f"{base}{parts.path}?expires={'9' * 20}&signature={query['signature']}",
        f"{base}{parts.path}?expires={query['expires']}&signature={'0' * 64}",
        f"{base}{urlsplit(other).path}?{parts.query}",
        f"{base}/api/v1/files/keys/x.json?{parts.query}",
        f"{base}/api/v1/files/../secret?{parts.query}",
        f"{base}/api/v1/files/%2e%2e/secret?{parts.query}",
        base + past.signed_url(key, 60),
    ]
    details = set()
    for attempt in wrong:
        answer = await fetch(attempt)
        assert answer.status in (401, 403, 404), attempt
        assert b"lora" not in answer.body
        if answer.status == 403:
            details.add(answer.detail)
    assert len(details) == 1
    async with aiohttp.ClientSession() as http:
        for method in ("HEAD", "PUT", "DELETE", "POST"):
            async with http.request(method, url) as response:
                assert response.status == 405, method


async def test_a_link_to_a_deleted_object_tells_nothing(api: Api):
    path = await save(await api.run())
    answer = await archive(api, url_of(path, "/archive"))
    assert (await api.call("DELETE", url_of(path))).status == 200
    assert (await fetch(answer.headers["Location"])).status == 403


async def test_downloads_of_what_is_absent_are_404(api: Api):
    run = await api.run()
    for tail in ("/archive", "/external_weights_urls"):
        assert (await api.get(url_of(f"{run.run_id}/weights/none", tail))).status == 404
