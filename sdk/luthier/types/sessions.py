"""Searching sessions (wire protocol 8.4)."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from luthier.types._base import ResponseBase, StrictBase

ClientSessionFinishReasonType = Literal["success", "errored", "interrupted"]


class OwnSearchOwner(StrictBase):
    """Your own sessions."""

    type: Literal["own"] = "own"


class AccessibleSearchOwner(StrictBase):
    """All sessions that you may see."""

    type: Literal["accessible"] = "accessible"


class UserSearchOwner(StrictBase):
    """The sessions of these users; 1 to 10 of them."""

    owner_urns: list[str]
    type: Literal["user"] = "user"


SearchOwner = Annotated[
    OwnSearchOwner | AccessibleSearchOwner | UserSearchOwner, Field(discriminator="type")
]


class ActiveSessionStatusQuery(StrictBase):
    """Sessions whose client is there."""

    type: Literal["active"] = "active"


class CancelledSessionStatusQuery(StrictBase):
    """Sessions whose client has gone without a word."""

    type: Literal["cancelled"] = "cancelled"


class FailedSessionStatusQuery(StrictBase):
    """Sessions that the server ended."""

    type: Literal["failed"] = "failed"


class ClientFinishedSessionStatusQuery(StrictBase):
    """Sessions that their client ended, with one of these reasons or with any."""

    reasons: list[ClientSessionFinishReasonType] | None = None
    type: Literal["client_finished"] = "client_finished"


SessionStatusQuery = Annotated[
    ActiveSessionStatusQuery
    | CancelledSessionStatusQuery
    | FailedSessionStatusQuery
    | ClientFinishedSessionStatusQuery,
    Field(discriminator="type"),
]


class SessionSearchCursor(StrictBase):
    """Where the next page begins."""

    last_created_at: AwareDatetime
    last_session_id: str


class SessionSearchRequest(StrictBase):
    """What to look for: everything given must match. limit: 1 to 200."""

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = Field(default_factory=dict)
    display_name: str | None = None
    owner: SearchOwner = OwnSearchOwner()
    statuses: list[SessionStatusQuery] | None = None
    limit: int = 50
    cursor: SessionSearchCursor | None = None


class SessionFinishReason(ResponseBase):
    """How a client ended its session."""

    type: ClientSessionFinishReasonType


class SessionActive(ResponseBase):
    """The client is there."""

    type: Literal["active"] = "active"


class SessionCancelled(ResponseBase):
    """The client has gone without a word."""

    type: Literal["cancelled"] = "cancelled"
    detail: str | None = None


class ClientSessionFinished(ResponseBase):
    """The client ended it."""

    type: Literal["client_finished"] = "client_finished"
    reason: SessionFinishReason
    detail: str | None = None


class SessionFailed(ResponseBase):
    """The server ended it. `reason` names the request, training run or sampling session."""

    type: Literal["failed"] = "failed"
    category: Literal["user", "internal"]
    message: str
    reason: dict[str, str]


SessionStatus = Annotated[
    SessionActive | SessionCancelled | ClientSessionFinished | SessionFailed,
    Field(discriminator="type"),
]


class SessionSummary(ResponseBase):
    """One session that was found."""

    session_id: str
    created_at: datetime
    owner: str
    project_id: str
    status: SessionStatus | None = None
    checkpoints_count: int
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None
    checkpoint_storage_bytes: int | None = None


class SessionSearchResponse(ResponseBase):
    """A page of sessions, newest first."""

    sessions: list[SessionSummary]
    next_cursor: SessionSearchCursor | None = None
