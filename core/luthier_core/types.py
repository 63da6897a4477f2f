"""Wire types of the Tinker API: one pydantic model per JSON request, and small response builders.

The style of every SDK release is taken (wire protocol 1.8): `type` may be missing, null means
absent, unknown fields are ignored, and the protocol's defaults are applied here. A field that is
known but not supported is refused when it has a non-default value, never ignored.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from luthier_core.errors import InvalidField, Unreadable, Unsupported

Int32 = Annotated[int, Field(ge=0, lt=2**31)]
Int64 = Annotated[int, Field(ge=0, lt=2**63)]
SeqId = Annotated[int, Field(ge=1, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+-]{0,127}$")]
TtlSeconds = Annotated[int, Field(ge=3600, le=10 * 366 * 24 * 3600)]
Metadata = dict[str, Any]
W = TypeVar("W", bound="WireModel")


class WireModel(BaseModel):
    """Frozen; unknown fields are ignored; null is the same as absent."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value

    def refuse_unsupported(self) -> None:
        """Unsupported, naming the field, if a known field asks for what this server lacks."""

    def to_json(self) -> bytes:
        """Canonical bytes: every field in the model's order, defaults included."""
        return self.model_dump_json().encode()


def parse(model: type[W], body: bytes) -> W:
    """The request in a JSON body.

    Unreadable if it is no JSON object; InvalidField naming each wrong field, its value and what is
    allowed.
    """
    return check(model, read_object(body))


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; Unreadable if it is none."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Unreadable(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Unreadable("the JSON must be an object")
    return value


def check(model: type[W], value: dict[str, Any]) -> W:
    """The request in a parsed JSON object; InvalidField names each wrong field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InvalidField(describe(error)) from None


def describe(error: ValidationError) -> str:
    """One clause per wrong field: its dotted path, what is allowed, what came."""
    clauses = []
    for item in error.errors(include_url=False, include_context=False)[:5]:
        where = ".".join(str(part) for part in item["loc"]) or "body"
        got = "" if item["type"] == "missing" else f", got {repr(item['input'])[:80]}"
        clauses.append(f"{where}: {item['msg']}{got}")
    return "; ".join(clauses)


# --- sessions -------------------------------------------------------------------------------------


class CreateSession(WireModel):
    """POST create_session."""

    tags: list[str] = []
    user_metadata: Metadata = {}
    sdk_version: str = "unknown"
    project_id: str | None = None
    display_name: str | None = None


class SessionHeartbeat(WireModel):
    """POST session_heartbeat."""

    session_id: str


class FinishReason(WireModel):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(WireModel):
    """POST sessions/{id}/finish."""

    reason: FinishReason
    detail: str | None = None


# --- training -------------------------------------------------------------------------------------


class LoraConfig(WireModel):
    """Which adapter to train; the upper bound of the rank is the deployment's."""

    rank: int = Field(32, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise ValueError("one of train_unembed, train_mlp, train_attn must be true")
        return self


class OptimizerConfig(WireModel):
    """Identity of the optimizer, fixed for the life of a run."""

    type: Literal["adamw", "dimuon"] = "adamw"

    def refuse_unsupported(self) -> None:
        if self.type != "adamw":
            raise Unsupported(
                f"optimizer_config.type: {self.type!r} is not implemented; supported is 'adamw'"
            )


class CreateModel(WireModel):
    """POST create_model."""

    session_id: str
    model_seq_id: Int32
    base_model: str
    user_metadata: Metadata = {}
    lora_config: LoraConfig = LoraConfig()
    optimizer_config: OptimizerConfig = OptimizerConfig()

    def refuse_unsupported(self) -> None:
        self.optimizer_config.refuse_unsupported()


class ModelId(WireModel):
    """POST get_info."""

    model_id: str


class AdamParams(WireModel):
    """AdamW's parameters for one step. Decoupled decay; a clip norm of 0 or less is off."""

    learning_rate: float = Field(1e-4, ge=0, allow_inf_nan=False)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-12, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    grad_clip_norm: float = Field(0.0, allow_inf_nan=False)


class OptimStep(WireModel):
    """POST optim_step."""

    model_id: str
    seq_id: SeqId
    adam_params: AdamParams = AdamParams()
    optimizer_params: Metadata | None = None

    def refuse_unsupported(self) -> None:
        if self.optimizer_params is not None:
            raise Unsupported("optimizer_params: this run's optimizer is adamw; send adam_params")


class SaveWeights(WireModel):
    """POST save_weights."""

    model_id: str
    seq_id: SeqId
    path: Name
    ttl_seconds: TtlSeconds | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] = {}


