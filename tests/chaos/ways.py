"""What lies between the parts: two gateways behind one address, and a store that can be hurt."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from yarl import URL

HOP_BY_HOP = {"host", "content-length", "transfer-encoding", "connection", "content-encoding"}


@contextlib.asynccontextmanager
async def balanced(urls: Sequence[str]) -> AsyncIterator[str]:
    """One URL; each connection goes to the next of `urls` that takes it."""
    turns = itertools.cycle(range(len(urls)))
    open_ways: set[asyncio.Task[None]] = set()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_ways.add(task)
        try:
            first = next(turns)
            for url in (*urls[first:], *urls[:first]):
                host, port = str(urlsplit(url).hostname), urlsplit(url).port
                with contextlib.suppress(OSError):
                    await _join(reader, writer, *await asyncio.open_connection(host, port))
                    return
        except asyncio.CancelledError:
            pass  # the end of the block below; the stream server would log it
        finally:
            writer.close()
            open_ways.discard(task)

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield "http://{}:{}".format(*server.sockets[0].getsockname()[:2])
    finally:
        server.close()
        for task in open_ways:
            task.cancel()
        await asyncio.gather(*open_ways, return_exceptions=True)


async def _join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
) -> None:
    """Returns once either end is closed."""
    tasks = [
        asyncio.create_task(_pump(reader, far_writer)),
        asyncio.create_task(_pump(far_reader, writer)),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        far_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


class StoreProxy:
    """In front of an S3 server: conditional writes one at a time, and trouble when it is ordered.

    The server behind honours conditions, but two of its threads could both win.
    """

    def __init__(self, target: str) -> None:
        self.url = ""
        self.is_down = False
        self.delay_s = 0.0
        self.num_to_lose = 0
        """So many of the next writes are carried out, and their answers lost."""
        self._target = target
        self._one_at_a_time = asyncio.Lock()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if self.is_down:
            return self._hang_up(request)
        await asyncio.sleep(self.delay_s)
        conditional = {"If-Match", "If-None-Match"} & set(request.headers)
        async with self._one_at_a_time if conditional else contextlib.nullcontext():
            answer = await self._forward(request, body)
        if request.method == "PUT" and self.num_to_lose:
            self.num_to_lose -= 1
            return self._hang_up(request)
        return answer

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP}
        url = URL(self._target + request.raw_path, encoded=True)
        async with self._http.request(request.method, url, data=body, headers=headers) as answer:
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP}
            content = await answer.read()
            if request.method == "HEAD":
                kept["Content-Length"] = answer.headers.get("Content-Length", "0")
            return web.Response(body=content, status=answer.status, headers=kept)

    def _hang_up(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        app = web.Application(client_max_size=2**28)
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        async with aiohttp.ClientSession(auto_decompress=False) as self._http:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = "{}:{}".format(*runner.addresses[0][:2])
            try:
                yield
            finally:
                await runner.cleanup()
