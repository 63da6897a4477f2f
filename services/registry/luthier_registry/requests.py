"""Bodies of the registry's own REST, checked once at its edge."""

from typing import Any, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from luthier_core.errors import InvalidField, Unreadable
from luthier_core.records import FinishReason


class Body(BaseModel):
    """Unknown fields are ignored: a newer gateway may send more."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CreateSession(Body):
    tags: tuple[str, ...] = ()
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None
    idempotency_key: str | None = Field(None, min_length=1, max_length=500)


class FinishSession(Body):
    reason: FinishReason
    detail: str | None = None


class WantedLora(Body):
    """As a client asks for it: the seed may be left to the server."""

    rank: int = Field(32, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


class CreateRun(Body):
    session_id: str
    model_seq_id: int = Field(ge=0, lt=10**10)
    base_model: str | None = None
    lora_config: WantedLora = WantedLora()
    optimizer_config: dict[str, Any] | None = None
    user_metadata: dict[str, str] | None = None
    source_path: str | None = None
    access_tenant: str | None = None
    refusal: str | None = None
    """Why no new run may be made just now."""


class CreateSampler(Body):
    session_id: str
    sampling_session_seq_id: int = Field(ge=0, lt=10**10)
    base_model: str | None = None
    model_path: str | None = None


class Path(Body):
    """A path, and another tenant whose checkpoints the caller may read beside its own."""

    tinker_path: str
    access_tenant: str | None = None


class SetTtl(Body):
    ttl_seconds: int | None = None


class SetProject(Body):
    project_id: str = Field(min_length=1, max_length=200)


class CopyWeights(Body):
    """Into a project, or as run `model_seq_id` of a session."""

    source_path: str
    ttl_seconds: int | None = None
    destination_project_id: str | None = Field(None, min_length=1, max_length=200)
    session_id: str | None = None
    model_seq_id: int | None = Field(None, ge=0, lt=10**10)
    access_tenant: str | None = None
    idempotency_key: str | None = Field(None, min_length=1, max_length=500)


class SetKeepLast(Body):
    keep_last: int | None = Field(None, ge=0)


class CreateUpload(Body):
    """The gateway has checked the configuration."""

    base_model: str
    adapter_config: dict[str, Any]
    num_bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    name: str
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    project_id: str | None = None
    idempotency_key: str | None = Field(None, min_length=1, max_length=500)


class AdoptUpload(Body):
    """What the weights that have come are on."""

    train_attn: bool
    train_mlp: bool
    train_unembed: bool


class SearchOwner(Body):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: tuple[str, ...] = ()


class StatusQuery(Body):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: tuple[FinishReason, ...] | None = None


class SearchCursor(Body):
    last_created_at: AwareDatetime
    last_session_id: str


class SearchSessions(Body):
    """As in wire protocol 8.4."""

    session_id: str | None = None
    project_ids: tuple[str, ...] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = None
    owner: SearchOwner = SearchOwner()
    statuses: tuple[StatusQuery, ...] | None = None
    limit: int = Field(50, ge=1, le=200)
    cursor: SearchCursor | None = None


B = TypeVar("B", bound=Body)


def parse(kind: type[B], data: bytes) -> B:
    """The body; Unreadable if it is no JSON, InvalidField that names each wrong field."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        if problems[0]["type"] == "json_invalid":
            raise Unreadable(problems[0]["msg"]) from None
        raise InvalidField(
            "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems)
        ) from None
