"""HTTP client of the registry: one method per call, errors as the exceptions they were there.

Every call may be repeated (the registry creates if absent), so a broken connection is tried again.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import orjson

from luthier_core import errors
from luthier_core.auth import service_token
from luthier_core.caller import CALLER, REFUSAL
from luthier_core.config import Config
from luthier_core.errors import BodyTooLarge, ConfigError, LuthierError, NotFound, Unavailable
from luthier_core.records import (
    CheckpointRecord,
    Identity,
    Record,
    RunRecord,
    SamplerRecord,
    SessionRecord,
    UploadRecord,
)

R = TypeVar("R", bound=Record)

MAX_BODY_BYTES = 1024 * 1024
"""Largest request that the registry reads."""
TENANT_HEADER = "X-Luthier-Tenant"
ACTOR_HEADER = "X-Luthier-Actor"
"""Id of the API key on whose behalf the gateway calls."""
PROJECT_HEADER = "X-Luthier-Project"
"""Project of that key, percent-encoded, if it has one."""

MAX_TRIES = 12
"""Some 8 s in all while nothing listens: a parent restarts the registry sooner than that."""
TIMEOUT_S = 15.0
"""Of one try: the registry waits up to 10 s for Redis."""


class RegistryClient:
    """`async with` opens and closes its connections. Unavailable if the registry is not there."""

    def __init__(self, config: Config) -> None:
        url = urlsplit(config.registry_url)
        self._socket = url.path if url.scheme == "unix" else ""
        if not self._socket and url.scheme not in ("http", "https"):
            raise ConfigError(
                f"registry_url: {config.registry_url!r} is not unix:///path or http://host:port"
            )
        self._base = "http://registry" if self._socket else config.registry_url.rstrip("/")
        self._authorization = f"Bearer {service_token(config.secret())}"
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        connector = aiohttp.UnixConnector(self._socket) if self._socket else aiohttp.TCPConnector()
        self._http = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S, sock_connect=2),
            headers={"Authorization": self._authorization},
        )
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._http.close()

    async def ready(self) -> None:
        """Unavailable unless the registry, its Redis and its object store answer; asked once."""
        await self._call("GET", "/readyz", max_tries=1)

    async def get_key(self, key_hmac: str) -> Identity:
        """Whose key this is and what it may do; NotFound if nobody's, or no longer."""
        return await self._record(Identity, "GET", f"/keys/{path_part(key_hmac)}")

    async def revoke_key(self, key_hmac: str) -> None:
        """End the key for good; NotFound if it is nobody's."""
        await self._call("DELETE", f"/keys/{path_part(key_hmac)}")

    # --- sessions ---------------------------------------------------------------------------------

    async def create_session(
        self,
        tenant: str,
        *,
        tags: Sequence[str] = (),
        user_metadata: Mapping[str, Any] | None = None,
        sdk_version: str = "",
        project_id: str | None = None,
        display_name: str | None = None,
        idempotency_key: str | None = None,
    ) -> SessionRecord:
        """A new session, or the one made before under this idempotency key."""
        body = {
            "tags": list(tags),
            "user_metadata": user_metadata,
            "sdk_version": sdk_version,
            "project_id": project_id,
            "display_name": display_name,
            "idempotency_key": idempotency_key,
        }
        return await self._record(SessionRecord, "POST", "/sessions", tenant, body)

    async def get_session(self, tenant: str, session_id: str) -> SessionRecord:
        return await self._record(
            SessionRecord, "GET", f"/sessions/{path_part(session_id)}", tenant
        )

    async def describe_session(self, tenant: str, session_id: str) -> dict[str, Any]:
        """training_run_ids, sampler_ids, user_metadata, display_name (wire protocol 8.2)."""
        session = await self._object("GET", f"/sessions/{path_part(session_id)}", tenant)
        wanted = ("training_run_ids", "sampler_ids", "user_metadata", "display_name")
        return {name: session[name] for name in wanted}

    async def list_sessions(self, tenant: str, *, limit: int, offset: int) -> dict[str, Any]:
        return await self._object("GET", f"/sessions?{_page(limit, offset)}", tenant)

    async def heartbeat(self, tenant: str, session_id: str) -> SessionRecord:
        """Note that the client is alive; the record says whether the session is."""
        path = f"/sessions/{path_part(session_id)}/heartbeat"
        return await self._record(SessionRecord, "POST", path, tenant)

    async def finish_session(
        self, tenant: str, session_id: str, *, reason: str, detail: str | None = None
    ) -> SessionRecord:
        path = f"/sessions/{path_part(session_id)}/finish"
        body = {"reason": reason, "detail": detail}
        return await self._record(SessionRecord, "POST", path, tenant, body)

    async def trace(self, tenant: str, session_id: str) -> str | None:
        """Object key of the session's timeline; None while it is being made."""
        answer = await self._object("POST", f"/sessions/{path_part(session_id)}/trace", tenant)
        key: str | None = answer["key"]
        return key

    async def set_project(self, tenant: str, session_id: str, project_id: str) -> None:
        path = f"/sessions/{path_part(session_id)}/project"
        await self._call("PUT", path, tenant, {"project_id": project_id})

    async def search_sessions(self, tenant: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """sessions and next_cursor (wire protocol 8.4)."""
        return await self._object("POST", "/sessions/search", tenant, wanted)

    # --- training runs and checkpoints ------------------------------------------------------------

    async def create_run(
        self,
        tenant: str,
        *,
        session_id: str,
        model_seq_id: int,
        base_model: str | None = None,
        lora_config: Mapping[str, Any] | None = None,
        optimizer_config: Mapping[str, Any] | None = None,
        user_metadata: Mapping[str, str] | None = None,
        source_path: str | None = None,
        access_tenant: str | None = None,
    ) -> RunRecord:
        """The run's facts with its seed drawn. With source_path its LoRA is the checkpoint's.

        `access_tenant`: one whose checkpoints the caller may read beside its own.
        """
        body: dict[str, Any] = {
            "session_id": session_id,
            "model_seq_id": model_seq_id,
            "base_model": base_model,
            "optimizer_config": optimizer_config,
            "user_metadata": user_metadata,
            "source_path": source_path,
            "access_tenant": access_tenant,
        }
        if lora_config is not None:
            body["lora_config"] = lora_config
        if refusal := REFUSAL.get():
            body["refusal"] = refusal.detail
        return await self._record(RunRecord, "POST", "/runs", tenant, body)

    async def describe_run(
        self, tenant: str, run_id: str, *, accessible: bool = False
    ) -> dict[str, Any]:
        """The TrainingRun object of wire protocol 8.1; `accessible`: of any run that is public."""
        return await self._object(
            "GET", f"/runs/{path_part(run_id)}?accessible={accessible:d}", tenant
        )

    async def list_runs(
        self, tenant: str, *, limit: int, offset: int, project_id: str | None = None
    ) -> dict[str, Any]:
        chosen = "" if project_id is None else f"&project_id={quote(project_id, safe='')}"
        return await self._object("GET", f"/runs?{_page(limit, offset)}{chosen}", tenant)

    async def list_run_checkpoints(self, tenant: str, run_id: str) -> dict[str, Any]:
        """All of them; of another tenant's run those that are published."""
        return await self._object("GET", f"/runs/{path_part(run_id)}/checkpoints", tenant)

    async def list_checkpoints(
        self, tenant: str, *, limit: int, offset: int, external: bool = True
    ) -> dict[str, Any]:
        """One page, with external weights or without."""
        query = f"{_page(limit, offset)}&external={external:d}"
        return await self._object("GET", f"/checkpoints?{query}", tenant)

    async def delete_checkpoint(self, tenant: str, run_id: str, kind: str, name: str) -> None:
        await self._call("DELETE", _checkpoint(run_id, kind, name), tenant)

    async def publish(self, tenant: str, run_id: str, kind: str, name: str) -> None:
        await self._call("POST", f"{_checkpoint(run_id, kind, name)}/publish", tenant)

    async def unpublish(self, tenant: str, run_id: str, kind: str, name: str) -> None:
        await self._call("DELETE", f"{_checkpoint(run_id, kind, name)}/publish", tenant)

    async def set_ttl(
        self, tenant: str, run_id: str, kind: str, name: str, ttl_seconds: int | None
    ) -> None:
        """Let the checkpoint expire so many seconds from now, or never."""
        path = f"{_checkpoint(run_id, kind, name)}/ttl"
        await self._call("PUT", path, tenant, {"ttl_seconds": ttl_seconds})

    async def checkpoint_files(
        self, tenant: str, run_id: str, kind: str, name: str
    ) -> dict[str, str]:
        """File name -> object key of what a download holds."""
        answer = await self._object("GET", f"{_checkpoint(run_id, kind, name)}/files", tenant)
        files: dict[str, str] = answer["files"]
        return files

    async def archive(self, tenant: str, run_id: str, kind: str, name: str) -> str:
        """Object key of the tar of those files; Unavailable while it is being made."""
        answer = await self._object("POST", f"{_checkpoint(run_id, kind, name)}/archive", tenant)
        return str(answer["key"])

    async def resolve(
        self, tenant: str, tinker_path: str, *, access_tenant: str | None = None
    ) -> CheckpointRecord:
        """What the path stands for now; NotFound if the tenant may not read it or it has expired.

        `access_tenant`: one whose checkpoints the caller may read beside its own.
        """
        body = {"tinker_path": tinker_path, "access_tenant": access_tenant}
        return await self._record(CheckpointRecord, "POST", "/resolve", tenant, body)

    async def weights_info(self, tenant: str, tinker_path: str) -> dict[str, Any]:
        return await self._object("POST", "/weights_info", tenant, {"tinker_path": tinker_path})

    async def copy_weights(self, tenant: str, wanted: Mapping[str, Any]) -> str:
        """The tinker:// path of the copy. Unavailable while it is being made: ask again."""
        answer = await self._object("POST", "/copy_weights", tenant, wanted)
        return str(answer["tinker_path"])

    async def keep_last(self, tenant: str, run_id: str) -> dict[str, Any]:
        """How many checkpoints of each kind the run keeps; 0: all."""
        return await self._object("GET", f"/runs/{path_part(run_id)}/keep_last", tenant)

    async def set_keep_last(self, tenant: str, run_id: str, keep_last: int | None) -> None:
        """None: what the configuration says."""
        path = f"/runs/{path_part(run_id)}/keep_last"
        await self._call("PUT", path, tenant, {"keep_last": keep_last})

    # --- uploads ----------------------------------------------------------------------------------

    async def create_upload(self, tenant: str, wanted: Mapping[str, Any]) -> UploadRecord:
        """What is about to be uploaded; under one idempotency key always the same."""
        return await self._record(UploadRecord, "POST", "/uploads", tenant, wanted)

    async def upload(self, tenant: str, upload_id: str) -> tuple[UploadRecord, list[str]]:
        """What was announced; and the paths of its checkpoints once it has come."""
        answer = await self._object("GET", f"/uploads/{path_part(upload_id)}", tenant)
        return UploadRecord.model_validate(answer["upload"]), answer["paths"]

    async def adopt_upload(
        self, tenant: str, upload_id: str, switches: Mapping[str, bool]
    ) -> list[str]:
        """The paths of the checkpoints that its files, which are stored, now are."""
        path = f"/uploads/{path_part(upload_id)}/adopt"
        answer = await self._object("POST", path, tenant, switches)
        paths: list[str] = answer["paths"]
        return paths

    # --- samplers ---------------------------------------------------------------------------------

    async def create_sampler(
        self,
        tenant: str,
        *,
        session_id: str,
        sampling_session_seq_id: int,
        base_model: str | None = None,
        model_path: str | None = None,
    ) -> SamplerRecord:
        body = {
            "session_id": session_id,
            "sampling_session_seq_id": sampling_session_seq_id,
            "base_model": base_model,
            "model_path": model_path,
        }
        return await self._record(SamplerRecord, "POST", "/samplers", tenant, body)

    async def get_sampler(self, tenant: str, sampling_session_id: str) -> SamplerRecord:
        path = f"/samplers/{path_part(sampling_session_id)}"
        return await self._record(SamplerRecord, "GET", path, tenant)

    async def admin(
        self, method: str, path: str, tenant: str = "", body: Any = None
    ) -> dict[str, Any]:
        """One call of the admin REST: the gateway forwards it as it is, below /admin."""
        return await self._object(method, f"/admin{path}", tenant, body)

    # --- plumbing ---------------------------------------------------------------------------------

    async def _record(
        self, kind: type[R], method: str, path: str, tenant: str = "", body: Any = None
    ) -> R:
        return kind.from_bytes(await self._call(method, path, tenant, body))

    async def _object(
        self, method: str, path: str, tenant: str, body: Any = None
    ) -> dict[str, Any]:
        answer: dict[str, Any] = orjson.loads(await self._call(method, path, tenant, body))
        return answer

    async def _call(
        self,
        method: str,
        path: str,
        tenant: str = "",
        body: Any = None,
        *,
        max_tries: int = MAX_TRIES,
    ) -> bytes:
        """The body of a 200; what the registry raised; Unavailable after max_tries."""
        data = orjson.dumps(body) if body is not None else None
        if data is not None and len(data) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"metadata of {len(data)} bytes; at most {MAX_BODY_BYTES}")
        headers = {TENANT_HEADER: tenant} if tenant else {}
        if caller := CALLER.get():
            headers[ACTOR_HEADER] = caller.key_id
            if caller.project_id is not None:
                headers[PROJECT_HEADER] = quote(caller.project_id, safe="")
        for attempt in range(max_tries):
            if attempt:
                await asyncio.sleep(random.uniform(0.05, 0.4) * min(attempt, 4))
            try:
                async with self._http.request(
                    method, self._base + path, data=data, headers=headers
                ) as response:
                    answer = await response.read()
                    if response.status == 200:
                        return answer
                    raise _error(response.status, answer)
            except (aiohttp.ClientError, TimeoutError, OSError):
                continue
        raise Unavailable("the registry")


def _error(status: int, body: bytes) -> LuthierError:
    """What the registry raised, by the name of its class; Unavailable for what it did not say."""
    try:
        answer = orjson.loads(body)
        kind = getattr(errors, answer["error"])
        if issubclass(kind, LuthierError):
            error: LuthierError = kind(answer["detail"])
            return error
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return Unavailable(f"the registry answered {status}")


_MAX_NAME_CHARS = 256


def path_part(text: str) -> str:
    """One part of a path, whatever a client put into it.

    NotFound for what would walk the path, and for what is too long to be a name: the registry could
    not read such a request line.
    """
    if text in ("", ".", "..") or len(text) > _MAX_NAME_CHARS:
        raise NotFound(repr(text[:100]))
    return quote(text, safe=":")


def _checkpoint(run_id: str, kind: str, name: str) -> str:
    return f"/runs/{path_part(run_id)}/checkpoints/{path_part(kind)}/{path_part(name)}"


def _page(limit: int, offset: int) -> str:
    return f"limit={limit}&offset={offset}"
