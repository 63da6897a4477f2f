"""Wire types of the Tinker API: one pydantic model per JSON request, and small response builders.

The style of every SDK release is taken (wire protocol 1.8): `type` may be missing, null means
absent, unknown fields are ignored, and the protocol's defaults are applied here. A field that is
known but not supported is refused when it has a non-default value, never ignored.
"""

import reprlib
from typing import Annotated, Any, Literal, Self, TypeVar

import orjson
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from luthier_core.errors import InvalidField, Unreadable, Unsupported
from luthier_core.part_limits import check_json_parts

Int32 = Annotated[int, Field(ge=0, lt=2**31)]
Int64 = Annotated[int, Field(ge=0, lt=2**63)]
SeqId = Annotated[int, Field(ge=1, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+-]{0,127}$")]
TtlSeconds = Annotated[int, Field(ge=3600, le=10 * 366 * 24 * 3600)]
Metadata = dict[str, Any]
TokenIds = Annotated[list[int], FailFast()]
"""Stops at the first wrong element: a million wrong ones must not become a million messages."""
Strings = Annotated[list[str], FailFast()]
W = TypeVar("W", bound="WireModel")

MAX_JSON_DEPTH = 32
MAX_JSON_NAMES = 4096
"""Names in one object; each wrong value among them is a message."""
MAX_STOPS = 1024
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 80
"""Of a wrong value this much is shown, whatever its size."""


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
    """The JSON object in a body; Unreadable if it is none, too deep, or has too many parts."""
    check_json_parts(body)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Unreadable(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Unreadable("the JSON must be an object")
    _check_form(value)
    return value


def _check_form(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner: list[Any] = []
        for container in level:
            if type(container) is dict and len(container) > MAX_JSON_NAMES:
                raise Unreadable(f"a JSON object has more than {MAX_JSON_NAMES} names")
            items = container.values() if type(container) is dict else container
            inner += [item for item in items if type(item) is dict or type(item) is list]
        if not inner:
            return
        level = inner
    raise Unreadable(f"the JSON is nested more than {MAX_JSON_DEPTH} levels deep")


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
        got = "" if item["type"] == "missing" else f", got {_SHOWN.repr(item['input'])[:80]}"
        clauses.append(f"{where}: {item['msg']}{got}")
    return "; ".join(clauses)


# --- sessions -------------------------------------------------------------------------------------


class CreateSession(WireModel):
    """POST create_session."""

    tags: Strings = []
    user_metadata: Metadata = {}
    sdk_version: str = "unknown"
    project_id: str | None = None
    display_name: str | None = None


class CreateCustomLoss(WireModel):
    """POST /api/v1/create_custom_loss; loss_graph.py says what inputs and graph may be."""

    session_id: str
    custom_loss_seq_id: int
    name: str
    inputs: list[dict[str, Any]]
    graph: dict[str, Any]


class SessionHeartbeat(WireModel):
    """POST session_heartbeat."""

    session_id: str


class FinishReason(WireModel):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(WireModel):
    """POST sessions/{id}/finish."""

    reason: FinishReason
    detail: str | None = None


# --- model input ----------------------------------------------------------------------------------


def chunk_type(chunk: dict[str, Any]) -> str:
    """The type of a chunk; SDKs up to 0.16.1 leave it out, so its fields tell (wire protocol 1.8).

    The image chunk of SDKs up to 0.5.1 has a field `tokens` too, which is its number of them.
    """
    if isinstance(named := chunk.get("type"), str):
        return named
    for name, field in (("image", "data"), ("image_asset_pointer", "location"), ("dmel", "dmel")):
        if field in chunk:
            return name
    return "encoded_text" if "tokens" in chunk else next(iter(chunk), "empty")


class TextChunk(WireModel):
    """Token ids. Chunks of other types are refused with their type named."""

    tokens: TokenIds


class ModelInput(WireModel):
    """Chunks; some clients give `tokens` or `input_ids` in their place."""

    chunks: Annotated[list[TextChunk], FailFast()]

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in ("tokens", "input_ids"):
            if value.get("chunks") is None and value.get(name) is not None:
                return {"chunks": [{"tokens": value[name]}]}
        chunks = value.get("chunks")
        for chunk in chunks if isinstance(chunks, list) else ():
            if isinstance(chunk, dict) and (kind := chunk_type(chunk)) != "encoded_text":
                raise ValueError(f"chunk of type {kind!r} is not supported; use encoded_text")
        return value

    def to_ints(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens]


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
    """POST create_model. Some clients call the base model `model_name`."""

    session_id: str
    model_seq_id: Int32
    base_model: str = Field(validation_alias=AliasChoices("base_model", "model_name"))
    user_metadata: Metadata = {}
    lora_config: LoraConfig = LoraConfig()
    optimizer_config: OptimizerConfig = OptimizerConfig()
    checkpoint_path: str | None = None
    rlve_config: Metadata | None = None
    wandb_config: Metadata | None = None

    def refuse_unsupported(self) -> None:
        self.optimizer_config.refuse_unsupported()
        if self.checkpoint_path is not None:
            raise Unsupported("checkpoint_path: send load_weights with session_id and model_seq_id")
        for name in ("rlve_config", "wandb_config"):
            if getattr(self, name) is not None:
                raise Unsupported(f"{name}: that is the client's part; leave it out")


class ModelId(WireModel):
    """POST get_info."""

    model_id: str


class TensorData(WireModel):
    """Flat, row-major values; absent shape: 1-D. With CSR indices: the non-zeros of a 2-D tensor.

    Values are checked when they become bytes, all at once.
    """

    data: list[Any]
    dtype: Literal["float32", "int64", "float64", "int32", "bool"] = "float32"
    shape: Annotated[list[Int64], FailFast()] = []
    sparse_crow_indices: list[Any] | None = None
    sparse_col_indices: list[Any] | None = None

    @model_validator(mode="after")
    def _has_both_indices(self) -> Self:
        if (self.sparse_crow_indices is None) != (self.sparse_col_indices is None):
            raise ValueError("sparse_crow_indices and sparse_col_indices belong together")
        return self


class Datum(WireModel):
    """One training example."""

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]


class ForwardBackwardInput(WireModel):
    """What SDKs up to 0.24.1 send as `forward_backward_input`, or `forward_input` to /forward."""

    data: Annotated[list[Datum], FailFast()]
    loss_fn: str
    loss_fn_config: dict[str, float | str] = {}


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

    `kind` inflight: all such samplers of the run move on to what is saved last (6.1).
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


class SaveWeightsExternal(WireModel):
    """POST save_weights_external: PEFT files for download."""

    model_id: str
    seq_id: SeqId
    path: Name
    ttl_seconds: TtlSeconds | None = None
    age_encryption_recipients: list[str] | None = None

    def refuse_unsupported(self) -> None:
        if self.age_encryption_recipients:
            raise Unsupported(
                "age_encryption_recipients: the files are not encrypted; leave it out"
            )


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


class TinkerPath(WireModel):
    """POST weights_info."""

    tinker_path: str


# --- sampling -------------------------------------------------------------------------------------


class CreateSamplingSession(WireModel):
    """POST create_sampling_session: of a base model, or of saved weights, with or without it."""

    session_id: str
    sampling_session_seq_id: Int32
    base_model: str | None = None
    model_path: str | None = None

    @model_validator(mode="after")
    def _names_weights(self) -> Self:
        if self.base_model is None and self.model_path is None:
            raise ValueError("base_model or model_path is required")
        return self


class JoinSamplingSession(WireModel):
    """POST join_sampling_session: by a copy of the client that has it."""

    sampling_session_id: str


class SamplingParams(WireModel):
    """How to sample. stop: absent = EOS; [] = nothing stops; else strings or token ids."""

    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(-1, ge=-1)
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @field_validator("stop", mode="before")
    @classmethod
    def _limit_stops(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop sequences")
        return value


class Sample(WireModel):
    """POST asample."""

    sampling_session_id: str
    seq_id: Int64
    prompt: ModelInput
    num_samples: int = Field(1, ge=1)
    sampling_params: SamplingParams = SamplingParams()
    prompt_logprobs: bool = Field(
        False, validation_alias=AliasChoices("prompt_logprobs", "include_prompt_logprobs")
    )
    topk_prompt_logprobs: int = Field(0, ge=0, le=100)
    topk_sample_logprobs: int = Field(0, ge=0, le=100)
    target_prompt_logprobs: Metadata | None = None
    """A TensorData; PromptTargets reads it."""
    prompt_alt_tokens_k: int = Field(0, ge=0, le=100)
    prompt_logprobs_last_n: int | None = Field(None, ge=1)

    def refuse_unsupported(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self.sampling_params, name):
                raise Unsupported(f"sampling_params.{name}: leave it out")


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
    retrieved_request_ids: Strings = Field([], max_length=10_000)


class CancelFuture(WireModel):
    """POST cancel_future."""

    request_id: str
