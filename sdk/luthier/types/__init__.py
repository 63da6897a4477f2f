"""All public types, by name: what users build, and what servers answer.

Numbers without a unit in their name are counts; times are seconds, log probabilities nats, token
ids those of the model's tokenizer. Requests are the ones that the server itself reads.
"""

from typing import TYPE_CHECKING, Any

from luthier.errors import (
    RequestErrorCategory,
)
from luthier.types._base import (
    CheckpointType,
    LossFnType,
    ModelID,
    RequestID,
    SamplingClientKind,
    StopReason,
    TensorDtype,
)
from luthier.types.catalog import (
    Checkpoint,
    CheckpointArchiveUrlResponse,
    CheckpointsListResponse,
    CopyWeightsResponse,
    Cursor,
    ExternalWeightsUrlsResponse,
    GetInfoResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    HealthResponse,
    ListSessionsResponse,
    ModelData,
    ParsedCheckpointTinkerPath,
    SupportedModel,
    TraceExportResponse,
    TrainingRun,
    TrainingRunsResponse,
    UploadedCheckpoint,
    WeightsInfoResponse,
    WhoamiResponse,
)
from luthier.types.datum import (
    Datum,
    LossFnInputs,
    PromptProvenanceSpan,
    ProvenanceSpans,
    SampledProvenanceSpan,
)
from luthier.types.model_input import (
    DmelChunk,
    EncodedTextChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    ModelInput,
    ModelInputChunk,
)
from luthier.types.params import (
    AdamOptimizerConfig,
    AdamParams,
    DimuonOptimizerConfig,
    DimuonParams,
    LoraConfig,
    OptimizerConfig,
    OptimParams,
    SamplingParams,
)
from luthier.types.results import (
    ForwardBackwardOutput,
    LoadWeightsResponse,
    LossFnOutput,
    OptimStepResponse,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    TopkLogprobs,
)
from luthier.types.sessions import (
    AccessibleSearchOwner,
    ActiveSessionStatusQuery,
    CancelledSessionStatusQuery,
    ClientFinishedSessionStatusQuery,
    ClientSessionFinished,
    ClientSessionFinishReasonType,
    FailedSessionStatusQuery,
    OwnSearchOwner,
    SearchOwner,
    SessionActive,
    SessionCancelled,
    SessionFailed,
    SessionFinishReason,
    SessionSearchCursor,
    SessionSearchRequest,
    SessionSearchResponse,
    SessionStatus,
    SessionStatusQuery,
    SessionSummary,
    UserSearchOwner,
)
from luthier.types.tensor import (
    TensorData,
)
from luthier.types.usage import (
    AuditLogEntry,
    AuditLogResponse,
    BillingEventInfo,
    BillingUsageEvent,
    BillingUsageResponse,
    BillingUsageSession,
    CancelQueuedResponse,
    CheckpointBillingEvent,
    CurrentCheckpointStorageUsageItem,
    CurrentCheckpointStorageUsageResponse,
    OpMetrics,
    RunMetricsResponse,
    SamplingPrefillBillingEvent,
    SamplingSampleBillingEvent,
    SessionQueueResponse,
    StorageBillingEvent,
    TrainingBillingEvent,
    WaitingRun,
)

if TYPE_CHECKING:
    from luthier_core.types import (
        CreateModel as CreateModelRequest,
    )
    from luthier_core.types import (
        CreateSamplingSession as CreateSamplingSessionRequest,
    )
    from luthier_core.types import (
        CreateSession as CreateSessionRequest,
    )
    from luthier_core.types import (
        LoadWeights as LoadWeightsRequest,
    )
    from luthier_core.types import (
        ModelId as GetInfoRequest,
    )
    from luthier_core.types import (
        OptimStep as OptimStepRequest,
    )
    from luthier_core.types import (
        RetrieveFuture as FutureRetrieveRequest,
    )
    from luthier_core.types import (
        RetrieveFutures as FuturesRetrieveRequest,
    )
    from luthier_core.types import (
        Sample as SampleRequest,
    )
    from luthier_core.types import (
        SaveWeights as SaveWeightsRequest,
    )
    from luthier_core.types import (
        SaveWeightsForSampler as SaveWeightsForSamplerRequest,
    )
    from luthier_core.types import (
        SessionHeartbeat as SessionHeartbeatRequest,
    )

