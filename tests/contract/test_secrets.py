"""No secret, and nothing users write, is in a log, trace, metric, error or audit log (S17).

Every field of every route has a canary in turn, on a whole stack that logs at level debug, whose
store and Redis fail as well. Then the same with each guard taken out, which must be noticed.
"""

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import psutil
import pytest
import redis.asyncio as redis
from aiohttp import web
from aiohttp.test_utils import TestServer
from minio import Minio
from tests.contract import tenant_cases
from tests.contract.gateway_client import BASE_MODEL, PROTOBUF, Api
from tests.contract.gateway_stack import GatewayStack, configure, free_port, running_services
from tests.contract.tenant_cases import CASES
from tests.contract.test_http_smuggling import answers
from tests.contract.test_traces import Collector
from tests.sdk.faulty_proxy import FaultyProxy, running_proxy
from tests.stores.kinds import running_moto

from luthier_core import keys, redaction, telemetry
from luthier_core.auth import key_hmac, new_api_key, service_token
from luthier_core.blobs import open_blobs
from luthier_core.config import load_config
from luthier_core.records import SCOPES, ApiKeyRecord, OrgRecord
from luthier_core.testing import running_valkey
from luthier_gateway import web_io
from luthier_gateway.app import build_app
from luthier_gateway.openai import errors as openai_errors
from luthier_registry import app as registry_app
from luthier_registry import audited

ENVIRON = {
    "AWS_ACCESS_KEY_ID": "CANARYACCESSKEY00001",
    "AWS_SECRET_ACCESS_KEY": "canary/secret+of+the+store",
    "LUTHIER_LINK_ACCESS_KEY": "CANARYLINKSKEY000001",
    "LUTHIER_LINK_SECRET_KEY": "canary/secret+of+the+links",
    "REDIS_PASSWORD": "canary-password-of-redis",
    "HF_TOKEN": "hf_CanaryTokenOfTheHub0000000000000001",
}
ORG = "canary-org"
TOPS = ("t/", "published/", "keys/", "usage/", "sys/", "orgs/")
"""How the keys of objects begin."""
MIN_REQUESTS = 500
SIGNATURE = re.compile(r"X-Amz-Signature=([0-9a-f]{64})")
HEADERS = (
    *("X-API-Key", "Authorization", "Cookie", "User-Agent", "X-Idempotency-Key", "traceparent"),
    *("Accept", "Referer", "X-Forwarded-For", "Content-Encoding", "X-Stainless-Package-Version"),
)


class LeakingProxy(FaultyProxy):
    """Before S3: notes the signatures that pass, and has answers that repeat what it was asked."""

    def __init__(self, target: str) -> None:
        super().__init__(target, [""])
        self.signatures: set[str] = set()
        self.fault = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.signatures |= set(SIGNATURE.findall(request.path_qs))
        if self.fault == "no HTTP":
            assert request.transport is not None
            request.transport.write(f"HTTP/1.1 abc {request.path_qs}\r\n\r\n".encode())
            return self._hang_up(request)
        if self.fault == "refused":
            query = request.query
            text = (
                f"<Error><AWSAccessKeyId>{query.get('X-Amz-Credential', '').partition('/')[0]}"
                f"</AWSAccessKeyId><SignatureProvided>{query.get('X-Amz-Signature')}</>"
            )
            return web.Response(status=403, text=text)
        return await super().handle(request)