class SaveWeightsForSampler(WireModel):
    """POST save_weights_for_sampler: named with `path`, else for a sampling session.

    `kind` inflight is served as a snapshot, which the protocol allows (6.1).
    """

    model_id: str
    seq_id: SeqId
    path: Name | None = None
    sampling_session_seq_id: Int32 | None = None
    ttl_seconds: TtlSeconds | None = None
    user_metadata: dict[str, str] = {}
    kind: Literal["snapshot", "inflight"] = "snapshot"

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        if self.path is None and self.sampling_session_seq_id is None:
            raise ValueError("path or sampling_session_seq_id is required")
        return self


class LoadWeights(WireModel):
    """POST load_weights: into a run (model_id, seq_id), or as a new one (session_id, ...)."""

    model_id: str | None = None
    seq_id: SeqId | None = None
    session_id: str | None = None
    model_seq_id: Int32 | None = None
    path: str
    optimizer: bool = True
    base_model: str | None = None
    user_metadata: Metadata = {}
    optimizer_config: OptimizerConfig = OptimizerConfig()
    weights_access_token: str | None = None

    @model_validator(mode="after")
    def _addresses_a_run(self) -> Self:
        into = self.model_id is not None and self.seq_id is not None
        new = self.session_id is not None and self.model_seq_id is not None
        if into == new:
            raise ValueError("give model_id and seq_id, or session_id and model_seq_id")
        return self

    def refuse_unsupported(self) -> None:
        self.optimizer_config.refuse_unsupported()
        if self.weights_access_token is not None:
            raise Unsupported("weights_access_token: loading from another account")


class TinkerPath(WireModel):
    """POST weights_info."""

    tinker_path: str


# --- sampling -------------------------------------------------------------------------------------


class CreateSamplingSession(WireModel):
    """POST create_sampling_session: of a base model, or of saved weights."""

    session_id: str
    sampling_session_seq_id: Int32
    base_model: str | None = None
    model_path: str | None = None

    @model_validator(mode="after")
    def _names_weights(self) -> Self:
        if (self.base_model is None) == (self.model_path is None):
            raise ValueError("exactly one of base_model and model_path is required")
        return self


class TextChunk(WireModel):
    """Token ids. Chunks of other types are refused with their type named."""

    tokens: list[int]


class ModelInput(WireModel):
    chunks: list[TextChunk]

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, value: Any) -> Any:
        chunks = value.get("chunks") if isinstance(value, dict) else None
        for chunk in chunks if isinstance(chunks, list) else ():
            if isinstance(chunk, dict) and "tokens" not in chunk:
                kind = chunk.get("type") or next(iter(chunk), "empty")
                raise ValueError(f"chunk of type {kind!r} is not supported; use encoded_text")
        return value

    def to_ints(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens]


class SamplingParams(WireModel):
    """How to sample. stop: absent = EOS; [] = nothing stops; else strings or token ids."""

    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(-1, ge=-1)
    top_p: float = Field(1.0, gt=0, le=1)


class Sample(WireModel):
    """POST asample."""

    sampling_session_id: str
    seq_id: Int64
    prompt: ModelInput
    num_samples: int = Field(1, ge=1)
    sampling_params: SamplingParams = SamplingParams()
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = Field(0, ge=0, le=100)
    topk_sample_logprobs: int = Field(0, ge=0, le=100)
    target_prompt_logprobs: Metadata | None = None
    """A TensorData; PromptTargets reads it."""
    prompt_alt_tokens_k: int = Field(0, ge=0, le=100)
    prompt_logprobs_last_n: int | None = Field(None, ge=1)


class RetrieveFuture(WireModel):
    """POST retrieve_future."""

    request_id: str
    allow_metadata_only: bool = False


class SamplingSessionTarget(WireModel):
    """Whose completions: those of one handle of a sampling session."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: Int64 = 0


class RetrieveFutures(WireModel):
    """POST retrieve_futures. timeout in seconds; absent: as long as the server holds a poll."""

    target: SamplingSessionTarget
    prev_cursor: Int64 = 0
    timeout: float | None = Field(None, ge=0, allow_inf_nan=False)
    retrieved_request_ids: list[str] = Field([], max_length=10_000)


class CancelFuture(WireModel):
    """POST cancel_future."""

    request_id: str
