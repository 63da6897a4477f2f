"""Records that live as JSON objects in the store: frozen, versioned, unknown keys ignored.

Every change of one is a create-if-absent or a compare-and-swap (design 6). Times carry an offset
and come from the caller's clock.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

CheckpointKind = Literal["weights", "sampler_weights", "external_weights", "ephemeral"]
FinishReason = Literal["success", "errored", "interrupted"]

USER_SCOPES = ("read", "train", "sample")
SCOPES = (*USER_SCOPES, "admin", "operator")
"""`admin` is over its own organisation, `operator` over all of them."""

_CHECKPOINT_TYPES = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


def as_strings(metadata: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Metadata as the wire has it: what was no string is its JSON."""
    if metadata is None:
        return None
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in metadata.items()
    }


class Record(BaseModel):
    """A JSON object of the store. pydantic's ValidationError if one does not fit its format."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1

    def to_bytes(self) -> bytes:
        """The same bytes for equal records."""
        return self.model_dump_json().encode()

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for a record inside another message."""
        return self.model_dump(mode="json")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        return cls.model_validate_json(data)


class LoraConfig(BaseModel):
    """Which LoRA a run trains, with its seed drawn."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


class SessionRecord(Record):
    """`sessions/{session}.json`: one ServiceClient."""

    session_id: str
    tenant: str
    created_at: AwareDatetime
    tags: tuple[str, ...] = ()
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    key_id: str = ""
    """Of the API key that created it: usage of the session counts for this key."""
    display_name: str | None = None
    status: Literal["active", "finished"] = "active"
    finish_reason: FinishReason | None = None
    finish_detail: str | None = None

    def row(self) -> dict[str, Any]:
        """What a search looks at (wire protocol 8.4), in the record's own terms."""
        kept = ("session_id", "created_at", "project_id", "display_name", "user_metadata")
        return self.model_dump(
            mode="json", include={*kept, "key_id", "status", "finish_reason", "finish_detail"}
        )


class RunRecord(Record):
    """`runs/{run}/run.json`: facts of a training run, written before its op 0 is admitted."""

    run_id: str
    tenant: str
    session_id: str
    base_model: str
    lora: LoraConfig
    optimizer_config: dict[str, Any]
    user_metadata: dict[str, str] | None = None
    created_at: AwareDatetime
    source_path: str | None = None
    """tinker:// path of the checkpoint that the run was created from."""
    trainable: bool = True
    """False for a run that only holds a copy of a checkpoint."""

    def row(self) -> dict[str, Any]:
        """The TrainingRun object of wire protocol 8.1, as far as this record knows it."""
        return {
            "training_run_id": self.run_id,
            "base_model": self.base_model,
            "model_owner": self.tenant,
            "is_lora": True,
            "corrupted": False,
            "lora_rank": self.lora.rank,
            "last_request_time": self.created_at.isoformat(),
            "user_metadata": self.user_metadata,
        }


class RecoveryRecord(Record):
    """`runs/{run}/recovered/{epoch}.json`: how a run came back after it had lost its owner."""

    epoch: int
    at: AwareDatetime
    cause: str
    worker: str
    """The trainer that has it since."""
    from_seq: int
    """Of the state that it began with; -1 for none."""
    to_seq: int
    """The last op whose result was out: those between were executed again."""
    outcome: Literal["exact", "approximate", "lost"]
    """exact: every digest of the state was as before. approximate: in `fused` execution, losses
    and gradient norms were, up to `deviation`. lost: it could not be rebuilt."""
    deviation: float = 0.0
    """The largest relative difference of a loss (per token) or gradient norm."""
    reason: str = ""
    seconds: float
    """From the take-over until new ops were executed."""


class CheckpointRecord(Record):
    """`names/{run}/{kind}/{name}.json`: a name, and the checkpoint it stands for."""

    tenant: str
    run_id: str
    kind: CheckpointKind
    name: str
    seq: int
    """The op that saved it."""
    manifest_key: str
    manifest_digest: str
    """sha256 of the manifest's bytes."""
    size_bytes: int
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    base_model: str
    lora: LoraConfig

    @property
    def row_id(self) -> str:
        """How the lists name it."""
        return f"{self.run_id}/{self.kind}/{self.name}"

    @property
    def tinker_path(self) -> str:
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"

    def row(self) -> dict[str, Any]:
        """The Checkpoint object of wire protocol 8.1."""
        return {
            "checkpoint_id": f"{self.kind}/{self.name}",
            "checkpoint_type": _CHECKPOINT_TYPES[self.kind],
            "time": self.created_at.isoformat(),
            "tinker_path": self.tinker_path,
            "size_bytes": self.size_bytes,
            "public": self.public,
            "user_metadata": self.user_metadata,
            "expires_at": self.expires_at.isoformat() if self.expires_at else None,
        }


