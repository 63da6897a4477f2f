"""What every object store promises; and for each store how it survives its own kind of trouble."""

import asyncio
import errno
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import ClientSession, web
from tests.stores.kinds import Store

from luthier_core import service
from luthier_core.blobs import PIECE_BYTES, BlobInfo, BlobMissing, Blobs, open_blobs
from luthier_core.config import Config, ModelConfig
from luthier_core.disk_blobs import DiskBlobs
from luthier_core.errors import ConfigError, LuthierError, Unavailable
from luthier_core.s3_blobs import S3Blobs
from luthier_core.store_probe import broken_promises, check_store

KEY = "t/ann/runs/0f3a:train:0/run.json"


async def test_what_was_put_is_read_back_and_replaced(blobs: Blobs) -> None:
    for data in (b"first", b"", os.urandom(3 * 1024 * 1024)):
        etag = await blobs.put(KEY, data)
        assert await blobs.get_with_etag(KEY) == (data, etag)
        assert await blobs.get(KEY) == data
        assert await blobs.head(KEY) == BlobInfo(KEY, len(data), etag)


async def test_a_missing_object_has_no_head_and_cannot_be_read(blobs: Blobs) -> None:
    assert await blobs.head(KEY) is None
    with pytest.raises(BlobMissing):
        await blobs.get(KEY)
    with pytest.raises(BlobMissing):
        await blobs.get_with_etag(KEY)


