"""Wire types of the bookkeeping calls: requests (wire protocol 2.5 and 8)."""

from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, model_validator

from luthier_core.types import Int32, TtlSeconds, WireModel

ProjectId = Annotated[str, Field(min_length=1, max_length=200)]
ReasonType = Literal["success", "errored", "interrupted"]


class SetTtl(WireModel):
    """PUT .../ttl: from now; absent or null takes the expiry away."""

    ttl_seconds: TtlSeconds | None = None


class SetProject(WireModel):
    """PUT sessions/{id}/project."""

    project_id: ProjectId


class CopyWeights(WireModel):
    """POST copy_weights: into a project, or (SDK 0.26.2 to 0.33) as a run of a session."""

    source_path: str
    ttl_seconds: TtlSeconds | None = None
    destination_project_id: ProjectId | None = None
    session_id: str | None = None
    model_seq_id: Int32 | None = None
    weights_access_token: str | None = None

    @model_validator(mode="after")
    def _has_one_destination(self) -> Self:
        in_session = self.session_id is not None and self.model_seq_id is not None
        if in_session == (self.destination_project_id is not None):
            raise ValueError("give destination_project_id, or else session_id and model_seq_id")
        return self


class SetKeepLast(WireModel):
    """PUT .../keep_last: of each kind; 0 is all of them, null what the server's default is."""

    keep_last: int | None = Field(ge=0, le=10_000)


class CreateUpload(WireModel):
    """POST uploads: what is about to be sent."""

    base_model: str
    adapter_config: dict[str, Any]
    """PEFT's adapter_config.json."""
    num_bytes: int = Field(ge=1, lt=2**50)
    """Of adapter_model.safetensors."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    name: str
    """Of the checkpoint."""
    ttl_seconds: TtlSeconds | None = None
    user_metadata: dict[str, str] | None = None
    project_id: ProjectId | None = None


class SearchOwner(WireModel):
    """Whose sessions."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] = Field([], max_length=10)

    @model_validator(mode="after")
    def _names_users(self) -> Self:
        if self.type == "user" and not self.owner_urns:
            raise ValueError("owner_urns: 1 to 10 are required")
        return self


class StatusQuery(WireModel):
    """Sessions of one status; `reasons` only of client_finished."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[ReasonType] | None = Field(None, min_length=1)


class SearchCursor(WireModel):
    """Where the next page begins."""

    last_created_at: AwareDatetime
    last_session_id: str


class SearchSessions(WireModel):
    """POST sessions/search: all must hold, but of an id and a name together one is enough."""

    session_id: str | None = None
    project_ids: list[str] | None = Field(None, max_length=1000)
    user_metadata: dict[str, str] = Field(default_factory=dict)
    display_name: str | None = Field(None, min_length=1)
    owner: SearchOwner = SearchOwner()
    statuses: list[StatusQuery] | None = Field(None, min_length=1, max_length=100)
    limit: int = Field(50, ge=1, le=200)
    cursor: SearchCursor | None = None