class SamplerRecord(Record):
    """`samplers/{sampling session}.json`: which weights a sampling session samples from."""

    sampling_session_id: str
    tenant: str
    session_id: str
    base_model: str
    model_path: str | None = None
    """tinker:// path; None for a base model and for ephemeral weights."""
    weights: str = ""
    """Object key of the checkpoint's manifest; empty for the base model."""
    inflight_run: str = ""
    """Run whose newest in-flight weights it follows, instead of those it was made with."""
    created_at: AwareDatetime


class UploadRecord(Record):
    """`uploads/{upload}.json`: an adapter that a client has announced, with a checked config."""

    upload_id: str
    """Also the session that will hold it."""
    tenant: str
    base_model: str
    adapter_config: dict[str, Any]
    num_bytes: int
    """Of the weights."""
    sha256: str
    name: str
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    """Of the checkpoint, not of the upload."""
    user_metadata: dict[str, str] | None = None
    project_id: str | None = None
    key_id: str = ""

    @property
    def run_id(self) -> str:
        """The run that will hold the checkpoint."""
        return f"{self.upload_id}:train:0"


class RetentionRecord(Record):
    """`retention/{run}.json`: how many checkpoints of each kind the run keeps; 0: all."""

    run_id: str
    keep_last: int = Field(ge=0)


class PublishedRunRecord(Record):
    """`published/{run}.json`: the tenant whose run this is. What is public, its names say."""

    tenant: str


class Limits(BaseModel):
    """What a key, or a whole organisation, may use; None is no limit.

    Rates and queues are refused with 429 for as long as they last. What is used up (tokens,
    storage, money) is refused until its period is over.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_s: float | None = Field(None, gt=0)
    queued_bytes: int | None = Field(None, ge=0)
    """Payload bytes of ops that wait in the queues of all its runs."""
    concurrent_runs: int | None = Field(None, ge=0)
    trained_tokens_per_day: int | None = Field(None, ge=0)
    sampled_tokens_per_day: int | None = Field(None, ge=0)
    """Prompt tokens that were computed, and generated tokens. A day is one of UTC."""
    stored_bytes: int | None = Field(None, ge=0)
    usd_per_month: float | None = Field(None, ge=0)
    """By the prices of the configuration; what has none costs nothing."""

    @model_validator(mode="before")
    @classmethod
    def _has_known_names(cls, given: Any) -> Any:
        """`extra="forbid"`, which would not tell the names there are."""
        for name in given if isinstance(given, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(f"{name!r} is none of {', '.join(cls.model_fields)}")
        return given


NO_LIMITS = Limits()


class ApiKeyRecord(Record):
    """`keys/{hmac}.json`: what an API key may do. The key itself is stored nowhere."""

    tenant: str
    scopes: tuple[str, ...] = USER_SCOPES
    created_at: AwareDatetime
    name: str = ""
    note: str = ""
    project_id: str | None = None
    """What the key creates belongs to this project; None: to any."""
    user_id: str | None = None
    limits: Limits = NO_LIMITS
    expires_at: AwareDatetime | None = None
    revoked_at: AwareDatetime | None = None
    """The record stays: a key that is configured again must not come back to life."""


class OrgRecord(Record):
    """`orgs/{org}.json`: a tenant."""

    org_id: str
    name: str
    created_at: AwareDatetime
    disabled: bool = False
    """None of its keys is believed any more."""
    limits: Limits = NO_LIMITS
    """Of all its keys together."""


class ProjectRecord(Record):
    """`t/{org}/projects/{project}.json`."""

    project_id: str
    name: str
    created_at: AwareDatetime


class UserRecord(Record):
    """`t/{org}/users/{user}.json`: a person whose keys carry the name."""

    user_id: str
    email: str
    name: str = ""
    created_at: AwareDatetime


class Identity(Record):
    """What the gateway has to know about a key: itself, and its organisation's limits."""

    key: ApiKeyRecord
    email: str = ""
    tenant_limits: Limits = NO_LIMITS