@dataclass(slots=True)
class Secret:
    """A whole stack, what is secret in it, and where that could come out."""

    stack: GatewayStack
    proxy: LeakingProxy
    collector: Collector
    key: str
    """Of one who may do everything in ORG, and an operator."""
    spare: str
    """Like it, and not revoked by what is sent."""
    token: str
    """A key of another tenant, as weights_access_token."""
    misplaced: str
    """Looks like a key, and stands where none belongs."""
    texts: list[str] = field(default_factory=list)
    """What users wrote."""
    errors: list[str] = field(default_factory=list)
    num_requests: int = 0

    @property
    def kept(self) -> set[str]:
        """What is written down nowhere at all."""
        secret = self.stack.config.secret()
        return {
            *ENVIRON.values(),
            secret.hex(),
            service_token(secret),
            self.key,
            self.spare,
            self.token,
        }

    @property
    def secrets(self) -> set[str]:
        return {*self.kept, self.misplaced, *self.proxy.signatures}

    def plant(self) -> str:
        self.texts.append(f"canary{len(self.texts):05}x")
        return self.texts[-1]

    async def call(self, api: Api, method: str, url: str, body: Any = None, **more: Any) -> None:
        if not url.startswith("http"):
            url = self.stack.url + url
        # Not api.call: what is sent here is answered in many ways.
        headers = {"X-API-Key": self.key, "Content-Type": "application/json", **more}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        async with api._http.request(
            method, url, data=data, headers=headers, allow_redirects=False
        ) as response:
            text = await response.text(errors="replace")
        self.num_requests += 1
        if response.status >= 400:
            self.errors.append(text)


@pytest.fixture(scope="module")
def secret() -> Iterator[Secret]:
    with contextlib.ExitStack() as parts:
        environ = parts.enter_context(pytest.MonkeyPatch.context())
        for name, value in {**ENVIRON, "LUTHIER_LOG_LEVEL": "debug"}.items():
            environ.setenv(name, value)
        folder = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="lu-se-")))
        proxy = LeakingProxy(f"http://{parts.enter_context(running_moto())}")
        parts.enter_context(running_proxy(proxy))
        collector = parts.enter_context(Collector())
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        parts.callback(collector.shutdown)
        store = urlsplit(proxy.url).netloc
        Minio(store, "key", "secret", secure=False, region="us-east-1").make_bucket("luthier")
        redis_url = parts.enter_context(_valkey_with_password())
        configure(
            folder,
            redis_url,
            otlp_endpoint=collector.url,
            store_keys=False,
            store_url=f"s3+http://{store}/luthier",
        )
        config = load_config(folder / "config.toml", os.environ)
        owner, spare, token, misplaced = (new_api_key() for _ in range(4))

        async def store_records() -> None:
            now = datetime.now(UTC)
            async with open_blobs(config) as blobs:
                for tenant, key in ((ORG, owner), (ORG, spare), ("other", token)):
                    record = ApiKeyRecord(tenant=tenant, scopes=SCOPES, created_at=now)
                    name = keys.api_key_record(key_hmac(config.secret(), key))
                    await blobs.put(name, record.to_bytes())
                    org = OrgRecord(org_id=tenant, name=tenant, created_at=now)
                    await blobs.put(keys.org_record(tenant), org.to_bytes())

        asyncio.run(store_records())
        stack = parts.enter_context(running_services(folder, config))
        yield Secret(stack, proxy, collector, owner, spare, token, misplaced)


@contextlib.contextmanager
def _valkey_with_password() -> Iterator[str]:
    """One that listens on a port and wants REDIS_PASSWORD; its URL without that."""

    async def protect(url: str, port: int) -> None:
        async with redis.Redis.from_url(url) as client:
            await client.config_set("port", port)
            await client.config_set("requirepass", ENVIRON["REDIS_PASSWORD"])

    with running_valkey() as url:
        port = free_port()
        asyncio.run(protect(url, port))
        yield f"redis://127.0.0.1:{port}/0"


# --- what is sent ---------------------------------------------------------------------------------


def _planted(value: Any, plant: Callable[[], str]) -> Iterator[Any]:
    """The value with one of its strings exchanged, for each of them."""
    if isinstance(value, str):
        yield plant()
    for name, item in value.items() if isinstance(value, dict) else ():
        for other in _planted(item, plant):
            yield {**value, name: other}
    for at, item in enumerate(value) if isinstance(value, list) else ():
        for other in _planted(item, plant):
            yield [*value[:at], other, *value[at + 1 :]]


