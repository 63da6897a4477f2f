"""The trainer's metrics, read off the effects that its protocol core asks for."""

import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from luthier_core import metrics, tracing
from luthier_core.ops import Kind
from luthier_core.owner import Step
from luthier_core.protocol import (
    MAX_ATTEMPTS,
    MAX_DEATHS,
    Acquire,
    Begin,
    CasHead,
    Commit,
    Effect,
    Execute,
    FailRange,
    Finish,
)


class EffectWatch:
    """The effects of one run under one tenure, from its take-over on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._is_recovery = False
        """Somebody had the run before, and no new op has begun yet."""
        self._carriers: dict[int, str] = {}
        """Seq -> the trace of an op that is executed and not committed."""

    async def watch(self, effect: Effect, performing: Awaitable[Any]) -> Any:
        """The effect's answer, once it is counted and timed."""
        began = self._clock()
        try:
            with self._span(effect):
                answer = await performing
        finally:
            name = type(effect).__name__.lower()
            metrics.EFFECT_SECONDS.labels(name).observe(self._clock() - began)
        self._note(effect, name, answer)
        return answer

    def _span(self, effect: Effect) -> contextlib.AbstractContextManager[None]:
        """A span in the trace of the request that an effect is for."""
        match effect:
            case Execute(Step(op=op, publish=True)) if op.trace:
                self._carriers[op.seq] = op.trace
                tracing.note_queued(op.trace)
                return tracing.work_span(f"execute {op.kind}", op.trace, seq=op.seq, run=op.run_id)
            case Finish(Step(op=op)):
                return tracing.work_span("finish", op.trace, seq=op.seq, run=op.run_id)
            case Commit(run_id, _, seq):
                carrier = self._carriers.pop(seq, "")
                return tracing.work_span("commit", carrier, seq=seq, run=run_id)
        return contextlib.nullcontext()

    def _note(self, effect: Effect, name: str, answer: Any) -> None:
        status = getattr(answer, "status", answer)
        if status == "FENCED" or (isinstance(effect, Acquire) and answer is None):
            metrics.FENCED.labels(name).inc()
        elif status == "ORDER":
            metrics.OUT_OF_ORDER.labels(name).inc()
        match effect:
            case Acquire(_, epoch, _):
                self._is_recovery = epoch > 1
            case CasHead() if answer is None:
                metrics.HEAD_CONFLICTS.inc()
            case Execute(step) if not step.publish:
                metrics.REPLAYED_OPS.inc()
            case FailRange() if status == "OK":
                metrics.GAPS_GIVEN_UP.inc()
            case Begin():
                self._note_new_op()
                if answer.deaths >= MAX_DEATHS or answer.attempts > MAX_ATTEMPTS:
                    metrics.QUARANTINES.inc()

    def _note_new_op(self) -> None:
        if self._is_recovery:
            self._is_recovery = False
            metrics.RECOVERIES.inc()
            metrics.RECOVERY_SECONDS.observe(self._clock() - self._began)


def note_forward(kind: Kind, found: Mapping[str, float]) -> None:
    """What one forward or forward_backward says of itself (loss_metrics.py)."""
    num_tokens = found.get("num_tokens:sum", 0.0)
    metrics.TRAINED_TOKENS.labels(kind).inc(num_tokens)
    metrics.REQUEST_TOKENS.observe(num_tokens)
    kl = found.get("kl_k3:mean")
    if kl is not None and math.isfinite(kl):
        # k3 is half the mean square of the difference, but for terms of third order.
        metrics.LOGPROB_GAP.observe(math.sqrt(2 * max(kl, 0.0)))
