"""Audit log and usage (wire protocol 8.2 and 8.5). Costs are in US dollars, None where unknown."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.types._base import ResponseBase


class AuditLogEntry(ResponseBase):
    """One thing that somebody did."""

    timestamp: datetime
    event: str
    event_details: dict[str, Any] = Field(default_factory=dict)
    model_id: str | None = None
    tinker_path: str | None = None
    purpose: str | None = None


class AuditLogResponse(ResponseBase):
    """What was done on one day."""

    entries: list[AuditLogEntry]


class OpMetrics(ResponseBase):
    """What one request of a run has reported; losses in nats.

    seq: its number in the run; state: `completed`, `failed` (error says why), or `expired`; kind:
    its endpoint, with `forward` apart from `forward_backward`.
    """

    seq: int
    state: str
    kind: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    error: str | None = None


class RunMetricsResponse(ResponseBase):
    """A page of a run's requests in their order; the next one is after last_seq."""

    entries: list[OpMetrics]
    last_seq: int


class WaitingRun(ResponseBase):
    """A run with requests that wait: how many, since when, what for.

    num_parked: of those that came before an earlier one of their run did; worker: the trainer that
    has the run.
    """

    run_id: str
    next_seq: int
    num_queued: int
    num_parked: int
    state: str
    waits_for: str
    since_s: float | None = None
    worker: str | None = None


class SessionQueueResponse(ResponseBase):
    """The runs of a session that wait, longest queue first."""

    runs: list[WaitingRun]


class CancelQueuedResponse(ResponseBase):
    """How many requests of a run fail instead of being executed, at most."""

    run_id: str
    num_cancelled: int


class TrainingBillingEvent(ResponseBase):
    """Tokens trained on."""

    token_count: int
    type: Literal["training"] = "training"


class SamplingPrefillBillingEvent(ResponseBase):
    """Prompt tokens."""

    token_count: int
    cached: bool
    type: Literal["sampling_prefill"] = "sampling_prefill"


class SamplingSampleBillingEvent(ResponseBase):
    """Sampled tokens."""

    token_count: int
    type: Literal["sampling_sample"] = "sampling_sample"


class CheckpointBillingEvent(ResponseBase):
    """Checkpoints written."""

    count: int
    type: Literal["checkpoint"] = "checkpoint"


class StorageBillingEvent(ResponseBase):
    """Checkpoints kept."""

    gigabyte_hours: float
    free: bool = False
    type: Literal["storage"] = "storage"


BillingEventInfo = Annotated[
    TrainingBillingEvent
    | SamplingPrefillBillingEvent
    | SamplingSampleBillingEvent
    | CheckpointBillingEvent
    | StorageBillingEvent,
    Field(discriminator="type"),
]


class BillingUsageEvent(ResponseBase):
    """Usage of one kind in one hour."""

    bucket_start: datetime
    bucket_end: datetime
    base_model: str | None = None
    user_id: str | None = None
    user_name: str | None = None
    session_id: str | None = None
    project_id: str | None = None
    estimated_cost_usd: float | None = None
    effective_rate_usd_per_million_tokens: float | None = None
    effective_rate_usd_per_gigabyte_month: float | None = None
    event_info: BillingEventInfo


class BillingUsageSession(ResponseBase):
    """A session that usage belongs to."""

    user_metadata: dict[str, str] | None = None


class BillingUsageResponse(ResponseBase):
    """Usage in a span of time."""

    data: list[BillingUsageEvent]
    sessions: dict[str, BillingUsageSession] = Field(default_factory=dict)
    cost_data_through: datetime | None = None


class CurrentCheckpointStorageUsageItem(ResponseBase):
    """What the checkpoints of one user take up."""

    project_id: str | None = None
    org_user_urn: str | None = None
    user_email: str | None = None
    user_name: str | None = None
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: float | None = None


class CurrentCheckpointStorageUsageResponse(ResponseBase):
    """What all checkpoints take up now."""

    effective_rate_usd_per_gigabyte_month: float | None = None
    data: list[CurrentCheckpointStorageUsageItem]
