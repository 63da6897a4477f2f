"""A finished request as the public protobuf message."""

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import ArrayLike

from luthier_core.proto import wire_pb2
from luthier_sampler.sequence import Request, Sequence, TopkTable


def response_bytes(request: Request) -> bytes:
    """SampleResponse: sequences in the order of their seeds, prompt logprobs where asked for."""
    spec = request.spec
    response = wire_pb2.SampleResponse(
        sequences=[_sequence(sequence) for sequence in request.sequences],
        prompt_cache_hit_tokens=request.num_cached_tokens or 0,
    )
    if spec.prompt_logprobs:
        response.prompt_logprobs = _float32(request.prompt_logprobs)
    if spec.topk_prompt_logprobs:
        response.topk_prompt_logprobs.CopyFrom(_table([request.prompt_topk]))
    return response.SerializeToString()


def _sequence(sequence: Sequence) -> wire_pb2.SampledSequence:
    stopped = sequence.stop_reason == "stop"
    return wire_pb2.SampledSequence(
        stop_reason=wire_pb2.STOP_REASON_STOP if stopped else wire_pb2.STOP_REASON_LENGTH,
        tokens=_int32(sequence.new_tokens),
        logprobs=_float32(sequence.logprobs),
        topk_sampled_logprobs=_table(sequence.topk) if sequence.topk else None,
    )


def _table(tables: Seq[TopkTable]) -> wire_pb2.TopkLogprobs:
    token_ids = np.concatenate([table.token_ids for table in tables])
    length, k = token_ids.shape
    return wire_pb2.TopkLogprobs(
        token_ids=_int32(token_ids),
        logprobs=_float32(np.concatenate([table.logprobs for table in tables])),
        k=k,
        length=length,
    )


def _int32(numbers: ArrayLike) -> bytes:
    return np.asarray(numbers, dtype="<i4").tobytes()


def _float32(numbers: ArrayLike) -> bytes:
    return np.asarray(numbers, dtype="<f4").tobytes()
