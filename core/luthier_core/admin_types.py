"""Bodies of the admin REST: checked by the gateway, and again by the registry."""

from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from luthier_core.records import USER_SCOPES, Limits
from luthier_core.types import WireModel

Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""Id of an organisation, project or user: it becomes part of object keys."""
Name = Annotated[str, Field(max_length=200)]
Scope = Literal["read", "train", "sample", "admin", "operator"]
MAX_KEY_DAYS = 3660
DAY = timedelta(days=1)


class CreateOrg(WireModel):
    org_id: Slug
    name: Name = ""
    limits: Limits = Limits()


class UpdateOrg(WireModel):
    """What is absent stays as it is; `limits` are replaced as a whole."""

    name: Name | None = None
    limits: Limits | None = None
    disabled: bool | None = None


class CreateProject(WireModel):
    project_id: Slug
    name: Name = ""


class CreateUser(WireModel):
    user_id: Slug
    email: Annotated[str, Field(pattern=r"^[^@\s]{1,64}@[^@\s]{1,190}$")]
    name: Name = ""


class CreateKey(WireModel):
    name: Name = ""
    note: Name = ""
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)] = USER_SCOPES  # type: ignore[assignment]
    project_id: Slug | None = None
    user_id: Slug | None = None
    limits: Limits = Limits()
    expires_in_days: int | None = Field(None, ge=1, le=MAX_KEY_DAYS)


class AdminAnswer(BaseModel):
    model_config = ConfigDict(extra="allow")


class Org(AdminAnswer):
    org_id: str
    name: str
    disabled: bool
    limits: Limits


class Orgs(AdminAnswer):
    orgs: list[Org]


class Project(AdminAnswer):
    project_id: str
    name: str


class Projects(AdminAnswer):
    projects: list[Project]


class User(AdminAnswer):
    user_id: str
    email: str
    name: str


class Users(AdminAnswer):
    users: list[User]


class Key(AdminAnswer):
    """Never the key itself."""

    key_id: str
    name: str
    scopes: list[str]
    project_id: str | None
    user_id: str | None
    limits: Limits
    created_at: str
    expires_at: str | None
    revoked_at: str | None


class Keys(AdminAnswer):
    keys: list[Key]


class NewKey(Key):
    """With the key itself, this once."""

    key: str


class AuditEntries(AdminAnswer):
    entries: list[dict[str, Any]]


class AuditCheck(AdminAnswer):
    num_entries: int
    intact: bool
    broken_at: int | None


class UsageEvents(AdminAnswer):
    data: list[dict[str, Any]]
    sessions: dict[str, dict[str, Any]]
    cost_data_through: str


class StoredCheckpoints(AdminAnswer):
    effective_rate_usd_per_gigabyte_month: float | None
    data: list[dict[str, Any]]


class RunMetrics(AdminAnswer):
    run_id: str
    entries: list[dict[str, Any]]
    """seq, state, kind and metrics; of a failure the error; of what was executed also worker,
    admitted_ms, begun_ms and ended_ms, since the epoch."""
    last_seq: int
    """Ask on with `after` = this."""


class Jobs(AdminAnswer):
    jobs: list[dict[str, Any]]


class WaitingRun(AdminAnswer):
    run_id: str
    session_id: str
    org_id: str
    next_seq: int
    num_queued: int
    num_parked: int
    """Ops above a gap."""
    state: str
    waits_for: str
    since_s: float | None
    worker: str | None


class SessionQueue(AdminAnswer):
    runs: list[WaitingRun]


class ModelQueue(SessionQueue):
    base_model: str
    workers: list[dict[str, str]]
    num_samples: int
    num_runs: int


class Queues(AdminAnswer):
    models: list[ModelQueue]


class CancelledQueue(AdminAnswer):
    run_id: str
    num_cancelled: int


class MoveRun(WireModel):
    """POST /api/v1/admin/runs/{run_id}/move"""

    to: str | None = None
    """Name of a trainer of the run's base model; None: any other than the one that has it."""


class MovedRun(AdminAnswer):
    run_id: str
    owner: str | None
    to: str


class Drained(AdminAnswer):
    trainer: str
    drained: bool
