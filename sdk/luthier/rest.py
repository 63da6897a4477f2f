"""RestClient: what the server keeps of training runs, checkpoints, sessions and usage."""

import asyncio
from collections.abc import Callable, Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from luthier import types
from luthier._loop import operation, value_of
from luthier.errors import LuthierError
from luthier.session import Session
from luthier.settings import read_settings
from luthier.uploads import read_upload

M = TypeVar("M", bound=BaseModel)
AccessScope = Literal["owned", "accessible"]
AuditEvents = Literal["all", "checkpoints", "projects", "teams", "organizations"]

TRACE_RETRY_S = 5.0
TRACE_TIMEOUT_S = 600.0


class RestClient:
    """Bookkeeping calls. From ServiceClient.create_rest_client, or on its own: it makes no session.

    Every method returns an APIFuture, its `_async` form the value. NotFoundError for what is not
    there or is somebody else's; ValueError for a path that is none.
    """

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        _session: Session | None = None,
    ) -> None:
        self._session = _session or Session(read_settings(base_url, api_key))

    async def _get(
        self, model: type[M], path: str, query: Mapping[str, str | int | None] | None = None
    ) -> M:
        given = {name: value for name, value in (query or {}).items() if value is not None}
        return (await self._session.transport.call("GET", path, query=given)).parsed(model)

    async def _send(
        self,
        method: str,
        path: str,
        value: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        await self._session.transport.call(method, path, value, headers=headers)

    # --- server -----------------------------------------------------------------------------------

    @operation
    async def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The base models of the server."""
        return await self._get(types.GetServerCapabilitiesResponse, "get_server_capabilities")

    get_server_capabilities_async = value_of(get_server_capabilities)

    @operation
    async def health(self) -> types.HealthResponse:
        """Whether every part of the server works; InternalServerError says which does not."""
        return await self._get(types.HealthResponse, "healthz")

    health_async = value_of(health)

    # --- training runs ----------------------------------------------------------------------------

    @operation
    async def get_training_run(
        self, training_run_id: types.ModelID, access_scope: AccessScope = "owned"
    ) -> types.TrainingRun:
        """One training run."""
        query = {"access_scope": access_scope}
        return await self._get(types.TrainingRun, f"training_runs/{training_run_id}", query)

    get_training_run_async = value_of(get_training_run)

    @operation
    async def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> types.TrainingRun:
        """The training run that a checkpoint is of."""
        run = types.ParsedCheckpointTinkerPath.from_tinker_path(tinker_path).training_run_id
        query = {"access_scope": access_scope}
        return await self._get(types.TrainingRun, f"training_runs/{run}", query)

    get_training_run_by_tinker_path_async = value_of(get_training_run_by_tinker_path)

    @operation
    async def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        project_id: str | None = None,
    ) -> types.TrainingRunsResponse:
        """A page of training runs, latest activity first."""
        return await self._get(
            types.TrainingRunsResponse,
            "training_runs",
            {
                "limit": limit,
                "offset": offset,
                "access_scope": access_scope,
                "project_id": project_id,
            },
        )

    list_training_runs_async = value_of(list_training_runs)

    @operation
    async def get_run_metrics(
        self, training_run_id: types.ModelID, after: int = -1, limit: int = 100
    ) -> types.RunMetricsResponse:
        """A page of what the requests of a run have reported, from the one after seq `after` on."""
        query = {"after": after, "limit": limit}
        path = f"training_runs/{training_run_id}/metrics"
        return await self._get(types.RunMetricsResponse, path, query)

    get_run_metrics_async = value_of(get_run_metrics)

    @operation
    async def cancel_queued(self, training_run_id: types.ModelID) -> types.CancelQueuedResponse:
        """Lets everything that the run has queued fail, so that it is free for what comes next.

        The request that is being executed ends as it would.
        """
        path = f"training_runs/{training_run_id}/cancel_queued"
        return (await self._session.transport.call("POST", path)).parsed(types.CancelQueuedResponse)

    cancel_queued_async = value_of(cancel_queued)

    # --- checkpoints ------------------------------------------------------------------------------

    @operation
    async def list_checkpoints(
        self, training_run_id: types.ModelID
    ) -> types.CheckpointsListResponse:
        """All checkpoints of one run."""
        path = f"training_runs/{training_run_id}/checkpoints"
        return await self._get(types.CheckpointsListResponse, path)

    list_checkpoints_async = value_of(list_checkpoints)

    @operation
    async def list_user_checkpoints(
        self, limit: int = 100, offset: int = 0
    ) -> types.CheckpointsListResponse:
        """A page of the checkpoints of all your runs, newest first."""
        query = {"limit": limit, "offset": offset}
        return await self._get(types.CheckpointsListResponse, "checkpoints", query)

    list_user_checkpoints_async = value_of(list_user_checkpoints)

    @operation
    async def delete_checkpoint(self, training_run_id: types.ModelID, checkpoint_id: str) -> None:
        """Deletes it for good. checkpoint_id: `weights/<name>` and its like."""
        await self._send("DELETE", f"training_runs/{training_run_id}/checkpoints/{checkpoint_id}")

    delete_checkpoint_async = value_of(delete_checkpoint)

    @operation
    async def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> None:
        """Deletes it for good."""
        await self._send("DELETE", _checkpoint(tinker_path))

    delete_checkpoint_from_tinker_path_async = value_of(delete_checkpoint_from_tinker_path)

    @operation
    async def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> None:
        """Lets everybody with a key of this server load it."""
        await self._send("POST", f"{_checkpoint(tinker_path)}/publish", {})

    publish_checkpoint_from_tinker_path_async = value_of(publish_checkpoint_from_tinker_path)

    @operation
    async def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> None:
        """Takes a publication back."""
        await self._send("DELETE", f"{_checkpoint(tinker_path)}/publish")

    unpublish_checkpoint_from_tinker_path_async = value_of(unpublish_checkpoint_from_tinker_path)

    @operation
    async def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: int | None
    ) -> None:
        """Lets it expire so many seconds from now; None keeps it."""
        value = {"ttl_seconds": ttl_seconds}
        await self._send("PUT", f"{_checkpoint(tinker_path)}/ttl", value)

    set_checkpoint_ttl_from_tinker_path_async = value_of(set_checkpoint_ttl_from_tinker_path)

    @operation
    async def set_keep_last(self, training_run_id: types.ModelID, keep_last: int | None) -> None:
        """Keeps only the newest checkpoints of each kind; 0: all, None: as the server does.

        The others expire. What is published, recovery checkpoints and external weights stay.
        """
        path = f"training_runs/{training_run_id}/keep_last"
        await self._send("PUT", path, {"keep_last": keep_last})

    set_keep_last_async = value_of(set_keep_last)

    @operation
    async def get_weights_info_by_tinker_path(self, tinker_path: str) -> types.WeightsInfoResponse:
        """Base model and LoRA configuration of a checkpoint."""
        response = await self._session.transport.call(
            "POST", "weights_info", {"tinker_path": tinker_path}
        )
        return response.parsed(types.WeightsInfoResponse)

    get_weights_info_by_tinker_path_async = value_of(get_weights_info_by_tinker_path)

    @operation
    async def get_checkpoint_archive_url(
        self, training_run_id: types.ModelID, checkpoint_id: str
    ) -> types.CheckpointArchiveUrlResponse:
        """Where to fetch the checkpoint as a tar; waits while it is being built."""
        path = f"training_runs/{training_run_id}/checkpoints/{checkpoint_id}/archive"
        return await self._get(types.CheckpointArchiveUrlResponse, path)

    get_checkpoint_archive_url_async = value_of(get_checkpoint_archive_url)

    @operation
    async def get_checkpoint_archive_url_from_tinker_path(
        self, tinker_path: str
    ) -> types.CheckpointArchiveUrlResponse:
        """Where to fetch the checkpoint as a tar; waits while it is being built."""
        path = f"{_checkpoint(tinker_path)}/archive"
        return await self._get(types.CheckpointArchiveUrlResponse, path)

    get_checkpoint_archive_url_from_tinker_path_async = value_of(
        get_checkpoint_archive_url_from_tinker_path
    )

    @operation
    async def get_external_weights_urls(
        self, tinker_path: str
    ) -> types.ExternalWeightsUrlsResponse:
        """Where to fetch the files of weights that save_weights_external saved."""
        path = f"{_checkpoint(tinker_path)}/external_weights_urls"
        return await self._get(types.ExternalWeightsUrlsResponse, path)

    get_external_weights_urls_async = value_of(get_external_weights_urls)

    @operation
    async def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> str:
        """The path of a copy, in another project or in your own."""
        token = weights_access_token
        response = await self._session.transport.call(
            "POST",
            "copy_weights",
            {
                "source_path": path,
                "destination_project_id": destination_project_id,
                "ttl_seconds": ttl_seconds,
            },
            headers={"X-Tinker-Weights-Access-Token": token} if token else None,
        )
        return response.parsed(types.CopyWeightsResponse).tinker_path

    copy_weights_async = value_of(copy_weights)

    @operation
    async def upload_checkpoint(
        self,
        folder: str | Path,
        base_model: str | None = None,
        name: str | None = None,
        *,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> types.UploadedCheckpoint:
        """Makes a checkpoint of a PEFT adapter in a folder, to train on and to sample from.

        base_model and name: what its configuration, and its folder, are called if None. on_progress
        is called with the bytes that were sent and that there are; on a background thread.
        ValueError if a file is missing; BadRequestError says what does not fit the base model.
        """
        upload = await asyncio.to_thread(read_upload, Path(folder))
        transport = self._session.transport
        created = await transport.call(
            "POST",
            "uploads",
            {
                "base_model": base_model or upload.base_model,
                "adapter_config": upload.config,
                "num_bytes": upload.num_bytes,
                "sha256": upload.sha256,
                "name": name or upload.name,
                "ttl_seconds": ttl_seconds,
                "user_metadata": user_metadata,
                "project_id": project_id,
            },
        )
        sent = await transport.call(
            "PUT",
            f"uploads/{created.text_field('upload_id')}",
            body=lambda: upload.pieces(on_progress or _nothing),
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Length": str(upload.num_bytes),
            },
            timeout_s=upload.timeout_s,
        )
        return sent.parsed(types.UploadedCheckpoint)

    upload_checkpoint_async = value_of(upload_checkpoint)

    # --- sessions ---------------------------------------------------------------------------------

    @operation
    async def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> types.ListSessionsResponse:
        """Ids of a page of sessions."""
        query = {"limit": limit, "offset": offset, "access_scope": access_scope}
        return await self._get(types.ListSessionsResponse, "sessions", query)

    list_sessions_async = value_of(list_sessions)

    @operation
    async def get_session(
        self, session_id: str, access_scope: AccessScope = "owned"
    ) -> types.GetSessionResponse:
        """What a session owns."""
        query = {"access_scope": access_scope}
        return await self._get(types.GetSessionResponse, f"sessions/{session_id}", query)

    get_session_async = value_of(get_session)

    @operation
    async def get_session_queue(self, session_id: str) -> types.SessionQueueResponse:
        """Why runs of a session wait."""
        return await self._get(types.SessionQueueResponse, f"sessions/{session_id}/queue")

    get_session_queue_async = value_of(get_session_queue)

    @operation
    async def search_sessions(
        self, request: types.SessionSearchRequest
    ) -> types.SessionSearchResponse:
        """Sessions that match, newest first."""
        value = request.model_dump(mode="json", exclude_none=True)
        response = await self._session.transport.call("POST", "sessions/search", value)
        return response.parsed(types.SessionSearchResponse)

    search_sessions_async = value_of(search_sessions)

    @operation
    async def assign_session_project(self, session_id: str, project_id: str) -> None:
        """Moves a session, and what it owns, to a project."""
        await self._send("PUT", f"sessions/{session_id}/project", {"project_id": project_id})

    assign_session_project_async = value_of(assign_session_project)

    @operation
    async def export_session_trace(self, session_id: str) -> str:
        """URL of the session's trace, once it is ready; LuthierError if it cannot be made."""
        async with asyncio.timeout(TRACE_TIMEOUT_S):
            while True:
                path = f"sessions/{session_id}/trace_export"
                export = await self._get(types.TraceExportResponse, path)
                if export.url is not None:
                    return export.url
                if export.status != "pending":
                    raise LuthierError(f"trace of {session_id}: {export.error or export.status}")
                await asyncio.sleep(TRACE_RETRY_S)

    export_session_trace_async = value_of(export_session_trace)

    @operation
    async def get_sampler(self, sampler_id: str) -> types.GetSamplerResponse:
        """What a sampling session samples from."""
        return await self._get(types.GetSamplerResponse, f"samplers/{sampler_id}")

    get_sampler_async = value_of(get_sampler)

    # --- usage ------------------------------------------------------------------------------------

    @operation
    async def get_billing_usage(
        self, starting_on: datetime | str, ending_before: datetime | str
    ) -> types.BillingUsageResponse:
        """Usage between two full hours (UTC), at most 14 days apart."""
        query = {"starting_on": _iso(starting_on), "ending_before": _iso(ending_before)}
        return await self._get(types.BillingUsageResponse, "billing/usage/events", query)

    get_billing_usage_async = value_of(get_billing_usage)

    @operation
    async def get_current_checkpoint_storage_usage(
        self, project_id: str | None = None
    ) -> types.CurrentCheckpointStorageUsageResponse:
        """What your checkpoints take up now."""
        return await self._get(
            types.CurrentCheckpointStorageUsageResponse,
            "billing/usage/checkpoints/current",
            {"project_id": project_id},
        )

    get_current_checkpoint_storage_usage_async = value_of(get_current_checkpoint_storage_usage)

    @operation
    async def get_audit_log(
        self, event_type: AuditEvents = "all", day: date | None = None
    ) -> types.AuditLogResponse:
        """What was done on a day (UTC); None is today."""
        query = {"event_type": event_type, "day": None if day is None else day.isoformat()}
        return await self._get(types.AuditLogResponse, "audit", query)

    get_audit_log_async = value_of(get_audit_log)


def _checkpoint(tinker_path: str) -> str:
    parsed = types.ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
    return f"training_runs/{parsed.training_run_id}/checkpoints/{parsed.checkpoint_id}"


def _nothing(num_sent: int, num_bytes: int) -> None:
    pass


def _iso(moment: datetime | str) -> str:
    return moment if isinstance(moment, str) else moment.isoformat()
