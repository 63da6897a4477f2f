"""A proxy that loses, delays, refuses and cuts short what goes through it."""

import asyncio
import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import aiohttp
from aiohttp import web

FAULTS: dict[str, Sequence[str]] = {
    "bad": (
        *("", "drop the request", "", "429", "drop the answer", "", "503"),
        *("cut the answer", "", "late", "408 without a word"),
    ),
    "slow": ("late",),
    "a storm of 429": ("429", "429", "429", ""),
}
"""Network -> what happens to each request in turn; empty: nothing."""
HOP_BY_HOP = {"host", "content-length", "transfer-encoding", "connection", "content-encoding"}


class FaultyProxy:
    """Forwards to `target`, with a fault for most requests; `seen` counts what it has done."""

    def __init__(self, target: str, faults: Sequence[str]) -> None:
        self.seen: Counter[str] = Counter()
        self.url = ""
        self._target = target
        self._faults = itertools.cycle(faults)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        fault = next(self._faults)
        self.seen[fault] += 1
        match fault:
            case "drop the request":
                return self._hang_up(request)
            case "429":
                return web.json_response({"detail": "full"}, status=429, headers=SOON)
            case "503":
                return web.json_response({"detail": "starting"}, status=503, headers=SOON)
            case "408 without a word":
                return web.Response(status=408)
            case "late":
                await asyncio.sleep(0.1)
        answer = await self._forward(request)
        if fault == "drop the answer":
            return self._hang_up(request)
        if fault == "cut the answer":
            response = web.StreamResponse(headers={"Content-Length": "100000"})
            await response.prepare(request)
            await response.write(b"{")
            return self._hang_up(request)
        return answer

    async def _forward(self, request: web.Request) -> web.Response:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP}
        async with (
            aiohttp.ClientSession() as http,
            http.request(
                request.method,
                self._target + request.path_qs,
                data=await request.read(),
                headers=headers,
            ) as answer,
        ):
            body = await answer.read()
            # The length of what a HEAD is about is all there is of it.
            dropped = HOP_BY_HOP - ({"content-length"} if request.method == "HEAD" else set())
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in dropped}
            return web.Response(status=answer.status, body=body, headers=kept)

    def _hang_up(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()


SOON = {"Retry-After": "0.05"}


@contextlib.contextmanager
def running_proxy(proxy: FaultyProxy) -> Iterator[FaultyProxy]:
    """The proxy on a thread of its own."""
    ready = threading.Event()
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        stop.append(lambda: loop.call_soon_threadsafe(stopped.set))
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", proxy.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        proxy.url = "http://{}:{}".format(*runner.addresses[0][:2])
        ready.set()
        await stopped.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    try:
        yield proxy
    finally:
        stop[0]()
        thread.join()
