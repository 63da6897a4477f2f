"""Luthier: post-train language models on your own machines.

A client of the Tinker API: `import luthier as tinker` runs a program that was written for it.
"""

from typing import TYPE_CHECKING, Any

from luthier import data, metrics, types
from luthier.errors import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    BillingError,
    ClosedError,
    ConflictError,
    GoneError,
    InternalServerError,
    LuthierError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestErrorCategory,
    RequestFailedError,
    TinkerError,
    UnprocessableEntityError,
)
from luthier.future import APIFuture
from luthier.metrics import MetricsLog, WandbConfig
from luthier.progress import progress
from luthier.rest import RestClient
from luthier.sampling import SamplingClient
from luthier.service import ServiceClient
from luthier.training import TrainingClient
from luthier.transport import SDK_VERSION as __version__
from luthier.types import (
    AdamOptimizerConfig,
    AdamParams,
    Checkpoint,
    CheckpointType,
    Datum,
    DimuonOptimizerConfig,
    DimuonParams,
    DmelChunk,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ImageChunk,
    LoraConfig,
    ModelID,
    ModelInput,
    ModelInputChunk,
    OptimParams,
    OptimStepResponse,
    ParsedCheckpointTinkerPath,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    StopReason,
    TensorData,
    TensorDtype,
    TrainingRun,
)

if TYPE_CHECKING:
    from luthier.types import OptimStepRequest, SampleRequest

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AdamOptimizerConfig",
    "AdamParams",
    "AuthenticationError",
    "BadRequestError",
    "BillingError",
    "Checkpoint",
    "CheckpointType",
    "ClosedError",
    "ConflictError",
    "Datum",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "DmelChunk",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "GoneError",
    "ImageChunk",
    "InternalServerError",
    "LoraConfig",
    "LuthierError",
    "MetricsLog",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "NotFoundError",
    "OptimParams",
    "OptimStepRequest",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "PermissionDeniedError",
    "PromptProvenanceSpan",
    "RateLimitError",
    "RequestErrorCategory",
    "RequestFailedError",
    "RestClient",
    "SampleRequest",
    "SampleResponse",
    "SampledProvenanceSpan",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "StopReason",
    "TensorData",
    "TensorDtype",
    "TinkerError",
    "TrainingClient",
    "TrainingRun",
    "UnprocessableEntityError",
    "WandbConfig",
    "__version__",
    "data",
    "metrics",
    "progress",
    "types",
]


def __getattr__(name: str) -> Any:
    if name in ("OptimStepRequest", "SampleRequest"):  # they are the server's, and slow to import
        return getattr(types, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