async def test_an_object_is_read_and_written_in_pieces(blobs: Blobs) -> None:
    data = os.urandom(3 * PIECE_BYTES // 2)

    async def pieces() -> AsyncIterator[bytes]:
        yield data[:1000]
        yield data[1000:]

    await blobs.put(KEY, b"first")
    await blobs.put_stream(KEY, pieces, len(data))
    assert await blobs.get(KEY) == data
    assert await blobs.size(KEY) == len(data)
    read = [piece async for piece in blobs.stream(KEY)]
    assert b"".join(read) == data
    assert max(map(len, read)) <= PIECE_BYTES


async def test_a_stream_that_breaks_off_stores_nothing(blobs: Blobs) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"begun"
        raise LuthierError("the source is gone")

    await blobs.put(KEY, b"first")
    with pytest.raises(LuthierError, match="the source is gone"):
        await blobs.put_stream(KEY, pieces, 100)
    assert await blobs.get(KEY) == b"first"
    assert [info.key async for info in blobs.list("")] == [KEY]


async def test_a_missing_object_has_no_size_and_no_stream(blobs: Blobs) -> None:
    assert await blobs.size(KEY) is None
    with pytest.raises(BlobMissing):
        await anext(blobs.stream(KEY))


async def test_create_if_absent_keeps_the_first(blobs: Blobs) -> None:
    assert await blobs.put_if_absent(KEY, b"first")
    assert not await blobs.put_if_absent(KEY, b"second")
    assert await blobs.get(KEY) == b"first"


async def test_of_many_creators_one_wins(blobs: Blobs) -> None:
    won = await asyncio.gather(*(blobs.put_if_absent(KEY, b"%d" % i) for i in range(16)))
    assert won.count(True) == 1
    assert await blobs.get(KEY) == b"%d" % won.index(True)


NUM_RACERS = 4
RACES_AT_ONCE = 32


async def won_races(num_races: int, race: Callable[[int], Awaitable[Sequence[bool]]]) -> list[int]:
    """How many have won each race."""
    room = asyncio.Semaphore(RACES_AT_ONCE)

    async def one(number: int) -> int:
        async with room:
            return list(await race(number)).count(True)

    return await asyncio.gather(*(one(number) for number in range(num_races)))


async def test_of_the_creators_in_each_of_many_races_one_wins(
    blobs: Blobs, pytestconfig: pytest.Config
) -> None:
    num_races: int = pytestconfig.getoption("races")

    async def race(number: int) -> Sequence[bool]:
        key = f"races/{number}"
        won = await asyncio.gather(
            *(blobs.put_if_absent(key, b"%d" % racer) for racer in range(NUM_RACERS))
        )
        assert await blobs.get(key) == b"%d" % won.index(True)
        return won

    assert await won_races(num_races, race) == [1] * num_races


async def test_of_the_swappers_in_each_of_many_races_one_wins(
    blobs: Blobs, pytestconfig: pytest.Config
) -> None:
    num_races: int = pytestconfig.getoption("races")

    async def race(number: int) -> Sequence[bool]:
        key = f"races/{number}"
        first = await blobs.put(key, b"first")
        etags = await asyncio.gather(
            *(blobs.put_if_match(key, b"%d" % racer, first) for racer in range(NUM_RACERS))
        )
        won = [etag is not None for etag in etags]
        assert await blobs.get_with_etag(key) == (b"%d" % won.index(True), etags[won.index(True)])
        return won

    assert await won_races(num_races, race) == [1] * num_races


async def test_a_swap_needs_the_current_etag(blobs: Blobs) -> None:
    first = await blobs.put(KEY, b"first")
    second = await blobs.put_if_match(KEY, b"second", first)
    assert second is not None
    assert second != first
    assert await blobs.put_if_match(KEY, b"third", first) is None
    assert await blobs.get_with_etag(KEY) == (b"second", second)


async def test_a_swap_of_a_missing_object_fails(blobs: Blobs) -> None:
    etag = await blobs.put(KEY, b"first")
    await blobs.delete(KEY)
    assert await blobs.put_if_match(KEY, b"second", etag) is None
    assert await blobs.head(KEY) is None


async def test_no_increment_is_lost_among_swappers(blobs: Blobs) -> None:
    await blobs.put(KEY, b"0")

    async def increment() -> None:
        while True:
            value, etag = await blobs.get_with_etag(KEY)
            if await blobs.put_if_match(KEY, b"%d" % (int(value) + 1), etag):
                return

    await asyncio.gather(*(increment() for _ in range(12)))
    assert await blobs.get(KEY) == b"12"


async def test_a_deleted_object_is_gone_and_deleting_again_is_no_error(blobs: Blobs) -> None:
    await blobs.put(KEY, b"x")
    await blobs.delete(KEY)
    await blobs.delete(KEY)
    assert await blobs.head(KEY) is None


async def test_a_listing_has_every_key_of_the_prefix_in_order(blobs: Blobs) -> None:
    for key in ("t/a/x", "t/a/y/2", "t/a/y/10", "t/a/y-b", "t/ab/x", "keys/a=b+c.json"):
        await blobs.put(key, key.encode())

    async def keys(prefix: str) -> list[str]:
        return [info.key async for info in blobs.list(prefix)]

    assert await keys("t/a/") == ["t/a/x", "t/a/y-b", "t/a/y/10", "t/a/y/2"]
    assert await keys("t/a/y/1") == ["t/a/y/10"]
    assert await keys("none/") == []
    assert [info async for info in blobs.list("keys/")] == [BlobInfo("keys/a=b+c.json", 15)]
    assert len(await keys("")) == 6


@pytest.mark.parametrize(
    "key",
    [
        *(
            "",
            "/etc/passwd",
            "t/../x",
            "t/./x",
            "t//x",
            "t/",
            "a\0b",
            "a b",
            "a\\b",
            "é",
            "x" * 256,
        ),
        *("%2e%2e/x", "t/a?b", "t/a#b", "/".join(["x" * 200] * 6)),
    ],
)
async def test_a_key_that_could_leave_its_folder_is_refused(blobs: Blobs, key: str) -> None:
    for call in (blobs.get, blobs.head, blobs.delete, blobs.get_with_etag):
        with pytest.raises(ValueError, match="not an object key"):
            await call(key)
    for write in (blobs.put, blobs.put_if_absent):
        with pytest.raises(ValueError, match="not an object key"):
            await write(key, b"")
    with pytest.raises(ValueError, match="not an object key"):
        blobs.signed_url(key, 60)


async def test_a_signed_url_names_the_object_and_its_end(blobs: Blobs) -> None:
    await blobs.put(KEY, b"content")
    url = blobs.signed_url(KEY, 60)
    query = parse_qs(urlsplit(url).query)
    if isinstance(blobs, DiskBlobs):
        (expires,), (signature,) = query["expires"], query["signature"]
        assert urlsplit(url).path.startswith("/api/v1/files/t/ann/")
        assert blobs.signature_is_valid(KEY, int(expires), signature)
        assert not blobs.signature_is_valid(KEY + "x", int(expires), signature)
        assert not blobs.signature_is_valid(KEY, int(expires) + 1, signature)
        assert not blobs.signature_is_valid(KEY, int(expires), "é")
    else:
        assert query["X-Amz-Expires"] == ["60"]
        async with ClientSession() as http, http.get(url) as response:
            assert await response.read() == b"content"
            assert response.headers["Content-Disposition"] == "attachment"


class Forgetful:
    """A store that ignores conditions and checksums, or some of them."""

    def __init__(self, real: Blobs, *ignored: str) -> None:
        self._real, self._ignored = real, ignored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def put_if_absent(self, key: str, data: bytes) -> bool:
        if "absent" in self._ignored:
            await self._real.put(key, data)
            return True
        return await self._real.put_if_absent(key, data)

    async def put_if_match(self, key: str, data: bytes, etag: str) -> str | None:
        if "match" in self._ignored:
            return await self._real.put(key, data)
        return await self._real.put_if_match(key, data, etag)

    async def refuses_damaged(self, key: str) -> bool:
        return "checksum" not in self._ignored and await self._real.refuses_damaged(key)


async def test_the_probe_finds_what_a_store_does_not_keep_and_leaves_it_as_it_was(
    blobs: Blobs, store: Store
) -> None:
    known = {"moto": ["a damaged upload is stored"]}
    assert await broken_promises(blobs) == known.get(store.kind, [])
    assert [info.key async for info in blobs.list("")] == []


@pytest.mark.parametrize(
    ("ignored", "says"),
    [
        (("absent",), "create-if-absent replaces"),
        (("match",), "a write under an old ETag"),
        (("checksum",), "a damaged upload is stored"),
    ],
)
async def test_a_store_that_cannot_fence_is_refused_to_several_trainers(
    tmp_path: Path, ignored: tuple[str, ...], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    store: Any = Forgetful(DiskBlobs(tmp_path, "", b""), *ignored)
    alone = replace(config(tmp_path, "x"), models=(ModelConfig(name="m", path="/m"),))
    await check_store(store, alone)
    assert says in caplog.text
    shared = replace(alone, models=(ModelConfig(name="m", path="/m", num_trainers=2),))
    with pytest.raises(ConfigError, match=says):
        await check_store(store, shared)


async def test_a_worker_that_starts_waits_for_a_store_that_is_away_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "CONFIRM_S", 0.0)
    store, wanted = DiskBlobs(tmp_path, "", b""), config(tmp_path, "x")
    whole, refusals = store.put_if_absent, iter([Unavailable("the store")])

    async def away_once(key: str, data: bytes) -> bool:
        for refusal in refusals:
            raise refusal
        return await whole(key, data)

    monkeypatch.setattr(store, "put_if_absent", away_once)
    await service._check_store(store, wanted, asyncio.Event())
    assert list(refusals) == []
    refusals = iter(lambda: Unavailable("the store"), None)
    monkeypatch.setattr(service, "STORE_START_S", 0.0)
    with pytest.raises(ConfigError, match="no answer for"):
        await service._check_store(store, wanted, asyncio.Event())


# --- disk -----------------------------------------------------------------------------------------


async def test_a_signed_url_of_the_disk_store_runs_out(tmp_path: Path) -> None:
    now = 1000.0
    store = DiskBlobs(tmp_path, "http://gateway", b"secret", clock=lambda: now)
    signature = parse_qs(urlsplit(store.signed_url(KEY, 60)).query)["signature"][0]
    assert store.signature_is_valid(KEY, 1060, signature)
    now = 1060.0
    assert not store.signature_is_valid(KEY, 1060, signature)


_INCREMENT = """
import asyncio, sys
from pathlib import Path
from luthier_core.disk_blobs import DiskBlobs
async def main():
    store = DiskBlobs(Path(sys.argv[1]), "", b"")
    for _ in range(20):
        while True:
            value, etag = await store.get_with_etag("n")
            if await store.put_if_match("n", b"%d" % (int(value) + 1), etag):
                break
asyncio.run(main())
"""


async def test_swappers_in_several_processes_lose_no_increment(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path, "", b"")
    await store.put("n", b"0")
    command = [sys.executable, "-c", _INCREMENT, str(tmp_path)]
    running = [await asyncio.create_subprocess_exec(*command) for _ in range(3)]
    assert [await process.wait() for process in running] == [0, 0, 0]
    assert await store.get("n") == b"60"


async def test_opening_removes_what_a_dead_writer_left_a_day_ago(tmp_path: Path) -> None:
    DiskBlobs(tmp_path, "", b"")
    old, fresh = tmp_path / "tmp" / "old", tmp_path / "tmp" / "fresh"
    old.touch()
    fresh.touch()
    os.utime(old, (1.0, 1.0))
    DiskBlobs(tmp_path, "", b"")
    assert list((tmp_path / "tmp").iterdir()) == [fresh]


# --- S3 -------------------------------------------------------------------------------------------


class FlakyStore:
    """In front of a real S3 server: answers the next requests itself, or loses the real answer."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self.faults: list[int | str] = []
        self.num_requests = 0

    async def handle(self, request: web.Request) -> web.Response:
        self.num_requests += 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return web.Response(status=fault)
        async with (
            ClientSession(auto_decompress=False) as http,
            http.request(
                request.method,
                request.url.with_host(self._endpoint.split(":")[0]).with_port(
                    int(self._endpoint.split(":")[1])
                ),
                headers=request.headers,
                data=await request.read() or None,
            ) as answer,
        ):
            body = await answer.read()
        if fault == "lost":
            assert request.transport is not None
            request.transport.close()
        headers = {name: answer.headers.get(name, "") for name in ("ETag", "Content-Type")}
        return web.Response(status=answer.status, body=body, headers=headers)


def _impatient(endpoint: str, **options: float) -> S3Blobs:
    """A store there, which tries again without a pause."""
    return S3Blobs(
        endpoint,
        "luthier",
        access_key="key",
        secret_key="secret",
        secure=False,
        region="us-east-1",
        retry_base_s=0.0,
        **options,
    )


@pytest.fixture
async def flaky(s3_endpoint: str) -> AsyncIterator[tuple[FlakyStore, S3Blobs]]:
    front = FlakyStore(s3_endpoint)
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", front.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    async with _impatient(f"127.0.0.1:{port}") as store:
        yield front, store
        front.faults.clear()
        await store.delete(KEY)
    await runner.cleanup()


@pytest.mark.s3
@pytest.mark.parametrize("fault", [500, 503, 429, 409, "lost"])
async def test_a_store_in_trouble_is_asked_again(
    flaky: tuple[FlakyStore, S3Blobs], fault: int | str
) -> None:
    front, store = flaky
    front.faults = [fault, fault]
    await store.put(KEY, b"content")
    front.faults = [fault]
    assert await store.get(KEY) == b"content"


@pytest.mark.s3
async def test_a_store_that_stays_away_is_reported_after_eight_tries(
    flaky: tuple[FlakyStore, S3Blobs],
) -> None:
    front, store = flaky
    front.faults = [503] * 100
    with pytest.raises(Unavailable):
        await store.get(KEY)
    assert front.num_requests == 8


async def _list(store: S3Blobs) -> None:
    async for _ in store.list("t/ann/"):
        pass


@pytest.mark.parametrize(
    "call", [lambda store: store.get(KEY), _list], ids=["one object", "a list"]
)
async def test_a_store_that_never_answers_is_reported(
    call: Callable[[S3Blobs], Awaitable[object]],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # which takes nobody in
        host, port = server.getsockname()
        async with _impatient(f"{host}:{port}", answer_s=0.05) as store:
            with pytest.raises(Unavailable):
                await call(store)


@pytest.mark.s3
async def test_a_refusal_is_not_asked_again(flaky: tuple[FlakyStore, S3Blobs]) -> None:
    front, store = flaky
    front.faults = [403]
    with pytest.raises(Unavailable):
        await store.get(KEY)
    assert front.num_requests == 1


@pytest.mark.s3
async def test_a_conditional_write_whose_answer_was_lost_still_counts_as_won(
    flaky: tuple[FlakyStore, S3Blobs],
) -> None:
    front, store = flaky
    front.faults = ["lost"]
    assert await store.put_if_absent(KEY, b"first")
    _, etag = await store.get_with_etag(KEY)
    front.faults = ["lost"]
    assert await store.put_if_match(KEY, b"second", etag) is not None
    front.faults = ["lost"]
    assert not await store.put_if_absent(KEY, b"third")
    assert await store.get(KEY) == b"second"


@pytest.mark.s3
@pytest.mark.parametrize("fault", [409, 500])
async def test_a_writer_that_was_told_to_try_again_has_not_written_what_another_wrote(
    flaky: tuple[FlakyStore, S3Blobs], fault: int
) -> None:
    front, store = flaky
    first = await store.put(KEY, b"0")
    assert await store.put_if_match(KEY, b"1", first) is not None
    front.faults = [fault]  # another conditional write at this moment: ours was not carried out
    assert await store.put_if_match(KEY, b"1", first) is None
    await store.delete(KEY)
    assert await store.put_if_absent(KEY, b"1")
    front.faults = [fault]
    assert not await store.put_if_absent(KEY, b"1")


# --- choosing -------------------------------------------------------------------------------------


def config(tmp_path: Path, store_url: str, *, access_key: str = "") -> Config:
    (tmp_path / "secret").write_text("00" * 32)
    return Config(
        redis_url="",
        store_url=store_url,
        registry_url="",
        secret_file=str(tmp_path / "secret"),
        s3_access_key=access_key,
        s3_secret_key=access_key,
    )


async def test_the_url_of_the_store_chooses_disk(tmp_path: Path) -> None:
    async with open_blobs(config(tmp_path, f"file://{tmp_path}/store")) as store:
        await store.put(KEY, b"x")
        assert store.signed_url(KEY, 60).startswith("/api/v1/files/t/")


@pytest.mark.s3
async def test_the_url_of_the_store_chooses_s3(tmp_path: Path, s3_endpoint: str) -> None:
    url = f"s3+http://{s3_endpoint}/luthier?region=us-east-1"
    async with open_blobs(config(tmp_path, url, access_key="key")) as store:
        await store.put(KEY, b"x")
        assert await store.get(KEY) == b"x"
        await store.delete(KEY)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file://relative/folder", "file:///absolute/folder"),
        ("s3+http://host:1/", "s3[+]http://host:port/bucket"),
        ("s3+http://host:1/bucket", "AWS_ACCESS_KEY_ID"),
        ("ftp://host/x", "file, s3[+]http or s3[+]https"),
    ],
)
async def test_a_wrong_store_url_is_refused_with_what_is_right(
    tmp_path: Path, url: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        async with open_blobs(config(tmp_path, url)):
            pass


async def test_a_disk_that_is_full_is_an_outage_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    blobs = DiskBlobs(tmp_path, "", b"secret")
    etag = await blobs.put(KEY, b"first")

    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_room)
        for write in (
            lambda: blobs.put(KEY, b"second"),
            lambda: blobs.put_if_absent(f"{KEY}.new", b"second"),
            lambda: blobs.put_if_match(KEY, b"second", etag),
        ):
            with pytest.raises(Unavailable, match="full"):
                await write()
    assert await blobs.get(KEY) == b"first"
    assert [info.key async for info in blobs.list("")] == [KEY]
    assert list((tmp_path / "tmp").iterdir()) == []
