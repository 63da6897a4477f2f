"""A finished request as the public protobuf message."""

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import ArrayLike

from luthier_core.proto import wire_pb2
from luthier_sampler.scores import PromptScores, TopkTable
from luthier_sampler.sequence import Request, Sequence


def response_bytes(request: Request) -> bytes:
    """SampleResponse: sequences in the order of their seeds, prompt logprobs where asked for."""
    spec, scores = request.spec, request.scores
    response = wire_pb2.SampleResponse(
        sequences=[_sequence(sequence) for sequence in request.sequences],
        prompt_cache_hit_tokens=request.num_cached_tokens or 0,
    )
    if spec.prompt_logprobs:
        response.prompt_logprobs = _float32(scores.logprobs)
    if spec.topk_prompt_logprobs:
        response.topk_prompt_logprobs.CopyFrom(_table([scores.topk]))
    if spec.target_prompt_logprobs is not None:
        targets = spec.target_prompt_logprobs.tensor(scores.target_logprobs)
        response.target_prompt_logprobs.CopyFrom(targets)
    if spec.prompt_alt_tokens_k:
        response.prompt_alt_tokens.CopyFrom(_alt_tokens(scores))
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


def _alt_tokens(scores: PromptScores) -> wire_pb2.PromptAltTokens:
    """Draws for the prompt positions after the first."""
    tokens, logprobs = scores.alt_tokens[1:], scores.alt_logprobs[1:]
    return wire_pb2.PromptAltTokens(
        tokens=wire_pb2.Tensor(
            dense=tokens.astype("<i8").tobytes(), dtype=wire_pb2.DTYPE_INT64, shape=tokens.shape
        ),
        logprobs=wire_pb2.Tensor(
            dense=_float32(logprobs), dtype=wire_pb2.DTYPE_FLOAT32, shape=logprobs.shape
        ),
    )


def _int32(numbers: ArrayLike) -> bytes:
    return np.asarray(numbers, dtype="<i4").tobytes()


def _float32(numbers: ArrayLike) -> bytes:
    return np.asarray(numbers, dtype="<f4").tobytes()
