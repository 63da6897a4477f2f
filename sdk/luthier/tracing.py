"""Spans of OpenTelemetry for programs that use it: a call, and its trace goes with every request.

A program that has not set OpenTelemetry up pays nothing and sends nothing.
"""

import sys
from collections.abc import Coroutine, MutableMapping
from typing import Any, TypeVar

T = TypeVar("T")


def traced(coroutine: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """The coroutine inside a span of its name, where this program makes traces."""
    return _within_span(coroutine) if _is_traced() else coroutine


def put_trace(headers: MutableMapping[str, str]) -> None:
    """Add `traceparent` of the span around, if there is one."""
    if _is_traced():
        from opentelemetry import propagate

        propagate.inject(headers)


def _is_traced() -> bool:
    return "opentelemetry.sdk.trace" in sys.modules


async def _within_span(coroutine: Coroutine[Any, Any, T]) -> T:
    from opentelemetry import trace

    name = getattr(coroutine, "__name__", "call").strip("_")
    with trace.get_tracer("luthier").start_as_current_span(f"luthier {name}"):
        return await coroutine
