"""Forward and backward passes of a training run: one call is one request or more."""

import asyncio
import sys
from collections.abc import Sequence
from functools import partial

from luthier import custom_loss, types, wire
from luthier.custom_loss import CustomLossFn
from luthier.run_requests import Outgoing, RunRequests, all_of
from luthier.session import Session
from luthier.transport import PROTOBUF
from luthier_core.proto import wire_pb2

ZSTD_LEVEL = 3
INLINE_BYTES = 64 * 1024
"""Smaller bodies are compressed at once: that takes less time than a thread takes to begin."""


class Passes:
    """Sends the data of forward_backward and its kin, and puts the results together."""

    def __init__(self, session: Session, requests: RunRequests) -> None:
        self._session = session
        self._requests = requests

    async def run(
        self,
        call: int,
        encoded: Sequence[wire_pb2.Datum],
        request: wire_pb2.ForwardBackwardRequest,
    ) -> types.ForwardBackwardOutput:
        """One pass over the data, in the turn of `call`."""
        sent = await self._requests.in_turn(call, partial(self._send, encoded, request))
        return await self._output(sent, request)

    async def run_custom(
        self, call: int, data: list[types.Datum], loss_fn: CustomLossFn
    ) -> types.ForwardBackwardOutput:
        """Forward, the caller's loss, backward through a surrogate; nothing comes in between."""
        backward = wire.loss_request("cross_entropy", None, forward_only=False)

        async def passes() -> tuple[list[asyncio.Task[str]], float, dict[str, float]]:
            # An optimizer step that was called before a failure is known must not be taken.
            async with self._requests.refusing_on_error():
                forward = wire.loss_request("cross_entropy", None, forward_only=True)
                scored = [wire.encode_datum(datum) for datum in custom_loss.scored(data)]
                output = await self._output(await self._send(scored, forward), forward)
                loss, metrics, weighted = await asyncio.to_thread(
                    custom_loss.linearised, data, output, loss_fn
                )
                surrogate = [wire.encode_datum(datum) for datum in weighted]
                sent = await self._send(surrogate, backward)
                await all_of(asyncio.shield(task) for task in sent)
            return sent, loss, metrics

        sent, loss, metrics = await self._requests.in_turn(call, passes)
        output = await self._output(sent, backward)
        surrogate_loss = output.metrics["loss:sum"]
        metrics = {**output.metrics, "surrogate_loss:sum": surrogate_loss, **metrics}
        return types.ForwardBackwardOutput(
            output.loss_fn_output_type, output.loss_fn_outputs, {**metrics, "loss:sum": loss}
        )

    async def _send(
        self, encoded: Sequence[wire_pb2.Datum], request: wire_pb2.ForwardBackwardRequest
    ) -> list[asyncio.Task[str]]:
        config = await self._session.config()
        chunks = wire.split(
            encoded,
            request,
            max_datums=config.fwdbwd_max_chunk_len,
            max_bytes=config.fwdbwd_max_chunk_bytes_count,
        )
        compress = config.proto_compress_fwdbwd
        return await self._requests.send([partial(_encode, chunk, compress) for chunk in chunks])

    async def _output(
        self, sent: Sequence[asyncio.Task[str]], request: wire_pb2.ForwardBackwardRequest
    ) -> types.ForwardBackwardOutput:
        request_ids = await all_of(asyncio.shield(task) for task in sent)
        kind = "Forward" if request.forward_only else "ForwardBackward"
        results = await all_of(
            self._requests.result(request_id, kind, protobuf=True) for request_id in request_ids
        )
        return wire.combine([wire.decode_forward_backward(result.body) for result in results])


async def _encode(
    chunk: wire_pb2.ForwardBackwardRequest, compress: bool, model_id: str, seq: int
) -> Outgoing:
    chunk.model_id, chunk.seq_id = model_id, seq
    body, headers = chunk.SerializeToString(), {"Content-Type": PROTOBUF}
    if compress:
        headers["Content-Encoding"] = "zstd"
        body = _zstd(body) if len(body) < INLINE_BYTES else await asyncio.to_thread(_zstd, body)
    return Outgoing("forward_backward", body, headers)


def _zstd(body: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return bytes(zstd.compress(body, ZSTD_LEVEL))