__all__ = [
    "AccessibleSearchOwner",
    "ActiveSessionStatusQuery",
    "AdamOptimizerConfig",
    "AdamParams",
    "AuditLogEntry",
    "AuditLogResponse",
    "BillingEventInfo",
    "BillingUsageEvent",
    "BillingUsageResponse",
    "BillingUsageSession",
    "CancelQueuedResponse",
    "CancelledSessionStatusQuery",
    "Checkpoint",
    "CheckpointArchiveUrlResponse",
    "CheckpointBillingEvent",
    "CheckpointType",
    "CheckpointsListResponse",
    "ClientFinishedSessionStatusQuery",
    "ClientSessionFinishReasonType",
    "ClientSessionFinished",
    "CopyWeightsResponse",
    "CreateModelRequest",
    "CreateSamplingSessionRequest",
    "CreateSessionRequest",
    "CurrentCheckpointStorageUsageItem",
    "CurrentCheckpointStorageUsageResponse",
    "Cursor",
    "Datum",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "DmelChunk",
    "EncodedTextChunk",
    "ExternalWeightsUrlsResponse",
    "FailedSessionStatusQuery",
    "ForwardBackwardOutput",
    "FutureRetrieveRequest",
    "FuturesRetrieveRequest",
    "GetInfoRequest",
    "GetInfoResponse",
    "GetSamplerResponse",
    "GetServerCapabilitiesResponse",
    "GetSessionResponse",
    "HealthResponse",
    "ImageAssetPointerChunk",
    "ImageChunk",
    "ListSessionsResponse",
    "LoadWeightsRequest",
    "LoadWeightsResponse",
    "LoraConfig",
    "LossFnInputs",
    "LossFnOutput",
    "LossFnType",
    "ModelData",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "OpMetrics",
    "OptimParams",
    "OptimStepRequest",
    "OptimStepResponse",
    "OptimizerConfig",
    "OwnSearchOwner",
    "ParsedCheckpointTinkerPath",
    "PromptAltTokens",
    "PromptProvenanceSpan",
    "ProvenanceSpans",
    "RequestErrorCategory",
    "RequestID",
    "RunMetricsResponse",
    "SampleRequest",
    "SampleResponse",
    "SampledProvenanceSpan",
    "SampledSequence",
    "SamplingClientKind",
    "SamplingParams",
    "SamplingPrefillBillingEvent",
    "SamplingSampleBillingEvent",
    "SaveWeightsExternalResponse",
    "SaveWeightsForSamplerRequest",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsRequest",
    "SaveWeightsResponse",
    "SearchOwner",
    "SessionActive",
    "SessionCancelled",
    "SessionFailed",
    "SessionFinishReason",
    "SessionHeartbeatRequest",
    "SessionQueueResponse",
    "SessionSearchCursor",
    "SessionSearchRequest",
    "SessionSearchResponse",
    "SessionStatus",
    "SessionStatusQuery",
    "SessionSummary",
    "StopReason",
    "StorageBillingEvent",
    "SupportedModel",
    "TensorData",
    "TensorDtype",
    "TopkLogprobs",
    "TraceExportResponse",
    "TrainingBillingEvent",
    "TrainingRun",
    "TrainingRunsResponse",
    "UploadedCheckpoint",
    "UserSearchOwner",
    "WaitingRun",
    "WeightsInfoResponse",
    "WhoamiResponse",
]

_REQUESTS = {
    "CreateModelRequest": "CreateModel",
    "CreateSamplingSessionRequest": "CreateSamplingSession",
    "CreateSessionRequest": "CreateSession",
    "LoadWeightsRequest": "LoadWeights",
    "GetInfoRequest": "ModelId",
    "OptimStepRequest": "OptimStep",
    "FutureRetrieveRequest": "RetrieveFuture",
    "FuturesRetrieveRequest": "RetrieveFutures",
    "SampleRequest": "Sample",
    "SaveWeightsRequest": "SaveWeights",
    "SaveWeightsForSamplerRequest": "SaveWeightsForSampler",
    "SessionHeartbeatRequest": "SessionHeartbeat",
}
"""Public name -> the server's own type, which is imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _REQUESTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from luthier_core import types

    return getattr(types, _REQUESTS[name])
