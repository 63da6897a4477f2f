"""Organisations, projects, users and API keys: records in the object store, and nothing else.

An organisation is a tenant. Lists read the records themselves: administration is rare, and a list
without an index cannot be wrong.
"""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, TypeVar

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.admin_types import CreateKey, CreateOrg, CreateProject, CreateUser, UpdateOrg
from luthier_core.auth import key_hmac, key_id, new_api_key
from luthier_core.blobs import BlobMissing, Blobs
from luthier_core.errors import BadRequest, NotFound
from luthier_core.records import (
    ApiKeyRecord,
    Identity,
    OrgRecord,
    ProjectRecord,
    Record,
    UserRecord,
)
from luthier_registry.record_store import KEY_HMAC, KEY_ID, SLUG, RecordStore, check_id

R = TypeVar("R", bound=Record)

READS_AT_ONCE = 32


class Identities(RecordStore):
    """Who may do what."""

    def __init__(
        self, blobs: Blobs, client: redis.Redis, secret: bytes, *, clock: Callable[[], datetime]
    ) -> None:
        super().__init__(blobs, client, clock=clock)
        self._secret = secret

    # --- organisations ----------------------------------------------------------------------------

    async def create_org(self, wanted: CreateOrg) -> OrgRecord:
        record = OrgRecord(
            org_id=wanted.org_id,
            name=wanted.name or wanted.org_id,
            created_at=self._clock(),
            limits=wanted.limits,
        )
        return await self._create_new(
            keys.org_record(wanted.org_id), record, f"org_id={wanted.org_id!r}"
        )

    async def org(self, org_id: str) -> OrgRecord:
        check_id(SLUG, org_id, "org_id")
        return await self._read(OrgRecord, keys.org_record(org_id), f"org_id={org_id!r}")

    async def orgs(self) -> list[OrgRecord]:
        return [record for _, record in await self._all(OrgRecord, "orgs/")]

    async def update_org(self, org_id: str, wanted: UpdateOrg) -> OrgRecord:
        await self.org(org_id)
        changes = {name: getattr(wanted, name) for name in wanted.model_fields_set}
        key = keys.org_record(org_id)
        return await self._update(
            OrgRecord, key, f"org_id={org_id!r}", lambda now: now.model_copy(update=changes)
        )

    # --- projects and users -----------------------------------------------------------------------

    async def create_project(self, org_id: str, wanted: CreateProject) -> ProjectRecord:
        await self.org(org_id)
        record = ProjectRecord(
            project_id=wanted.project_id,
            name=wanted.name or wanted.project_id,
            created_at=self._clock(),
        )
        key = keys.project_record(org_id, wanted.project_id)
        return await self._create_new(key, record, f"project_id={wanted.project_id!r}")

    async def projects(self, org_id: str) -> list[ProjectRecord]:
        await self.org(org_id)
        found = await self._all(ProjectRecord, f"t/{org_id}/projects/")
        return [record for _, record in found]

    async def create_user(self, org_id: str, wanted: CreateUser) -> UserRecord:
        await self.org(org_id)
        record = UserRecord(**wanted.model_dump(), created_at=self._clock())
        key = keys.user_record(org_id, wanted.user_id)
        return await self._create_new(key, record, f"user_id={wanted.user_id!r}")

    async def users(self, org_id: str) -> list[UserRecord]:
        await self.org(org_id)
        return [record for _, record in await self._all(UserRecord, f"t/{org_id}/users/")]

    async def delete_user(self, org_id: str, user_id: str) -> int:
        """Take the user away and revoke every key of theirs; how many those were."""
        check_id(SLUG, user_id, "user_id")
        key = keys.user_record(org_id, user_id)
        await self._read(UserRecord, key, f"user_id={user_id!r}")
        revoked = 0
        for name, record in await self._keys_of(org_id):
            if record.user_id == user_id and record.revoked_at is None:
                await self._revoke(name)
                revoked += 1
        await self._blobs.delete(key)  # last: a try that died before is repeated whole
        return revoked

    # --- API keys ---------------------------------------------------------------------------------

    async def identity(self, key_name: str) -> Identity:
        """What the key may do; NotFound once it is revoked or expired, or its tenant disabled."""
        check_id(KEY_HMAC, key_name, "key")
        key = await self._read(ApiKeyRecord, keys.api_key_record(key_name), "key")
        if key.revoked_at is not None or _is_over(key.expires_at, self._clock()):
            raise NotFound("key")
        try:
            org = await self._read(OrgRecord, keys.org_record(key.tenant), "org")
        except NotFound:  # a tenant that only its keys name, as `luthier up` makes them
            return Identity(key=key)
        if org.disabled:
            raise NotFound("key")
        return Identity(
            key=key, email=await self._email(key.tenant, key.user_id), tenant_limits=org.limits
        )

    async def create_key(self, org_id: str, wanted: CreateKey) -> dict[str, Any]:
        """A new key, with the key itself: it is shown here and nowhere else."""
        await self.org(org_id)
        if wanted.project_id is not None:
            key = keys.project_record(org_id, wanted.project_id)
            await self._read(ProjectRecord, key, f"project_id={wanted.project_id!r}")
        if wanted.user_id is not None:
            key = keys.user_record(org_id, wanted.user_id)
            await self._read(UserRecord, key, f"user_id={wanted.user_id!r}")
        now = self._clock()
        days = wanted.expires_in_days
        record = ApiKeyRecord(
            tenant=org_id,
            scopes=wanted.scopes,
            created_at=now,
            name=wanted.name,
            note=wanted.note,
            project_id=wanted.project_id,
            user_id=wanted.user_id,
            limits=wanted.limits,
            expires_at=None if days is None else now + timedelta(days=days),
        )
        secret_key = new_api_key()
        name = key_hmac(self._secret, secret_key)
        await self._create(keys.api_key_record(name), record)
        return {**_shown(name, record), "key": secret_key}

    async def keys_of(self, org_id: str) -> list[dict[str, Any]]:
        """Every key of the organisation, ended ones too, in order of creation."""
        found = await self._keys_of(org_id)
        found.sort(key=lambda item: item[1].created_at)
        return [_shown(name, record) for name, record in found]

    async def revoke_of(self, org_id: str, wanted_id: str) -> dict[str, Any]:
        """End one key of the organisation for good; a repeat is no error."""
        check_id(KEY_ID, wanted_id, "key_id")
        async for info in self._blobs.list(f"keys/{wanted_id}"):
            name = _name_of(info.key)
            record = await self._read(ApiKeyRecord, info.key, "key")
            if record.tenant == org_id:
                return _shown(name, await self._revoke(name))
        raise NotFound(f"key_id={wanted_id!r}")

    async def revoke(self, key_name: str) -> ApiKeyRecord:
        """End a key for good; NotFound if it is nobody's, or no longer."""
        await self.identity(key_name)
        return await self._revoke(key_name)

    async def _revoke(self, key_name: str) -> ApiKeyRecord:
        ending = {"revoked_at": self._clock()}
        return await self._update(
            ApiKeyRecord,
            keys.api_key_record(key_name),
            "key",
            lambda now: now.model_copy(update=ending) if now.revoked_at is None else now,
        )

    # --- plumbing ---------------------------------------------------------------------------------

    async def _email(self, tenant: str, user_id: str | None) -> str:
        if user_id is None:
            return ""
        try:
            return (await self._read(UserRecord, keys.user_record(tenant, user_id), "user")).email
        except NotFound:
            return ""

    async def _keys_of(self, org_id: str) -> list[tuple[str, ApiKeyRecord]]:
        found = await self._all(ApiKeyRecord, "keys/")
        return [(_name_of(key), record) for key, record in found if record.tenant == org_id]

    async def _create_new(self, key: str, record: R, what: str) -> R:
        """The record, stored; a repeat of the same request returns it, another is BadRequest."""
        there = await self._create(key, record)
        if there.model_copy(update={"created_at": None}) != record.model_copy(
            update={"created_at": None}
        ):
            raise BadRequest(f"{what} exists already, and is another one")
        return there

    async def _all(self, kind: type[R], prefix: str) -> list[tuple[str, R]]:
        """(object key, record) of every object below the prefix, in the order of keys."""
        found = [info.key async for info in self._blobs.list(prefix)]
        turns = asyncio.Semaphore(READS_AT_ONCE)

        async def read(key: str) -> tuple[str, R] | None:
            async with turns:
                try:
                    return key, kind.from_bytes(await self._blobs.get(key))
                except BlobMissing:  # deleted since
                    return None

        return [item for item in await asyncio.gather(*map(read, found)) if item is not None]


async def tenants(blobs: Blobs) -> list[str]:
    """Every tenant there has been: of an organisation, or of a key."""
    found = {_org_of(info.key) async for info in blobs.list("orgs/")}
    async for info in blobs.list("keys/"):
        found.add(ApiKeyRecord.from_bytes(await blobs.get(info.key)).tenant)
    return sorted(found)


def _org_of(record_key: str) -> str:
    return record_key.removeprefix("orgs/").removesuffix(".json")


def _is_over(end: datetime | None, now: datetime) -> bool:
    return end is not None and end <= now


def _name_of(record_key: str) -> str:
    return record_key.removeprefix("keys/").removesuffix(".json")


def _shown(name: str, record: ApiKeyRecord) -> dict[str, Any]:
    """A key as the admin REST shows it: by its id, never its HMAC."""
    fields = record.to_dict()
    del fields["format"], fields["tenant"]
    return {"key_id": key_id(name), **fields}
