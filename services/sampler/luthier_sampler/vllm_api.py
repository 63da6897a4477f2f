"""A sampling request as a body of vLLM's /v1/completions, and what it answers. Pure.

As vLLM 0.32 has them: lists of token ids as prompt and, with return_token_ids, in the answer;
prompt_logprobs as one dict per position from token id to logprob and rank; sample i of a seeded
request drawn with seed + i.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from luthier_core.errors import BadRequest, LuthierError, Unsupported
from luthier_sampler.admission import MAX_TOPK_LOGPROBS, Limits
from luthier_sampler.scores import TopkTable
from luthier_sampler.sequence import Request, SampleRequest

MIN_TEMPERATURE = 0.01
"""vLLM raises a lower one, above 0, to this."""
MAX_LORA_RANK = 64
_TOKEN = "token_id:"


def check_supported(spec: SampleRequest, limits: Limits, *, lm_head: bool) -> None:
    """Unsupported or BadRequest names the field that vLLM cannot serve, beside admission.check."""
    if spec.target_prompt_logprobs is not None:
        raise Unsupported("target_prompt_logprobs: not with the sampler engine vllm")
    if spec.prompt_alt_tokens_k:
        raise Unsupported("prompt_alt_tokens_k: not with the sampler engine vllm")
    if lm_head:
        for name in ("prompt_logprobs", "topk_prompt_logprobs"):
            if getattr(spec, name):
                raise Unsupported(
                    f"{name}: the sampler engine vllm has it with sampler.vllm_lm_head = false only"
                )
    if 0 < spec.temperature < MIN_TEMPERATURE:
        raise Unsupported(
            f"temperature={spec.temperature}: with the sampler engine vllm 0, or {MIN_TEMPERATURE} "
            "and more"
        )
    if len(spec.prompt) >= limits.context_tokens:
        most = limits.context_tokens - 1
        raise BadRequest(f"prompt: {len(spec.prompt)} tokens; this sampler takes up to {most}")


def body_of(request: Request, model: str) -> dict[str, Any]:
    """The JSON body for `model`: the name of the base model or of an adapter."""
    spec = request.spec
    scores_prompt = spec.prompt_logprobs or spec.topk_prompt_logprobs > 0
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.max_new_tokens,
        # vLLM refuses several greedy samples; they are all the same.
        "n": 1 if spec.temperature == 0 else spec.num_samples,
        "temperature": spec.temperature,
        "top_k": max(spec.top_k, 0),
        "top_p": spec.top_p,
        "stop": list(spec.stop_strings),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        # Every id that ends a sequence is listed, EOS too, so that ours count and not vLLM's.
        "stop_token_ids": sorted(request.stop_tokens),
        "ignore_eos": True,
        "logprobs": spec.topk_sample_logprobs,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        # Its prefix cache is shared within a tenant's use of one version, as ours is.
        "cache_salt": request.cache_root.hex(),
    }
    if spec.seed is not None:
        body["seed"] = spec.seed % 2**62  # room for + i in the 63 bits that it takes
    if scores_prompt:
        body["prompt_logprobs"] = spec.topk_prompt_logprobs
    elif spec.streams:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def put(request: Request, answer: Mapping[str, Any]) -> None:
    """Adds what an answer, or one event of a stream, says to the request."""
    for choice in answer["choices"]:
        _put_choice(request, choice)
    if usage := answer.get("usage"):
        details = usage.get("prompt_tokens_details") or {}
        request.num_cached_tokens = details.get("cached_tokens") or 0


def complete(request: Request) -> None:
    """Call at the end of an answer: LuthierError unless it has all that was asked for."""
    first, *others = request.sequences
    if request.spec.temperature == 0:
        for other in others:
            other.tokens, other.logprobs = first.tokens, first.logprobs
            other.topk, other.stop_reason = first.topk, first.stop_reason
    for sequence in request.sequences:
        if sequence.stop_reason not in ("stop", "length"):
            raise LuthierError(f"vLLM ended a sequence with {sequence.stop_reason or 'nothing'!r}")
        if not np.isfinite(sequence.logprobs).all():
            raise BadRequest("the weights give logits that are not finite numbers")


def _put_choice(request: Request, choice: Mapping[str, Any]) -> None:
    sequence = request.sequences[choice["index"]]
    if token_ids := choice.get("token_ids"):
        sequence.tokens += token_ids
        sequence.logprobs += choice["logprobs"]["token_logprobs"]
        if k := request.spec.topk_sample_logprobs:
            for top in choice["logprobs"]["top_logprobs"]:
                pairs = ((int(name.removeprefix(_TOKEN)), top[name]) for name in top)
                sequence.topk.append(_table_row(pairs, k))
    sequence.stop_reason = choice.get("finish_reason") or ""
    if sequence.index == 0 and choice.get("prompt_logprobs"):
        _put_prompt_logprobs(request, choice["prompt_logprobs"])


def _put_prompt_logprobs(request: Request, found: list[dict[str, Any] | None]) -> None:
    """One dict per prompt token, of the token itself and the most likely ones; first None."""
    spec, scores = request.spec, request.scores
    num_wanted = spec.prompt_logprobs_last_n or len(found) - 1
    for position in range(len(found) - num_wanted, len(found)):
        row = found[position]
        assert row is not None
        if spec.prompt_logprobs:
            scores.logprobs[position] = row[str(request.prompt[position])]["logprob"]
        if k := spec.topk_prompt_logprobs:
            pairs = ((int(token), cell["logprob"]) for token, cell in row.items())
            scores.topk.put(position, _table_row(pairs, k))


def _table_row(pairs: Iterable[tuple[int, float]], k: int) -> TopkTable:
    """The k most likely of the pairs; vLLM adds the token itself where it is not one of them."""
    best = sorted(pairs, key=lambda pair: -pair[1])[: min(k, MAX_TOPK_LOGPROBS)]
    table = TopkTable.filler(1, k)
    table.token_ids[0, : len(best)] = [token for token, _ in best]
    table.logprobs[0, : len(best)] = [logprob for _, logprob in best]
    return table
