"""Answers of the Tinker API in JSON, as its description shows them (wire protocol 2 and 8).

The gateway builds its answers as plain objects; a fuzzer and the contract tests hold them against
these models.
"""

from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict


class Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Error(Answer):
    """Any status of 400 and above but a poll's 408."""

    detail: str
    category: Literal["user", "server", "unknown"] = "unknown"


class Empty(Answer):
    """Nothing to tell."""


class Health(Answer):
    status: Literal["ok"]


class ClientConfig(Answer):
    """Only what differs from the defaults of the SDK."""


class CreatedSession(Answer):
    session_id: str


class TelemetryAccepted(Answer):
    status: Literal["accepted"]


class SupportedModel(Answer):
    model_name: str
    max_context_length: int
    trainable: bool
    sampleable: bool


class ServerCapabilities(Answer):
    supported_models: list[SupportedModel]


class UntypedFuture(Answer):
    """A request that was accepted: its result comes by retrieve_future."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class ModelData(Answer):
    arch: str | None = None
    model_name: str
    tokenizer_id: str | None = None


class ModelInfo(Answer):
    model_id: str
    model_data: ModelData
    is_lora: bool
    lora_rank: int


class CreatedSamplingSession(Answer):
    sampling_session_id: str


class JoinedSamplingSession(Answer):
    client_counter: int


class TryAgain(Answer):
    """408: nothing yet. Poll again at once."""

    type: Literal["try_again"]
    request_id: str
    queue_state: str
    queue_state_reason: str | None = None


class WeightsInfo(Answer):
    base_model: str
    is_lora: bool
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool


class CopiedWeights(Answer):
    tinker_path: str


class KeepLast(Answer):
    keep_last: int


class CreatedUpload(Answer):
    upload_id: str


class UploadedCheckpoint(Answer):
    tinker_path: str
    sampler_path: str


class SamplerInfo(Answer):
    sampler_id: str
    base_model: str
    tokenizer_id: str | None = None
    model_path: str | None = None


class Cursor(Answer):
    offset: int
    limit: int
    total_count: int


class Checkpoint(Answer):
    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler", "external"]
    time: AwareDatetime
    tinker_path: str
    size_bytes: int
    public: bool
    user_metadata: dict[str, str] | None
    expires_at: AwareDatetime | None


class Checkpoints(Answer):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None


class Recovery(Answer):
    """The run had lost its trainer, and was rebuilt."""

    at: AwareDatetime
    cause: str
    worker: str
    epoch: int
    from_seq: int
    """Of the stored state that it began with; -1 for none."""
    to_seq: int
    """The ops after from_seq up to here were executed again."""
    outcome: Literal["exact", "approximate", "lost"]
    deviation: float
    """The largest relative difference of a loss or gradient norm of an approximate one."""
    reason: str
    seconds: float


class TrainingRun(Answer):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool
    lora_rank: int
    last_request_time: AwareDatetime
    last_checkpoint: Checkpoint | None
    last_sampler_checkpoint: Checkpoint | None
    user_metadata: dict[str, str] | None
    recovered: list[Recovery] | None = None
    """Latest first; in lists of runs null."""


class TrainingRuns(Answer):
    training_runs: list[TrainingRun]
    cursor: Cursor


class ArchiveUrl(Answer):
    url: str
    expires: AwareDatetime


class TraceExport(Answer):
    status: Literal["pending", "ready"]
    url: str | None = None
    """Of a file for ui.perfetto.dev, once it is ready."""


class ExternalWeightsUrls(Answer):
    """File name -> link."""

    urls: dict[str, str]
    expires: AwareDatetime


class Sessions(Answer):
    sessions: list[str]


class Session(Answer):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None
    display_name: str | None


class SessionSummary(Answer):
    session_id: str
    created_at: AwareDatetime
    owner: str
    project_id: str
    status: dict[str, Any]
    checkpoints_count: int
    display_name: str | None
    user_metadata: dict[str, str] | None


class SessionPosition(Answer):
    last_created_at: AwareDatetime
    last_session_id: str


class FoundSessions(Answer):
    sessions: list[SessionSummary]
    next_cursor: SessionPosition | None


class OrganisationDetails(Answer):
    name: str


class UserDetails(Answer):
    email: str


class KeyDetails(Answer):
    org_details: OrganisationDetails
    user_details: UserDetails


class OwnKey(Answer):
    key_id: int
    name: str
    note: str
    details: KeyDetails
