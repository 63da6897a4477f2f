"""Requests as the SDK sends them, over bare HTTP, so that the client costs as little as it can."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import numpy as np

from log.rig import Rig, api_key
from luthier_core.proto import wire_pb2

PROTOBUF = "application/x-protobuf"
NUM_TOKENS = 16
FACTS = {
    "vocab_size": 1000,
    "max_context_tokens": 4096,
    "architecture": "toy",
    "tokenizer_id": "toy",
}
"""What the gateway checks requests against."""


def forward_backward(run_id: str, seq: int) -> bytes:
    """One datum of NUM_TOKENS tokens."""
    tokens = np.arange(10, 11 + NUM_TOKENS)
    text = wire_pb2.EncodedTextChunk(tokens=tokens[:-1].astype("<i4").tobytes())
    inputs = {
        "target_tokens": wire_pb2.Tensor(
            dense=tokens[1:].astype("<i8").tobytes(), dtype=wire_pb2.DTYPE_INT64
        ),
        "weights": wire_pb2.Tensor(
            dense=np.ones(NUM_TOKENS, "<f4").tobytes(), dtype=wire_pb2.DTYPE_FLOAT32
        ),
    }
    datum = wire_pb2.Datum(model_input=[wire_pb2.Chunk(encoded_text=text)], loss_fn_inputs=inputs)
    message = wire_pb2.ForwardBackwardRequest(
        model_id=run_id, seq_id=seq, data=[datum], loss_fn="cross_entropy"
    )
    encoded: bytes = message.SerializeToString()
    return encoded


@dataclass(slots=True)
class Run:
    """One training run of one tenant."""

    client: "Client"
    run_id: str
    next_seq: int = 1

    def take_seq(self) -> int:
        self.next_seq += 1
        return self.next_seq - 1

    async def send(self, seq: int, gateway: int = 0) -> int:
        """Post a forward_backward; the status."""
        return await self.client.post(
            gateway, "forward_backward", forward_backward(self.run_id, seq)
        )

    async def result(self, seq: int, gateway: int = 0) -> None:
        """Long-poll until the op has ended; RuntimeError unless it was completed."""
        await self.client.result(gateway, f"{self.run_id}:{seq}")

    async def op(self, post: int = 0, poll: int = 0) -> tuple[float, float]:
        """(until accepted, until delivered) in milliseconds, of one op through two gateways."""
        seq = self.take_seq()
        start = time.perf_counter()
        status = await self.send(seq, post)
        accepted = time.perf_counter()
        if status != 200:
            raise RuntimeError(f"forward_backward was answered with {status}")
        await self.result(seq, poll)
        delivered = time.perf_counter()
        return 1e3 * (accepted - start), 1e3 * (delivered - start)


@dataclass(slots=True)
class Client:
    """All gateways as one tenant sees them."""

    urls: list[str]
    http: aiohttp.ClientSession
    tenant: str
    refusals: dict[int, int] = field(default_factory=dict)
    """Status -> how many requests were refused with it; polls held open are none."""

    async def post(self, gateway: int, path: str, body: bytes) -> int:
        status, _ = await self._call(gateway, path, body, PROTOBUF)
        if status != 200:
            self.refusals[status] = self.refusals.get(status, 0) + 1
        return status

    async def post_json(self, path: str, value: dict[str, object]) -> dict[str, object]:
        status, body = await self._call(0, path, json.dumps(value).encode(), "application/json")
        if status != 200:
            raise RuntimeError(f"{path} was answered with {status}: {body!r}")
        answer: dict[str, object] = json.loads(body)
        return answer

    async def result(self, gateway: int, request_id: str) -> None:
        """As the SDK polls: again at once after 408, later after 429."""
        body = json.dumps({"request_id": request_id}).encode()
        while True:
            status, answer = await self._call(gateway, "retrieve_future", body, "application/json")
            if status == 200 and not answer.startswith(b'{"error"'):
                return
            if status == 429:
                self.refusals[status] = self.refusals.get(status, 0) + 1
                await asyncio.sleep(1.0)
            elif status != 408:
                raise RuntimeError(f"{request_id}: {status} {answer[:300]!r}")

    async def session(self) -> str:
        answer = await self.post_json("create_session", {"tags": [], "sdk_version": "0.38.0"})
        return str(answer["session_id"])

    async def run(self, model: str, session_id: str | None = None, index: int = 0) -> Run:
        """A run that has been created."""
        wanted = {
            "session_id": session_id or await self.session(),
            "model_seq_id": index,
            "base_model": model,
            "lora_config": {"rank": 4, "seed": 1},
        }
        answer = await self.post_json("create_model", wanted)
        run = Run(self, str(answer["model_id"]))
        await run.result(0)
        return run

    async def _call(
        self, gateway: int, path: str, body: bytes, content_type: str
    ) -> tuple[int, bytes]:
        headers = {
            "X-API-Key": api_key(self.tenant),
            "Content-Type": content_type,
            "Accept": PROTOBUF,
        }
        url = f"{self.urls[gateway % len(self.urls)]}/api/v1/{path}"
        async with self.http.post(url, data=body, headers=headers) as response:
            return response.status, await response.read()


def open_client(rig: Rig, tenant: str = "ann") -> contextlib.AbstractAsyncContextManager[Client]:
    return open_gateways(rig.urls, tenant)


@contextlib.asynccontextmanager
async def open_gateways(urls: list[str], tenant: str) -> AsyncIterator[Client]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        yield Client(urls, http, tenant)
