"""A server that accepts everything and has every result at once: what the SDK and HTTP cost alone.

Prints its URL on the first line of standard output. For bench_gateway.py.
"""

import asyncio
import itertools
import socket

import numpy as np
import uvloop
from aiohttp import web

from luthier_core.proto import wire_pb2 as wire

NUM_TOKENS = 16
_ids = itertools.count()


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


RESULT = forward_backward_result()
SYNC = {
    "client/config": {},
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
    if path != "retrieve_future":
        return web.json_response({"request_id": f"r{next(_ids)}", "model_id": "s:train:0"})
    kind = request.headers["X-Tinker-Request-Type"]
    if kind == "ForwardBackward":
        return web.Response(body=RESULT, content_type="application/x-protobuf")
    result = {"model_id": "s:train:0"} if kind == "CreateModel" else {"metrics": {}}
    return web.json_response(result)


async def main() -> None:
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/api/v1/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener).start()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
