"""A sampling job in the engine's terms, and what it used in the log's."""

from typing import Any

from luthier_core.ops import SamplingJob
from luthier_core.prompt_targets import PromptTargets
from luthier_core.types import Sample
from luthier_core.usage import SampleUse
from luthier_sampler.engine import Finished
from luthier_sampler.sequence import SampleRequest


def usage_of(job: SamplingJob, finished: Finished, *, begun_s: float, worker: str) -> str:
    """What the job used, in the form of Outcome.usage; `begun_s` since the epoch."""
    use = SampleUse(
        job.sampling_session_id,
        finished.num_prompt_tokens,
        finished.num_cached_tokens,
        finished.num_sampled_tokens,
        seq=job.seq,
        queued_ms=int(job.entry_id.partition(b"-")[0]),
        begun_ms=int(1000 * begun_s),
        worker=worker,
    )
    return str(use)


def request_of(job: SamplingJob, wanted: Sample) -> SampleRequest:
    """The engine's form of a sampling request."""
    params = wanted.sampling_params
    stop = params.stop
    prompt, targets = tuple(wanted.prompt.to_ints()), None
    if wanted.target_prompt_logprobs is not None:
        targets = PromptTargets.parse(wanted.target_prompt_logprobs, len(prompt))
    listed: list[Any] = [stop] if isinstance(stop, str) else list(stop or ())
    return SampleRequest(
        request_id=job.request_id,
        prompt=prompt,
        num_samples=wanted.num_samples,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed,
        stop_strings=tuple(item for item in listed if isinstance(item, str)),
        stop_tokens=tuple(item for item in listed if isinstance(item, int)),
        ignore_eos=stop == [],
        prompt_logprobs=wanted.prompt_logprobs,
        topk_prompt_logprobs=wanted.topk_prompt_logprobs,
        prompt_logprobs_last_n=wanted.prompt_logprobs_last_n,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=wanted.prompt_alt_tokens_k,
        topk_sample_logprobs=wanted.topk_sample_logprobs,
        adapter=job.weights,
        follows=job.inflight_run,
        cache_scope=f"{job.tenant} {job.sampling_session_id}" if job.inflight_run else job.tenant,
        streams=job.streams,
    )
