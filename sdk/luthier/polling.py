"""Waiting for results: one long poll per training request, one for all samples of a client."""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from luthier.errors import APIConnectionError, LuthierError, RequestFailedError
from luthier.session import Session
from luthier.transport import JSON, PATIENCE_S, POLL_TIMEOUT_S, PROTOBUF, Response, Transport

WORDLESS_BACKOFF_S = 1.0
"""After a 408 that is no answer of the protocol, such as a proxy's: not at once again."""


async def retrieve(
    transport: Transport, request_id: str, request_type: str, *, protobuf: bool = False
) -> Response:
    """The result of an accepted request, however long it takes.

    RequestFailedError with the server's reason if it failed; GoneError if it has no result any
    more. What the server says about its queue is on the status line until the result is there.
    """
    accept = PROTOBUF if protobuf else JSON
    headers = {"Accept": accept, "X-Tinker-Request-Type": request_type}
    owner = object()
    try:
        while True:
            response = await transport.call(
                "POST",
                "retrieve_future",
                {"request_id": request_id, "allow_metadata_only": False},
                headers=headers,
                handed_back=(408,),
                patience_s=PATIENCE_S,
                timeout_s=POLL_TIMEOUT_S,
            )
            if response.status == 408:
                await _note(transport, owner, response)
            elif response.is_json:
                return _checked(response, request_id)
            else:
                return response
    finally:
        transport.status.clear(owner)


async def _note(transport: Transport, owner: object, response: Response) -> None:
    said = response.json() if response.is_json else {}
    if said.get("type") != "try_again":
        await asyncio.sleep(WORDLESS_BACKOFF_S)
    elif said.get("queue_state") in (None, "active"):
        transport.status.clear(owner)
    else:
        transport.status.show(owner, waiting_sentence(said))


def waiting_sentence(said: Mapping[str, Any]) -> str:
    """What a paused queue is waiting for."""
    reason = said.get("queue_state_reason")
    return f"waiting: {reason or str(said.get('queue_state')).replace('_', ' ')}"


def _checked(response: Response, request_id: str) -> Response:
    said = response.json()
    if "error" in said:
        raise RequestFailedError(
            str(said["error"]), request_id, str(said.get("category", "unknown"))
        )
    return response


class CompletionPoller:
    """Tells the samples of one handle of a sampling session when their results are there.

    One open request for any number of samples. It polls while somebody waits, and acknowledges
    the last results when nobody does any more.
    """

    def __init__(self, session: Session, sampling_session_id: str, clone: int) -> None:
        self._session = session
        self._target = {
            "type": "sampling_session",
            "sampling_session_id": sampling_session_id,
            "cloned_sampler_id": clone,
        }
        self._cursor = 0
        self._num_expected = 0
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._early: set[str] = set()
        """Done before the answer to their submission was read."""
        self._retrieved: list[str] = []
        self._poll: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Around a sample, from before it is sent until its result is there.

        Its completion may be reported before its id is known, and then is kept for it.
        """
        self._num_expected += 1
        try:
            yield
        finally:
            self._num_expected -= 1
            if not self._num_expected:
                self._early.clear()
                if self._retrieved and not self._session.is_closed:
                    self._begin()

    async def wait(self, request_id: str) -> None:
        """Returns when there is a result, good or bad; raises what ended the polling."""
        if request_id in self._early:
            self._early.discard(request_id)
            return
        done = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = done
        self._begin()
        try:
            await done
        finally:
            self._waiting.pop(request_id, None)

    def _begin(self) -> None:
        if self._poll is None or self._poll.done():
            self._poll = self._session.spawn(self._run())

    def retrieved(self, request_id: str) -> None:
        """Its result was read in full: the server may forget it."""
        self._retrieved.append(request_id)

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._ask({})
            if self._retrieved:
                await self._ask({"timeout": 0.0})
        except LuthierError as error:
            for done in self._waiting.values():
                if not done.done():
                    done.set_exception(error)
        else:
            if self._waiting:  # somebody came during the acknowledgement
                self._poll = self._session.spawn(self._run())

    async def _ask(self, timeout: Mapping[str, float]) -> None:
        """One poll, and word to everybody whose result it reports."""
        retrieved = self._retrieved[:5000]
        response = await self._session.transport.call(
            "POST",
            "retrieve_futures",
            {
                "target": self._target,
                "prev_cursor": self._cursor,
                "retrieved_request_ids": retrieved,
                **timeout,
            },
            handed_back=(408,),
            patience_s=PATIENCE_S,
            timeout_s=POLL_TIMEOUT_S,
        )
        if response.status == 408:
            await asyncio.sleep(WORDLESS_BACKOFF_S)
            return
        said = response.json()
        if "cursor" not in said:
            raise APIConnectionError(f"retrieve_futures: no cursor in {response.body[:200]!r}")
        del self._retrieved[: len(retrieved)]
        self._cursor = int(said["cursor"])
        for completion in said.get("completions", ()):
            # Out of the waiting at once: nobody polls again for who has been told.
            done = self._waiting.pop(completion["request_id"], None)
            if done is None:
                self._early.add(completion["request_id"])
            elif not done.done():
                done.set_result(None)
        if not self._num_expected:
            self._early.clear()