async def every_field(secret: Secret, api: Api, ids: dict[str, str]) -> None:
    """Every string of every body, every part of every path and query: once a text, once a key."""
    for plant in (secret.plant, lambda: secret.misplaced):
        for method, path in sorted(CASES, key=lambda route: CASES[route].turn):
            wanted = tenant_cases.request(method, path, ids)
            body = json.loads(wanted.body) if wanted.body else None
            for changed in _planted(body, plant):
                await secret.call(api, method, wanted.path, changed)
            for name in tenant_cases.id_names(method, path):
                other = tenant_cases.request(method, path, {**ids, name: quote(plant())})
                await secret.call(api, method, other.path, other.body)
            query = "&" if "?" in wanted.path else "?"
            more = f"{wanted.path}{query}signature={plant()}&x={plant()}"
            await secret.call(api, method, more, {"more": plant()} if body is None else body)


async def every_header(secret: Secret, api: Api) -> None:
    for name in HEADERS:
        for value in (secret.plant(), secret.misplaced, f"Bearer {secret.misplaced}"):
            await secret.call(api, "GET", "/api/v1/training_runs", **{name: value})
            await secret.call(api, "GET", f"/v1/models/{value}", **{name: value})


async def no_http(secret: Secret) -> None:
    """Requests that are none: told back to who sent them, and nobody else."""
    for line in (
        f"GET / HTTP/1.1\r\nHost: x\r\nX-API-Key: {secret.key}\x01\r\n\r\n",
        f"GET /?signature={secret.misplaced}\x00 HTTP/1.1\r\n\r\n",
        f"{secret.key} {secret.plant()}\r\n\r\n",
        f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n{{{secret.plant()} x\r\n\r\n",
        f"GET / HTTP/1.1\r\n{secret.plant()}{'x' * 9000}: {secret.key}\r\n\r\n",
    ):
        await answers(secret.stack.url, line)
        secret.num_requests += 1


async def work(secret: Secret, api: Api, ids: dict[str, str]) -> None:
    """Prompts, texts and tokens of access where they belong: in requests that are carried out."""
    text = secret.plant()
    for path, body in (
        ("completions", {"prompt": text, "max_tokens": 2}),
        ("chat/completions", {"messages": [{"role": "user", "content": text[:9]}]}),
    ):
        await secret.call(api, "POST", f"/v1/{path}", {"model": BASE_MODEL, **body})
    for token in (secret.token, secret.misplaced):
        for path, more in (
            ("load_weights", {"session_id": ids["session_id"], "model_seq_id": 3}),
            ("copy_weights", {"source_path": ids["tinker_path"], "destination_project_id": "b"}),
        ):
            body = {"path": ids["tinker_path"], "optimizer": False, **more}
            url = f"/api/v1/{path}"
            await secret.call(api, "POST", url, {**body, "weights_access_token": token})
    archive = f"training_runs/{ids['run_id']}/checkpoints/weights/x/archive"
    link = (await api.call("GET", archive, headers={"Accept": "application/json"})).json()["url"]
    for url in (link, link[:-4]):
        await secret.call(api, "GET", url)
    await secret.call(
        api,
        "POST",
        "/api/v1/forward_backward",
        b"\x0a\x05" + text.encode(),
        **{"Content-Type": PROTOBUF},
    )


async def trouble(secret: Secret, api: Api, ids: dict[str, str]) -> None:
    """The store answers no HTTP, or refuses; Redis refuses the password."""
    asked = ["checkpoints", f"weights_info?{secret.plant()}", f"training_runs/{ids['run_id']}"]

    async def ask() -> None:
        await asyncio.gather(*(secret.call(api, "GET", f"/api/v1/{path}") for path in asked))

    for fault in ("no HTTP", "refused"):
        secret.proxy.fault = fault
        await ask()
    secret.proxy.fault = ""
    async with redis.Redis.from_url(secret.stack.config.redis_url) as client:
        await client.config_set("requirepass", "another")
        await client.client_kill_filter(_type="normal", skipme=True)
        await ask()
        await client.config_set("requirepass", ENVIRON["REDIS_PASSWORD"])


# --- where it could come out ----------------------------------------------------------------------


async def sinks(secret: Secret, api: Api) -> dict[str, str]:
    """Name -> all that is there."""
    found = {f"log of {path.stem}": path.read_text() for path in secret.stack.folder.glob("*.log")}
    for role, url in secret.stack.ops.items():
        async with api._http.get(f"{url}/metrics") as response:
            found[f"metrics of {role}"] = await response.text()
    while b"retrieve_future" not in b"".join(secret.collector.bodies):
        await asyncio.sleep(0.1)  # spans are sent once a second
    found["traces"] = b"".join(secret.collector.bodies).decode(errors="replace")
    found["errors"] = "\n".join(secret.errors)
    async with open_blobs(secret.stack.config) as blobs:
        names = [info.key async for info in blobs.list("t/") if "/audit/" in info.key]
        found["audit"] = "\n".join([(await blobs.get(name)).decode() for name in names])
    return found


async def stores(secret: Secret) -> dict[str, str]:
    """Everything in the bucket and in Redis."""
    async with open_blobs(secret.stack.config) as blobs:
        objects = []
        for top in TOPS:
            async for info in blobs.list(top):
                objects.append(info.key)
                objects.append((await blobs.get(info.key)).decode(errors="replace"))
    async with redis.Redis.from_url(secret.stack.config.redis_url) as client:
        dumped = [(key, await client.dump(key)) async for key in client.scan_iter(count=1000)]
    return {"bucket": "\n".join(objects), "Redis": str(dumped)}


def leaks(found: dict[str, str], secrets: set[str]) -> list[tuple[str, str]]:
    """(sink, what is around it) of each secret that came out."""
    return [
        (name, said[max(said.index(text) - 200, 0) :][:400])
        for name, said in found.items()
        for text in secrets
        if text in said
    ]


@pytest.mark.slow
async def test_no_secret_and_no_text_comes_out_anywhere(
    secret: Secret, http: aiohttp.ClientSession
) -> None:
    api = Api(http, secret.stack.url, secret.key)
    ids = await tenant_cases.one_of_each(api, ORG, secret.plant())
    await every_header(secret, api)
    await no_http(secret)
    await work(secret, api, ids)
    await trouble(secret, api, ids)
    await every_field(secret, api, ids)
    found = await sinks(secret, api)
    assert min(map(len, found.values())) > 100, {name: len(text) for name, text in found.items()}
    assert '"level": "debug"' in found["log of gateway"]
    assert not leaks(found, secret.secrets)
    for sink in ("errors", "audit"):  # these name what was wrong, or was changed, to its owner
        del found[sink]
    assert not leaks(found, set(secret.texts))
    kept = await stores(secret)
    assert not leaks(kept, secret.kept)
    assert not leaks({"engine": _environ_of_engine(secret.stack)}, set(ENVIRON.values()))
    assert not leaks({"repr": repr(secret.stack.config)}, set(ENVIRON.values()))
    assert secret.num_requests >= MIN_REQUESTS
    print(
        f"S17: {len(secret.secrets)} secrets and {len(secret.texts)} texts in "
        f"{secret.num_requests} requests, 0 in {len({**found, **kept}) + 3} sinks of "
        f"{sum(map(len, {**found, **kept}.values()))} characters"
    )


def _environ_of_engine(stack: GatewayStack) -> str:
    (trainer,) = [
        process
        for process in psutil.Process().children()
        if {"luthier_trainer", f"{stack.folder}/config.toml"} <= set(process.cmdline())
    ]
    (engine,) = trainer.children()
    return str(engine.environ())


# --- each guard taken out -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guard:
    """What stands in for a guard, and where a secret comes out then."""

    module: Any
    name: str
    instead: Any
    comes_out_in: str


def _without(name: str) -> dict[str, re.Pattern[str]]:
    return {other: made for other, made in redaction.PATTERNS.items() if other != name}


GUARDS = {
    **{name: Guard(redaction, "PATTERNS", _without(name), "errors") for name in redaction.PATTERNS},
    "redaction of logs": Guard(telemetry, "redact", str, "log"),
    "redaction of errors": Guard(web_io, "redact", str, "errors"),
    "redaction of OpenAI's errors": Guard(openai_errors, "redact", str, "errors of OpenAI"),
    "redaction of the audit log": Guard(audited, "redact", str, "audit"),
    "requests that are none": Guard(telemetry, "without_request", lambda record: True, "log"),
}


PROBED = "CanaryThatIsProbed"
PROBES = (
    *(f"tml-{PROBED}", f"hf_{PROBED}", f"redis://user:{PROBED}@host"),
    *(f"x?X-Amz-Signature={PROBED}", f"Bearer {PROBED}"),
)


@contextlib.asynccontextmanager
async def front(secret: Secret) -> AsyncIterator[tuple[str, io.StringIO]]:
    """URL and log of a gateway with a registry, in this process: a test can take out guards."""
    folder, root, log = secret.stack.folder, logging.getLogger(), io.StringIO()
    config = replace(secret.stack.config, registry_url=f"unix://{folder}/second.sock")
    before, root.handlers = root.handlers, []  # pytest's: setup_logging would close them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", log)
        telemetry.setup_logging("front", "debug")
    runner = web.AppRunner(registry_app.build_app(config, keeps_house=False))
    await runner.setup()
    try:
        await web.UnixSite(runner, f"{folder}/second.sock").start()
        async with TestServer(build_app(config)) as server:
            yield str(server.make_url("")).rstrip("/"), log
    finally:
        await runner.cleanup()
        root.handlers = before
        logging.getLogger("aiohttp.server").filters.clear()


async def probes(secret: Secret, http: aiohttp.ClientSession) -> dict[str, str]:
    """Sink -> what comes out of it, after requests each of which some guard is there for."""
    errors = []
    async with front(secret) as (url, log):
        api = Api(http, url, secret.spare)
        for text in PROBES:
            errors.append((await api.post("weights_info", {"tinker_path": text})).detail)
        name = quote(PROBES[0])
        await api.call("DELETE", f"training_runs/{name}/checkpoints/weights/{name}")
        openai = await api.post(f"{url}/v1/completions", {"model": PROBES[0], "prompt": "x"})
        await answers(url, f"GET / HTTP/1.1\r\nX-API-Key: a prompt, {PROBED}\x01\r\n\r\n")
        secret.proxy.fault = "no HTTP"
        await api.get(f"training_runs/{'0' * 32}:train:0")
        secret.proxy.fault = ""
        audit = (await api.get("audit")).body.decode()
    parts = {"errors": "\n".join(errors), "errors of OpenAI": openai.body.decode()}
    return {**parts, "log": log.getvalue(), "audit": audit}


async def test_with_all_guards_in_place_a_probe_finds_nothing(
    secret: Secret, http: aiohttp.ClientSession
) -> None:
    found = await probes(secret, http)
    assert not leaks(found, {PROBED, *secret.proxy.signatures})
    assert all(found.values())


@pytest.mark.parametrize("name", GUARDS)
async def test_without_any_one_guard_a_probe_finds_something(
    secret: Secret, http: aiohttp.ClientSession, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = GUARDS[name]
    monkeypatch.setattr(guard.module, guard.name, guard.instead)
    found = leaks(await probes(secret, http), {PROBED, *secret.proxy.signatures})
    assert guard.comes_out_in in {sink for sink, _ in found}
