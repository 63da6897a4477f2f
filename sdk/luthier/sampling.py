"""SamplingClient: samples and log probabilities from one set of weights."""

import asyncio
import base64
import contextlib
import secrets
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import orjson

from luthier import types, wire
from luthier._loop import operation, value_of, waited
from luthier.errors import APIError, GoneError, LuthierError
from luthier.future import APIFuture, Opening
from luthier.polling import CompletionPoller, retrieve, waiting_sentence
from luthier.session import Session
from luthier.settings import read_settings
from luthier.tokenizer import tokenizer_of
from luthier.transport import PATIENCE_S, Response
from luthier.window import Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_WINDOW, LEAST_WINDOW, MOST_WINDOW = 64, 4, 400
"""Submissions at once: where the window starts, and between what it moves."""
MAX_FETCHES = 64
"""Results fetched at once: bounds the memory that they take on their way."""
MAX_RESUBMISSIONS = 5
"""How often a sample that the server has lost is asked for anew."""
CLONE_SEQS = 1_000_000_000
"""A handle in another process numbers its requests from clone * CLONE_SEQS (wire protocol 6.2)."""
BACKPRESSURE_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class SamplerIds:
    """What names a sampler on the server, for any process."""

    session_id: str
    sampling_session_id: str
    base_model: str
    tokenizer_id: str | None = None


