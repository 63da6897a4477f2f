"""Sessions: one per client, with its runs and sampling sessions.

Every method names the tenant it works for. What is foreign and what is absent raise one NotFound.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from datetime import datetime
from typing import Any, cast

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import Blobs
from luthier_core.errors import BadRequest, InvalidField
from luthier_core.records import FinishReason, SessionRecord, as_strings
from luthier_registry.record_store import SESSION_ID, RecordStore, check_id, cursor
from luthier_registry.requests import CreateSession, SearchSessions
from luthier_registry.search import search_sessions


class Sessions(RecordStore):
    """The sessions of all tenants."""

    def __init__(
        self,
        blobs: Blobs,
        client: redis.Redis,
        secret: bytes,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        super().__init__(blobs, client, clock=clock)
        self._secret = secret

    async def create(
        self,
        tenant: str,
        wanted: CreateSession,
        *,
        key_id: str = "",
        key_project: str | None = None,
    ) -> SessionRecord:
        """A new session; under one idempotency key always the same.

        It belongs to the project of the key that made it, if that has one.
        """
        project_id = within_project(key_project, wanted.project_id)
        session_id = self.new_id("session", tenant, wanted.idempotency_key)
        record = SessionRecord(
            session_id=session_id,
            tenant=tenant,
            created_at=self._clock(),
            project_id=project_id,
            key_id=key_id,
            **wanted.model_dump(exclude={"idempotency_key", "project_id"}),
        )
        return await self.put(record)

    async def put(self, record: SessionRecord) -> SessionRecord:
        """The record stored and listed, or the one that was there first."""
        record = await self._create(keys.session_record(record.tenant, record.session_id), record)
        await self._listing(record.tenant).add_session(record)
        await self._note_status(record)
        return record

    def new_id(self, use: str, tenant: str, idempotency_key: str | None) -> str:
        """A new session id; under one idempotency key always the same."""
        if idempotency_key is None:
            return secrets.token_hex(16)
        text = f"{use}\0{tenant}\0{idempotency_key}"
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()[:32]

    async def get(self, tenant: str, session_id: str) -> SessionRecord:
        check_id(SESSION_ID, session_id, "session_id")
        key = keys.session_record(tenant, session_id)
        return await self._read(SessionRecord, key, f"session_id={session_id!r}")

    async def describe(self, tenant: str, session_id: str) -> dict[str, Any]:
        """The session's record with the ids of its runs and sampling sessions."""
        record = await self.get(tenant, session_id)
        listing = self._listing(tenant)
        return {
            **record.to_dict(),
            "user_metadata": as_strings(record.user_metadata),
            "training_run_ids": await listing.ids(f"runs:{session_id}"),
            "sampler_ids": await listing.ids(f"samplers:{session_id}"),
        }

    async def page(self, tenant: str, *, offset: int, limit: int) -> dict[str, Any]:
        ids, total = await self._listing(tenant).id_page("sessions", offset=offset, limit=limit)
        return {"sessions": ids, "cursor": cursor(offset, limit, total)}

    async def search(self, tenant: str, wanted: SearchSessions) -> dict[str, Any]:
        """sessions/search of the Tinker API."""
        return await search_sessions(self._listing(tenant), tenant, wanted)

    async def heartbeat(self, tenant: str, session_id: str) -> SessionRecord:
        """Note that the session's client is alive."""
        record = await self.get(tenant, session_id)
        await self._note_status(record)
        return record

    async def finish(
        self, tenant: str, session_id: str, reason: FinishReason, detail: str | None
    ) -> SessionRecord:
        """End the session. The first reason wins; a repeat is no error."""
        ending = {"status": "finished", "finish_reason": reason, "finish_detail": detail}
        record = await self._change_session(
            tenant,
            session_id,
            lambda now: now.model_copy(update=ending) if now.status == "active" else now,
        )
        await self._note_status(record)
        return record

    async def set_project(
        self, tenant: str, session_id: str, project_id: str, *, key_project: str | None = None
    ) -> SessionRecord:
        """Move the session with its runs into a project."""
        within_project(key_project, project_id)
        return await self._change_session(
            tenant, session_id, lambda now: now.model_copy(update={"project_id": project_id})
        )

    async def _change_session(
        self, tenant: str, session_id: str, change: Callable[[SessionRecord], SessionRecord]
    ) -> SessionRecord:
        check_id(SESSION_ID, session_id, "session_id")
        key = keys.session_record(tenant, session_id)
        record = await self._update(SessionRecord, key, f"session_id={session_id!r}", change)
        while True:
            await self._listing(tenant).add_session(record)
            # Whoever writes the row last has looked at the record after that.
            now = await self.get(tenant, session_id)
            if now == record:
                return record
            record = now

    async def _note_status(self, record: SessionRecord) -> None:
        """The session in Redis, where whoever suspends the runs of lost clients looks."""
        header: dict[Any, Any] = {
            "tenant": record.tenant,
            "status": record.status,
            "heartbeat": str(self._clock().timestamp()),
        }
        await cast(Any, self._redis.hset(keys.session_header(record.session_id), mapping=header))

    async def get_active(self, tenant: str, session_id: str) -> SessionRecord:
        """The session, if new work may still come; BadRequest once it is finished."""
        record = await self.get(tenant, session_id)
        if record.status != "active":
            raise BadRequest(f"session_id={session_id!r} is finished")
        return record


def within_project(key_project: str | None, wanted: str | None) -> str | None:
    """The project that something is to belong to; InvalidField if the key is of another one."""
    if key_project is not None and wanted not in (None, key_project):
        raise InvalidField(f"project_id={wanted!r}: this API key is of project {key_project!r}")
    return key_project if key_project is not None else wanted
