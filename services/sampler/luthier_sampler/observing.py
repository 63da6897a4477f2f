"""The sampler's metrics: its engine's counts, and how each request ended."""

from luthier_core import metrics
from luthier_core.config import SamplerConfig
from luthier_sampler.engine import Engine, Finished


class EngineObserver:
    """Brings the metrics in line with an engine's counts."""

    def __init__(self, engine: Engine, config: SamplerConfig) -> None:
        self._engine = engine
        self._seen = engine.stats
        metrics.SAMPLER_MAX_RUNNING.set(config.max_running)

    async def refresh(self) -> None:
        seen, now = self._seen, self._engine.stats
        metrics.SAMPLER_SEQUENCES.labels("running").set(now.num_running)
        metrics.SAMPLER_SEQUENCES.labels("waiting").set(now.num_waiting)
        metrics.KV_BLOCKS.labels("used").set(now.num_blocks - now.num_free_blocks)
        metrics.KV_BLOCKS.labels("free").set(now.num_free_blocks)
        metrics.LOADED_ADAPTERS.set(now.num_adapters)
        metrics.STEPS.inc(now.num_steps - seen.num_steps)
        metrics.PREEMPTIONS.inc(now.num_preemptions - seen.num_preemptions)
        metrics.COMPUTED_TOKENS.inc(now.num_computed_tokens - seen.num_computed_tokens)
        metrics.SAMPLED_TOKENS.inc(now.num_sampled_tokens - seen.num_sampled_tokens)
        self._seen = now


def note_finished(finished: Finished) -> None:
    """One request has ended; one that was cancelled is not told of."""
    metrics.SAMPLES.labels("failed" if finished.response is None else "completed").inc()
    metrics.PROMPT_TOKENS.inc(finished.num_prompt_tokens)
    metrics.CACHED_TOKENS.inc(finished.num_cached_tokens)
