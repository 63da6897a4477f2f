"""TrainingClient: forward, backward and optimizer steps of one training run, in call order."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from pydantic import BaseModel

from luthier import custom_loss, types, wire
from luthier._loop import handle_of, operation, value_of, waited
from luthier.custom_loss import CustomLossFn
from luthier.errors import LuthierError, RequestFailedError
from luthier.future import APIFuture, Opening
from luthier.polling import retrieve
from luthier.sampling import SamplerIds, SamplingClient
from luthier.session import Session
from luthier.tokenizer import load_tokenizer
from luthier.transport import PROTOBUF, Response
from luthier_core.proto import wire_pb2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
Chunks = list[wire_pb2.ForwardBackwardRequest]

MAX_POLLS = 8
"""Results of one run waited for at once. They come in order, so more would only wait longer."""
MAX_CHUNKS_SENDING = 8
ZSTD_LEVEL = 3


@dataclass(frozen=True, slots=True)
class RunIds:
    """What names a training run on the server."""

    model_id: str
    info: types.GetInfoResponse


class TrainingClient(Opening):
    """One training run. From ServiceClient.create_lora_training_client and its kin.

    Requests are executed in the order of the calls. Send the next before you wait for the last:

        gradient = training.forward_backward(data, "cross_entropy")
        update = training.optim_step(AdamParams(learning_rate=1e-4))
        loss, norm = gradient.result().metrics["loss:sum"], update.result().metrics
    """

    def __init__(self, session: Session, opening: APIFuture[RunIds]) -> None:
        self._session = session
        self._ids: RunIds | None = None
        self._calls = count(1)
        self._last_call = 0
        self._refused_until = 0
        """Calls up to this one were made before a failure that their caller could not know."""
        self._refusal: Exception | None = None
        self._next_seq = 1
        self._turn = asyncio.Lock()
        """Requests are numbered and sent one call at a time, in the order of the calls."""
        self._polls = asyncio.Semaphore(MAX_POLLS)
        # Last: it begins on another thread, at once.
        super().__init__(session.start(self._open(opening)))

    async def _open(self, opening: APIFuture[RunIds]) -> None:
        self._ids = await asyncio.wrap_future(opening.future())

    @property
    def model_id(self) -> str:
        """`<session id>:train:<number>`, once the run is there; waits for that."""
        self.result()
        return self._run.model_id

    @property
    def _run(self) -> RunIds:
        assert self._ids is not None
        return self._ids

    # --- forward and backward --------------------------------------------------------------------

    def forward(
        self,
        data: Sequence[types.Datum],
        loss_fn: types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Loss and log probabilities (nats) of the data; gradients stay as they are."""
        return self._passes(data, loss_fn, loss_fn_config, forward_only=True)

    forward_async = handle_of(forward)

    def forward_backward(
        self,
        data: Sequence[types.Datum],
        loss_fn: types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Like forward, and adds the gradient of the loss to the run's.

        The loss is a sum over tokens and data, so parts may be sent one by one. `data` is read
        before this returns. RequestFailedError names what is wrong with it.
        """
        return self._passes(data, loss_fn, loss_fn_config, forward_only=False)

    forward_backward_async = handle_of(forward_backward)

    def forward_backward_custom(
        self, data: Sequence[types.Datum], loss_fn: CustomLossFn
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """The gradient of a loss of your own, for one more forward pass than forward_backward.

        `loss_fn(data, logprobs)` gets one float32 torch tensor per datum, in the shape of its
        target_tokens, and returns a scalar tensor and metrics to report. It runs on a thread of
        its own. Needs torch. If it raises, the result raises the same, and requests that were made
        before that could be known are not sent.
        """
        return self._session.start(self._custom(next_call(self), list(data), loss_fn))

    forward_backward_custom_async = handle_of(forward_backward_custom)

    def _passes(
        self,
        data: Sequence[types.Datum],
        loss_fn: str,
        config: Mapping[str, float | str] | None,
        *,
        forward_only: bool,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        # Encoded here and now: the caller may change its arrays after this returns.
        encoded = [wire.encode_datum(datum) for datum in data]
        request = wire.loss_request(loss_fn, config, forward_only=forward_only)
        return self._session.start(self._in_turn(next_call(self), encoded, request))

    async def _in_turn(
        self,
        call: int,
        encoded: Sequence[wire_pb2.Datum],
        request: wire_pb2.ForwardBackwardRequest,
    ) -> types.ForwardBackwardOutput:
        async def send() -> list[str]:
            return await self._send_chunks(await self._chunks(encoded, request))

        return await self._output(await self._submitted(call, send), request)

    async def _chunks(
        self, encoded: Sequence[wire_pb2.Datum], request: wire_pb2.ForwardBackwardRequest
    ) -> Chunks:
        config = await self._session.config()
        return wire.split(
            encoded,
            request,
            max_datums=config.fwdbwd_max_chunk_len,
            max_bytes=config.fwdbwd_max_chunk_bytes_count,
        )

    async def _send_chunks(self, chunks: Chunks) -> list[str]:
        """The request ids of all chunks. Holds the turn: they get consecutive numbers."""
        config = await self._session.config()
        first, self._next_seq = self._next_seq, self._next_seq + len(chunks)
        room = asyncio.Semaphore(MAX_CHUNKS_SENDING)

        async def send(seq: int, chunk: wire_pb2.ForwardBackwardRequest) -> str:
            chunk.model_id, chunk.seq_id = self._run.model_id, seq
            body = chunk.SerializeToString()
            headers = {"Content-Type": PROTOBUF}
            if config.proto_compress_fwdbwd:
                body, headers["Content-Encoding"] = await asyncio.to_thread(_zstd, body), "zstd"
            async with room:
                response = await self._session.transport.call(
                    "POST", "forward_backward", body=body, headers=headers
                )
            return response.text_field("request_id")

        numbered = enumerate(chunks, start=first)
        sent = await asyncio.gather(
            *(send(seq, chunk) for seq, chunk in numbered), return_exceptions=True
        )
        for answer in sent:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in sent if isinstance(answer, str)]

    async def _output(
        self, request_ids: Sequence[str], request: wire_pb2.ForwardBackwardRequest
    ) -> types.ForwardBackwardOutput:
        kind = "Forward" if request.forward_only else "ForwardBackward"
        results = [self._retrieved(request_id, kind, protobuf=True) for request_id in request_ids]
        bodies = [response.body for response in await _all(results)]
        return wire.combine([wire.decode_forward_backward(body) for body in bodies])

    async def _custom(
        self, call: int, data: list[types.Datum], loss_fn: CustomLossFn
    ) -> types.ForwardBackwardOutput:
        """Forward, the caller's loss, backward through a surrogate; nothing comes in between."""
        forward = wire.loss_request("cross_entropy", None, forward_only=True)
        backward = wire.loss_request("cross_entropy", None, forward_only=False)

        async def passes() -> tuple[list[str], float, dict[str, float]]:
            scored = [wire.encode_datum(datum) for datum in custom_loss.scored(data)]
            ids = await self._send_chunks(await self._chunks(scored, forward))
            output = await self._output(ids, forward)
            loss, metrics, weighted = await asyncio.to_thread(
                custom_loss.linearised, data, output, loss_fn
            )
            surrogate = [wire.encode_datum(datum) for datum in weighted]
            ids = await self._send_chunks(await self._chunks(surrogate, backward))
            return ids, loss, metrics

        async def send() -> tuple[list[str], float, dict[str, float]]:
            try:
                return await passes()
            except Exception as error:
                # An optimizer step that was called before this was known must not be taken.
                self._refused_until, self._refusal = self._last_call, error
                raise

        ids, loss, metrics = await self._submitted(call, send)
        output = await self._output(ids, backward)
        surrogate_loss = output.metrics["loss:sum"]
        metrics = {**output.metrics, "surrogate_loss:sum": surrogate_loss, **metrics}
        return types.ForwardBackwardOutput(
            output.loss_fn_output_type, output.loss_fn_outputs, {**metrics, "loss:sum": loss}
        )

    # --- optimizer, saving, loading --------------------------------------------------------------

    def optim_step(
        self,
        optim_params: types.OptimParams | None = None,
        *,
        adam_params: types.AdamParams | None = None,
    ) -> APIFuture[types.OptimStepResponse]:
        """Changes the weights by the gradient so far, and clears it. Default: AdamParams()."""
        params = optim_params or adam_params or types.AdamParams()
        name = "adam_params" if isinstance(params, types.AdamParams) else "optimizer_params"
        request = {"type": "optim_step", name: params.model_dump()}
        return self._request("optim_step", "OptimStep", request, types.OptimStepResponse)

    optim_step_async = handle_of(optim_step)

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[types.SaveWeightsResponse]:
        """Saves weights and optimizer state, to resume from; a name that exists is an error
        unless overwrite. ttl_seconds: 3600 or more, None keeps it."""
        request = {
            "type": "save_weights",
            "path": name,
            "ttl_seconds": ttl_seconds,
            "overwrite": overwrite,
            "user_metadata": user_metadata,
        }
        return self._request("save_weights", "SaveWeights", request, types.SaveWeightsResponse)

    save_state_async = handle_of(save_state)

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[types.SaveWeightsForSamplerResponse]:
        """Saves weights to sample from, under a name and for as long as ttl_seconds."""
        request = {
            "type": "save_weights_for_sampler",
            "path": name,
            "ttl_seconds": ttl_seconds,
            "user_metadata": user_metadata,
        }
        return self._request(
            "save_weights_for_sampler",
            "SaveWeightsForSampler",
            request,
            types.SaveWeightsForSamplerResponse,
        )

    save_weights_for_sampler_async = handle_of(save_weights_for_sampler)

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: list[str] | None = None,
    ) -> APIFuture[types.SaveWeightsExternalResponse]:
        """Saves files for download, in PEFT's form."""
        request = {
            "type": "save_weights_external",
            "path": name,
            "ttl_seconds": ttl_seconds,
            "age_encryption_recipients": age_encryption_recipients,
        }
        return self._request(
            "save_weights_external",
            "SaveWeightsExternal",
            request,
            types.SaveWeightsExternalResponse,
        )

    save_weights_external_async = handle_of(save_weights_external)

    def load_state(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[types.LoadWeightsResponse]:
        """Loads the weights of a saved state; the optimizer starts anew."""
        return self._load(path, weights_access_token, optimizer=False)

    load_state_async = handle_of(load_state)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[types.LoadWeightsResponse]:
        """Loads a saved state as it was."""
        return self._load(path, weights_access_token, optimizer=True)

    load_state_with_optimizer_async = handle_of(load_state_with_optimizer)

    def _load(
        self, path: str, token: str | None, *, optimizer: bool
    ) -> APIFuture[types.LoadWeightsResponse]:
        request = {
            "type": "load_weights",
            "path": path,
            "optimizer": optimizer,
            "weights_access_token": token,
        }
        return self._request("load_weights", "LoadWeights", request, types.LoadWeightsResponse)

    # --- sampling clients ------------------------------------------------------------------------

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, kind: types.SamplingClientKind = "snapshot"
    ) -> SamplingClient:
        """A client that samples with the weights as all earlier calls leave them.

        Without a name they last as long as this session; with one they are saved under it.
        """
        if name is not None:
            saved = self.save_weights_for_sampler(name)
            return SamplingClient(self._session, self._session.start(self._sampler_of(saved)))
        request = {"type": "save_weights_for_sampler", "kind": kind}
        opening = self._snapshot(next_call(self), request)
        return SamplingClient(self._session, self._session.start(opening))

    async def save_weights_and_get_sampling_client_async(
        self, name: str | None = None, kind: types.SamplingClientKind = "snapshot"
    ) -> SamplingClient:
        """Like the plain form, once the client is ready."""
        return await self.save_weights_and_get_sampling_client(name, kind)

    def create_sampling_client(self, model_path: str) -> SamplingClient:
        """A client that samples with saved weights, such as those of save_weights_for_sampler."""
        return SamplingClient(self._session, self._session.start(self._sampler(model_path)))

    async def create_sampling_client_async(self, model_path: str) -> SamplingClient:
        """Like the plain form, once the client is ready."""
        return await self.create_sampling_client(model_path)

    async def _snapshot(self, call: int, request: dict[str, Any]) -> SamplerIds:
        request["sampling_session_seq_id"] = next(self._session.sampling_seqs)
        response = await self._answered(
            call, "save_weights_for_sampler", "SaveWeightsForSampler", request
        )
        return await self._sampler_ids(response.text_field("sampling_session_id"))

    async def _sampler_of(
        self, saved: APIFuture[types.SaveWeightsForSamplerResponse]
    ) -> SamplerIds:
        return await self._sampler((await saved).path)

    async def _sampler(self, model_path: str) -> SamplerIds:
        await self._opened()
        response = await self._session.transport.call(
            "POST",
            "create_sampling_session",
            {
                "type": "create_sampling_session",
                "session_id": await self._session.id(),
                "sampling_session_seq_id": next(self._session.sampling_seqs),
                "model_path": model_path,
            },
        )
        return await self._sampler_ids(response.text_field("sampling_session_id"))

    async def _sampler_ids(self, sampling_session_id: str) -> SamplerIds:
        data = self._run.info.model_data
        return SamplerIds(
            await self._session.id(),
            sampling_session_id,
            data.model_name or "",
            data.tokenizer_id,
        )

    # --- what it is ------------------------------------------------------------------------------

    @operation
    async def _info(self) -> types.GetInfoResponse:
        """The run's base model, LoRA rank and tokenizer."""
        await self._opened()
        return self._run.info

    get_info = waited(_info)
    get_info_async = value_of(_info)

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base model's tokenizer; ImportError without transformers."""
        data = self.get_info().model_data
        name = data.tokenizer_id or data.model_name
        if name is None:
            raise LuthierError("the server does not say which tokenizer this model has")
        return load_tokenizer(name)

    # --- how requests go out ---------------------------------------------------------------------

    def _request(
        self, endpoint: str, request_type: str, request: dict[str, Any], result: type[M]
    ) -> APIFuture[M]:
        return self._session.start(
            self._parsed(next_call(self), endpoint, request_type, request, result)
        )

    async def _parsed(
        self, call: int, endpoint: str, request_type: str, request: dict[str, Any], result: type[M]
    ) -> M:
        return (await self._answered(call, endpoint, request_type, request)).parsed(result)

    async def _answered(
        self, call: int, endpoint: str, request_type: str, request: dict[str, Any]
    ) -> Response:
        async def send() -> str:
            seq, self._next_seq = self._next_seq, self._next_seq + 1
            numbered = {**request, "model_id": self._run.model_id, "seq_id": seq}
            given = {name: value for name, value in numbered.items() if value is not None}
            response = await self._session.transport.call(
                "POST", endpoint, body=orjson.dumps(given)
            )
            return response.text_field("request_id")

        return await self._retrieved(await self._submitted(call, send), request_type)

    async def _submitted(self, call: int, send: Callable[[], Awaitable[T]]) -> T:
        """What `send` returns, when it is this call's turn.

        It runs in a task of its own: a caller that gives up must leave no gap in the numbers, for
        which every later request of this run would wait.
        """

        async def in_turn() -> T:
            async with self._turn:
                await self._opened()
                if call <= self._refused_until:
                    raise RequestFailedError(
                        f"not sent, because a call before it failed: {self._refusal!r}",
                        f"{self._run.model_id}: call {call}",
                        "user",
                    ) from self._refusal
                return await send()

        return await asyncio.shield(self._session.spawn(in_turn()))

    async def _retrieved(
        self, request_id: str, request_type: str, *, protobuf: bool = False
    ) -> Response:
        async with self._polls:
            return await retrieve(
                self._session.transport, request_id, request_type, protobuf=protobuf
            )


def next_call(client: TrainingClient) -> int:
    """The number of a call, taken by the thread that makes it."""
    client._last_call = next(client._calls)
    return client._last_call


async def _all(results: Sequence[Awaitable[Response]]) -> list[Response]:
    """All of them, or the first error in their order once none is waited for any more."""
    answers = await asyncio.gather(*results, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if isinstance(answer, Response)]


def _zstd(body: bytes) -> bytes:
    import sys

    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return bytes(zstd.compress(body, ZSTD_LEVEL))