class SamplingClient(Opening[SamplerIds]):
    """Samples from one set of weights. From ServiceClient.create_sampling_client, or a
    TrainingClient's save_weights_and_get_sampling_client.

    It may be pickled into processes of your own: it travels as ids, and the copy there is another
    handle of the same sampler, with the credentials of its process (an api_key that was given as
    an argument travels along).
    """

    def __init__(
        self, session: Session, opening: APIFuture[SamplerIds], *, is_clone: bool = False
    ) -> None:
        self._session = session
        self._is_clone = is_clone
        self._clone = 0
        self._seqs = count()
        self._poller: CompletionPoller | None = None
        self._window = Window(FIRST_WINDOW, LEAST_WINDOW, MOST_WINDOW)
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        # Last: it begins on another thread, at once.
        super().__init__(session.start(self._open(opening)))

    async def _open(self, opening: APIFuture[SamplerIds]) -> SamplerIds:
        ids = await asyncio.wrap_future(opening.future())
        config = await self._session.config()
        if self._is_clone:
            self._clone = await self._join(ids, config.sample_join_sampling_session)
        self._seqs = count(self._clone * CLONE_SEQS)
        if config.sample_use_retrieve_futures:
            self._poller = CompletionPoller(self._session, ids.sampling_session_id, self._clone)
        return ids

    async def _join(self, ids: SamplerIds, can_join: bool) -> int:
        """A number that no other handle of this sampler has."""
        if not can_join:
            return secrets.randbelow(CLONE_SEQS) + 1
        response = await self._session.transport.call(
            "POST",
            "join_sampling_session",
            {"sampling_session_id": ids.sampling_session_id, "type": "join_sampling_session"},
        )
        return int(response.json()["client_counter"])

    # --- sampling -------------------------------------------------------------------------------

    def sample(
        self,
        prompt: types.ModelInput,
        num_samples: int,
        sampling_params: types.SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: types.TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> APIFuture[types.SampleResponse]:
        """`num_samples` continuations of the prompt, each with one logprob (nats) per token.

        include_prompt_logprobs: log probabilities of the prompt's tokens too. topk_prompt_logprobs,
        topk_sample_logprobs: the k likeliest tokens at every position of prompt or sample.
        target_prompt_logprobs: int64[len(prompt) - 1, K], token ids to score; -1 is skipped.
        RequestFailedError names a value that the server does not take.
        """
        request = {
            "prompt": {"chunks": [wire.json_chunk(chunk) for chunk in prompt.chunks]},
            "num_samples": num_samples,
            "sampling_params": sampling_params.model_dump(exclude_none=True),
            "prompt_logprobs": include_prompt_logprobs,
            "topk_prompt_logprobs": topk_prompt_logprobs or 0,
            "topk_sample_logprobs": topk_sample_logprobs,
            "type": "sample",
        }
        if target_prompt_logprobs is not None:
            request["target_prompt_logprobs"] = wire.json_tensor(target_prompt_logprobs)
        if prompt_alt_tokens_k:
            request["prompt_alt_tokens_k"] = prompt_alt_tokens_k
        if prompt_logprobs_last_n is not None:
            request["prompt_logprobs_last_n"] = prompt_logprobs_last_n
        return self._session.start(self._sample(request))

    sample_async = value_of(sample)

    def compute_logprobs(
        self, prompt: types.ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """One log probability (nats) per prompt token; None for the first.

        prompt_logprobs_last_n: only of the last n tokens, None for those before.
        """
        scored = self.sample(
            prompt,
            1,
            types.SamplingParams(max_tokens=1),
            include_prompt_logprobs=True,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        return self._session.start(_prompt_logprobs(scored))

    compute_logprobs_async = value_of(compute_logprobs)

    async def _sample(self, request: dict[str, Any]) -> types.SampleResponse:
        """Submits, waits and fetches; anew if the server has lost the request meanwhile."""
        ids = await self._opened()
        request = {**request, "sampling_session_id": ids.sampling_session_id}
        for attempt in range(MAX_RESUBMISSIONS):
            try:
                return await self._sample_once(request)
            except GoneError:
                if attempt + 1 == MAX_RESUBMISSIONS:
                    raise
        raise AssertionError("unreachable")

    async def _sample_once(self, request: dict[str, Any]) -> types.SampleResponse:
        numbered = {**request, "seq_id": next(self._seqs)}
        with contextlib.nullcontext() if self._poller is None else self._poller.expecting():
            return await self._sampled(numbered)

    async def _sampled(self, numbered: dict[str, Any]) -> types.SampleResponse:
        submission = await self._submit(orjson.dumps(numbered))
        try:
            accepted = (await asyncio.shield(submission)).json()
            response = await self._result(str(accepted["request_id"]))
        except asyncio.CancelledError:
            self._session.spawn_last_word(self._withdraw(submission))
            raise
        return wire.decode_sample(response.body, accepted.get("sample_sequence_ids") or ())

    async def _submit(self, body: bytes) -> "asyncio.Task[Response]":
        """A task that sends it when there is room, and that outlives whoever waits for it.

        Cancelled while it waits for room: nothing has been sent. Later the request may have
        arrived, so its answer is needed to withdraw it.
        """
        sending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = self._session.spawn(self._send(body, sending))
        try:
            await asyncio.wait((sending, task), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not sending.done():
                task.cancel()
            else:
                self._session.spawn_last_word(self._withdraw(task))
            raise
        return task

    async def _send(self, body: bytes, sending: "asyncio.Future[None]") -> Response:
        while True:
            async with self._window.slot():
                if not sending.done():
                    sending.set_result(None)
                response = await self._post(body)
            if response.status != 429:
                return response

    async def _post(self, body: bytes) -> Response:
        response = await self._session.transport.call(
            "POST",
            "asample",
            body=body,
            headers={"X-Tinker-Sampling-Backpressure": "1"},
            handed_back=(429,),
            patience_s=PATIENCE_S,
        )
        if response.status == 429:
            pause_s = float(response.headers.get("Retry-After") or BACKPRESSURE_PAUSE_S)
            self._window.refused(pause_s)
            self._session.status.show(
                self, waiting_sentence({"queue_state_reason": response.json().get("detail")})
            )
        else:
            self._window.succeeded()
            self._session.status.clear(self)
        return response

    async def _result(self, request_id: str) -> Response:
        transport = self._session.transport
        if self._poller is None:
            return await retrieve(transport, request_id, "Sample", protobuf=True)
        await self._poller.wait(request_id)
        async with self._fetches:
            response = await retrieve(transport, request_id, "Sample", protobuf=True)
        self._poller.retrieved(request_id)
        return response

    async def _withdraw(self, submission: "asyncio.Task[Response]") -> None:
        """Tells the server that nobody waits for this sample, if it has taken it."""
        try:
            accepted = (await submission).json()
            await self._session.transport.call(
                "POST", "cancel_future", {"request_id": accepted["request_id"]}
            )
        except (APIError, asyncio.CancelledError):
            pass  # it was not taken, or the server ends it with the session

    # --- what it is -----------------------------------------------------------------------------

    @operation
    async def _base_model(self) -> str:
        """The name of the base model."""
        return (await self._opened()).base_model

    get_base_model = waited(_base_model)
    get_base_model_async = value_of(_base_model)

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base model's tokenizer; ImportError without transformers."""
        ids = self._opening.result()
        return tokenizer_of(ids.base_model, ids.tokenizer_id)

    def get_sampler_handle(self) -> str:
        """A string that from_sampler_handle makes a client of, in any process; no credentials."""
        ids = self._opening.result()
        said = [
            self._session.settings.base_url,
            ids.session_id,
            ids.sampling_session_id,
            ids.base_model,
            ids.tokenizer_id,
        ]
        return base64.urlsafe_b64encode(orjson.dumps(said)).decode()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> "SamplingClient":
        """Another handle of the sampler; ValueError if the string is none."""
        try:
            base_url, *ids = orjson.loads(base64.urlsafe_b64decode(handle))
            sampler = SamplerIds(*ids)
        except (ValueError, TypeError):
            raise ValueError("handle: not from get_sampler_handle") from None
        return open_clone(base_url, sampler, api_key)

    def __reduce__(self) -> tuple[Any, ...]:
        settings = self._session.settings
        key = settings.api_key if settings.given_api_key else None
        return open_clone, (settings.base_url, self._opening.result(), key)


def open_clone(base_url: str, ids: SamplerIds, api_key: str | None) -> SamplingClient:
    """A handle in this process of a sampler that another one has made."""
    settings = read_settings(base_url, api_key)
    session = _shared_session(ids.session_id, settings.base_url, api_key)

    async def known() -> SamplerIds:
        await session.id()  # keeps the session alive from here too
        return ids

    return SamplingClient(session, session.start(known()), is_clone=True)


_shared: dict[tuple[str, str, str | None], Session] = {}


def _shared_session(session_id: str, base_url: str, api_key: str | None) -> Session:
    """One connection and one heartbeat for all handles of a session in this process."""
    key = (session_id, base_url, api_key)
    if key not in _shared:
        _shared[key] = Session(read_settings(base_url, api_key), session_id=session_id)
    return _shared[key]


async def _prompt_logprobs(
    scored: APIFuture[types.SampleResponse],
) -> list[float | None]:
    logprobs = (await scored).prompt_logprobs
    if logprobs is None:
        raise LuthierError("the server gave no prompt logprobs")
    return logprobs
