"""From samples to the HTTP response: sent whole, or as a stream of server-sent events."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import orjson
from aiohttp import web

from luthier_core.errors import LuthierError
from luthier_core.partials import Partial
from luthier_gateway.openai.answers import Answer, ChatAnswers, Usage
from luthier_gateway.openai.errors import ClientGone, error_object
from luthier_gateway.openai.generation import Generation
from luthier_gateway.openai.model_text import CONTEXT_TOKENS, ModelText
from luthier_gateway.openai.requests import ChatRequest, CompletionRequest
from luthier_gateway.openai.text import Piece, TextDecoder, Transcript
from luthier_gateway.web_io import json_response

log = logging.getLogger(__name__)

GONE_CHECK_S = 1.0
"""aiohttp tells a handler nothing of a connection that has closed: it is looked at this often."""
KEEP_ALIVE_S = 15.0
"""A stream that has nothing to say says so this often, for proxies that close silent ones."""

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy would hold tokens back
}


class Exchange:
    """One request with its samples under way. Choice i of prompt p has the index p * n + i."""

    def __init__(
        self,
        generation: Generation,
        wanted: CompletionRequest | ChatRequest,
        text: ModelText,
        prompts: Sequence[list[int]],
    ) -> None:
        self._generation = generation
        self._wanted = wanted
        self._text = text
        self._prompts = prompts
        self._answers = wanted.answers(generation.request_id, text)
        self._echoes = isinstance(wanted, CompletionRequest) and wanted.echo
        self._transcripts = [self._transcript(p) for p in prompts for _ in range(wanted.n)]

    def _transcript(self, prompt: list[int]) -> Transcript:
        decoder = TextDecoder(self._text.decode, prompt[-CONTEXT_TOKENS:])
        return Transcript(decoder, self._text.eos, self._wanted.stops)

    # --- whole ------------------------------------------------------------------------------------

    async def answer(self, request: web.Request) -> web.Response:
        results = await self._results(request)
        choices = []
        for index, transcript in enumerate(self._transcripts):
            prompt, i = divmod(index, self._wanted.n)
            result = results[prompt]
            piece, reason = self._end(transcript, result["sequences"][i])
            if self._echoes:
                piece = _behind(self._echo(prompt, result), piece)
            choices.append(self._answers.choice(index, piece, reason))
        return json_response(self._answers.whole(choices, self._usage(results)))

    async def _results(self, request: web.Request) -> list[dict[str, Any]]:
        """All of them; ClientGone, and the samples are cancelled, once nobody waits for them."""
        waiting = asyncio.ensure_future(self._generation.results())
        try:
            while not waiting.done():
                await asyncio.wait([waiting], timeout=GONE_CHECK_S)
                _check_connection(request)
            return await waiting
        finally:
            waiting.cancel()

    # --- streamed ---------------------------------------------------------------------------------

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Ends with what the outcomes say; an error in between is an event of its own."""
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        await response.prepare(request)
        try:
            await self._send_all(request, response)
        except (ConnectionResetError, ClientGone):
            return response
        except LuthierError as error:
            await response.write(_event(error_object(error)))
        except Exception:
            log.exception("unexpected error in the stream of %s", self._generation.request_id)
            unexpected = LuthierError("an unexpected error; the server's log has it")
            await response.write(_event(error_object(unexpected)))
        await response.write_eof()
        return response

    async def _send_all(self, request: web.Request, response: web.StreamResponse) -> None:
        await response.write(self._chunk(*self._openings()))
        self._generation.follow()
        results: dict[int, dict[str, Any]] = {}
        silent_s = 0.0
        while len(results) < len(self._prompts):
            try:
                async with asyncio.timeout(GONE_CHECK_S):
                    news = await self._generation.news()
            except TimeoutError:
                _check_connection(request)
                silent_s += GONE_CHECK_S
                if silent_s >= KEEP_ALIVE_S:
                    await response.write(b": the sampler is at work\n\n")
                    silent_s = 0.0
                continue
            if isinstance(news.what, BaseException):
                raise news.what
            if isinstance(news.what, dict):
                results[news.index] = news.what
                parts = list(self._ends(news.index, news.what))
            elif news.index in results:
                continue  # a hint that has been overtaken by the outcome
            else:
                parts = list(self._news(news.index, news.what))
            if parts:
                silent_s = 0.0
                await response.write(self._chunk(*parts))
        if self._wanted.stream_options.include_usage:
            usage = self._usage([results[index] for index in range(len(self._prompts))])
            await response.write(_event(self._answers.chunk([], usage)))
        await response.write(b"data: [DONE]\n\n")

    def _openings(self) -> Iterator[Answer]:
        for index in range(len(self._transcripts)):
            if isinstance(self._answers, ChatAnswers):
                yield self._answers.opening(index)
            elif self._echoes:
                piece = self._echo(index // self._wanted.n, {})
                yield self._answers.part(index, piece, None)

    def _news(self, prompt: int, partials: Sequence[Partial]) -> Iterator[Answer]:
        """What a message of the sampler adds; nothing if one before it has been lost."""
        for partial in partials:
            index = prompt * self._wanted.n + partial.index
            transcript = self._transcripts[index]
            known = len(transcript.tokens) - partial.offset
            if known < 0 or self._wants_no_tokens:
                continue
            piece = transcript.push(
                partial.tokens[known:], partial.logprobs[known:], partial.topk[known:]
            )
            if piece.text:
                yield self._answers.part(index, piece, None)

    def _ends(self, prompt: int, result: dict[str, Any]) -> Iterator[Answer]:
        for i, sequence in enumerate(result["sequences"]):
            index = prompt * self._wanted.n + i
            piece, reason = self._end(self._transcripts[index], sequence)
            yield self._answers.part(index, piece, reason)

    def _chunk(self, *choices: Answer) -> bytes:
        """One event for each choice, as clients expect it."""
        return b"".join(_event(self._answers.chunk([choice])) for choice in choices)

    # --- both -------------------------------------------------------------------------------------

    @property
    def _wants_no_tokens(self) -> bool:
        return self._wanted.max_tokens == 0

    def _end(self, transcript: Transcript, sequence: dict[str, Any]) -> tuple[Piece, str]:
        """The rest of a choice and why it ended.

        LuthierError if other tokens have been streamed: a sampler died, and the one that took over
        did not draw the same, which bfloat16 allows.
        """
        if self._wants_no_tokens:
            return Piece("", []), "length"
        known, tokens = len(transcript.tokens), sequence["tokens"]
        if tokens[:known] != transcript.tokens:
            raise LuthierError(
                "the sample was started again and came out differently; send it again"
            )
        topk = [row or [] for row in sequence.get("topk_logprobs", ())]
        pushed = transcript.push(tokens[known:], sequence["logprobs"][known:], topk[known:])
        piece = _joined(pushed, transcript.end())
        return piece, "stop" if transcript.stopped else sequence["stop_reason"]

    def _echo(self, prompt: int, result: dict[str, Any]) -> Piece:
        """The prompt as the beginning of its completion."""
        tokens = self._prompts[prompt]
        logprobs = result.get("prompt_logprobs", [None] * len(tokens))
        topk = [row or [] for row in result.get("topk_prompt_logprobs", ())]
        transcript = Transcript(TextDecoder(self._text.decode))
        return _joined(transcript.push(tokens, logprobs, topk), transcript.end())

    def _usage(self, results: Sequence[dict[str, Any]]) -> Usage:
        sequences = [sequence for result in results for sequence in result["sequences"]]
        num_tokens = 0 if self._wants_no_tokens else sum(len(s["tokens"]) for s in sequences)
        return Usage(
            num_prompt_tokens=sum(map(len, self._prompts)),
            num_completion_tokens=num_tokens,
            num_cached_tokens=sum(result["prompt_cache_hit_tokens"] for result in results),
        )


def _joined(first: Piece, second: Piece) -> Piece:
    """Two pieces of one text."""
    return Piece(first.text + second.text, first.tokens + second.tokens)


def _behind(prompt: Piece, piece: Piece) -> Piece:
    """One text of two; offsets count from the beginning of the prompt."""
    moved = [replace(token, offset=token.offset + len(prompt.text)) for token in piece.tokens]
    return Piece(prompt.text + piece.text, prompt.tokens + moved)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _check_connection(request: web.Request) -> None:
    if request.transport is None or request.transport.is_closing():
        raise ClientGone
