"""What a server knows: models, sessions, training runs, checkpoints."""

from datetime import datetime

from luthier.types._base import CheckpointType, ModelID, ResponseBase
from luthier.types.params import AdamOptimizerConfig, OptimizerConfig

_SEGMENTS: dict[str, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


class ModelData(ResponseBase):
    """What a run trains: architecture, base model, where its tokenizer lies."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


class GetInfoResponse(ResponseBase):
    """A training run as its client sees it."""

    model_data: ModelData
    model_id: ModelID
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None
    optimizer_config: OptimizerConfig = AdamOptimizerConfig()


class SupportedModel(ResponseBase):
    """A base model of the server; max_context_length in tokens."""

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


class GetServerCapabilitiesResponse(ResponseBase):
    """The base models of the server."""

    supported_models: list[SupportedModel]


class HealthResponse(ResponseBase):
    """`ok` if every part works."""

    status: str


class Checkpoint(ResponseBase):
    """A saved state. checkpoint_id: `weights/<name>`, `sampler_weights/<name>`, ..."""

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


class ParsedCheckpointTinkerPath(ResponseBase):
    """The parts of a `tinker://<run>/<kind>/<name>`."""

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> "ParsedCheckpointTinkerPath":
        """ValueError, with the form it must have, for anything else."""
        scheme, _, rest = tinker_path.partition("://")
        run, *segments = rest.split("/")
        if (
            scheme != "tinker"
            or not run
            or len(segments) != 2
            or segments[0] not in _SEGMENTS
            or not segments[1]
        ):
            raise ValueError(
                f"{tinker_path!r} is no path of a checkpoint: tinker://<run>/<kind>/<name> with "
                f"the kind {', '.join(_SEGMENTS)}"
            )
        return cls(
            tinker_path=tinker_path,
            training_run_id=run,
            checkpoint_type=_SEGMENTS[segments[0]],
            checkpoint_id="/".join(segments),
        )


class Cursor(ResponseBase):
    """Which part of a list this is."""

    offset: int
    limit: int
    total_count: int


class CheckpointsListResponse(ResponseBase):
    """A page of checkpoints, newest first; without a cursor: all of one run."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class CheckpointArchiveUrlResponse(ResponseBase):
    """Where to fetch a checkpoint as a tar, without a key, until `expires`."""

    url: str
    expires: datetime


class ExternalWeightsUrlsResponse(ResponseBase):
    """Relative file path -> where to fetch it, without a key, until `expires`."""

    urls: dict[str, str]
    expires: datetime


class Recovery(ResponseBase):
    """The run had lost its trainer, and was rebuilt: outcome is exact, approximate or lost."""

    at: datetime
    cause: str
    worker: str
    from_seq: int
    to_seq: int
    outcome: str
    deviation: float = 0.0
    """Of an approximate one: the largest relative difference of a loss or gradient norm."""
    reason: str = ""
    seconds: float


class TrainingRun(ResponseBase):
    """A training run of yours. training_run_id is the model_id of its client."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool = False
    lora_rank: int | None = None
    last_request_time: datetime
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None
    recovered: list[Recovery] | None = None
    """Latest first; only asked for by the run's id."""


class TrainingRunsResponse(ResponseBase):
    """A page of training runs, latest activity first."""

    training_runs: list[TrainingRun]
    cursor: Cursor


class WeightsInfoResponse(ResponseBase):
    """What is needed to load a checkpoint."""

    base_model: str
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    optimizer_config: OptimizerConfig = AdamOptimizerConfig()


class GetSamplerResponse(ResponseBase):
    """What a sampling session samples from; model_path only of saved weights."""

    sampler_id: str
    base_model: str
    model_path: str | None = None
    tokenizer_id: str | None = None
    """Where its tokenizer lies, if the server says so; else base_model tells."""


class GetSessionResponse(ResponseBase):
    """What a session owns."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


class ListSessionsResponse(ResponseBase):
    """Ids of a page of sessions."""

    sessions: list[str]


class CopyWeightsResponse(ResponseBase):
    """Path of the copy."""

    tinker_path: str


class UploadedCheckpoint(ResponseBase):
    """An adapter that was uploaded: a training checkpoint, and the same weights for sampling."""

    tinker_path: str
    sampler_path: str


class TraceExportResponse(ResponseBase):
    """Whether a trace is ready, and where it then is."""

    status: str
    url: str | None = None
    error: str | None = None


class WhoamiResponse(ResponseBase):
    """Whose credential this is."""

    user_urn: str
    org_urn: str
    email: str | None = None
