"""A server that accepts everything and has every result at once: what the SDK and HTTP cost alone.

Prints its URL on the first line of standard output. For bench_gateway.py and bench_sdk.py.
`GET /arrivals` tells when training requests came: `[seconds]`, and forgets them.
"""

import asyncio
import contextlib
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import uvloop
from aiohttp import web

from luthier_core.proto import wire_pb2 as wire

NUM_TOKENS = 16
POLL_S = 30.0
_ids = itertools.count()
_arrivals: list[float] = []
_completed: list[dict[str, str]] = []
_news = asyncio.Event()


def forward_backward_result() -> bytes:
    logprobs = wire.BatchedTensor(
        data=np.zeros(NUM_TOKENS, "<f4").tobytes(),
        offsets=np.array([0, 4 * NUM_TOKENS], "<i8").tobytes(),
        dtype=wire.DTYPE_FLOAT32,
    )
    output = wire.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=[wire.ArrayRecord(num_datums=1, fields={"logprobs": logprobs})],
        metrics={"loss:sum": 1.0, "clock_cycle:unique": 1.0},
    )
    encoded: bytes = output.SerializeToString()
    return encoded


def sample_result() -> bytes:
    sequence = wire.SampledSequence(
        stop_reason=wire.STOP_REASON_LENGTH,
        tokens=np.zeros(NUM_TOKENS, "<i4").tobytes(),
        logprobs=np.zeros(NUM_TOKENS, "<f4").tobytes(),
    )
    encoded: bytes = wire.SampleResponse(sequences=[sequence]).SerializeToString()
    return encoded


PROTOBUF = {
    "Forward": forward_backward_result(),
    "ForwardBackward": forward_backward_result(),
    "Sample": sample_result(),
}
SYNC = {
    "client/config": {"sample_use_retrieve_futures": True},
    "client/dynamic_config": {},
    "create_session": {"session_id": "s"},
    "session_heartbeat": {},
    "telemetry": {"status": "accepted"},
    "get_server_capabilities": {"supported_models": [{"model_name": "stub"}]},
    "get_info": {"model_data": {"model_name": "stub"}, "model_id": "s:train:0"},
}


async def answer(request: web.Request) -> web.Response:
    await request.read()
    path = request.match_info["path"]
    if path in SYNC:
        return web.json_response(SYNC[path])
    match path:
        case "retrieve_future":
            return result(request.headers["X-Tinker-Request-Type"])
        case "retrieve_futures":
            return await completions(await request.json())
        case "asample":
            return accepted_sample()
        case "save_weights_for_sampler" | "create_sampling_session":
            ids = {"sampling_session_id": "s:sample:0"}
        case _:
            ids = {"model_id": "s:train:0"}
    _arrivals.append(time.monotonic())
    return web.json_response({"request_id": f"r{next(_ids)}", **ids})


def result(kind: str) -> web.Response:
    if kind in PROTOBUF:
        return web.Response(body=PROTOBUF[kind], content_type="application/x-protobuf")
    ids = {"model_id": "s:train:0", "sampling_session_id": "s:sample:0", "path": None}
    return web.json_response({**ids, "metrics": {}})


def accepted_sample() -> web.Response:
    request_id = f"r{next(_ids)}"
    _completed.append({"state": "finished", "request_id": request_id})
    _news.set()
    return web.json_response({"request_id": request_id, "sample_sequence_ids": [f"{request_id}:0"]})


async def completions(body: dict[str, Any]) -> web.Response:
    """What has completed after the cursor; waits for something unless it is an acknowledgement."""
    cursor = body["prev_cursor"]
    if len(_completed) <= cursor and (timeout_s := body.get("timeout", POLL_S)):
        _news.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_news.wait(), timeout_s)
    found = _completed[cursor:]
    return web.json_response({"cursor": cursor + len(found), "completions": found})


async def arrivals(request: web.Request) -> web.Response:
    times = list(_arrivals)
    _arrivals.clear()
    return web.json_response(times)


@contextlib.contextmanager
def running_stub() -> Iterator[str]:
    """URL of a server that knows every result before it is asked."""
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().decode().strip()
        finally:
            process.terminate()


async def main() -> None:
    app = web.Application(client_max_size=2**26)
    app.router.add_get("/arrivals", arrivals)
    app.router.add_route("*", "/api/v1/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener).start()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
