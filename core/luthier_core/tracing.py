"""Traces by OpenTelemetry, for who wants them: from a call of the SDK through the queue and back.

Off, at the cost of one comparison, unless `tracing.otlp_endpoint` is set; then the extra `tracing`
must be installed. What crosses the queue is the W3C `traceparent` of the request, and when it was
queued. Spans carry ids, kinds and sizes; nothing of what users send.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from luthier_core.config import TracingConfig
from luthier_core.errors import ConfigError

_tracer: Any = None
"""Of this process, once `start` was called with an endpoint."""


def start(role: str, name: str, config: TracingConfig) -> None:
    """Export this process's spans from now on, in the background; nothing without an endpoint."""
    global _tracer
    if not config.otlp_endpoint:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError as error:
        raise ConfigError(f"tracing.otlp_endpoint: install luthier[tracing] ({error})") from error
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(config.sample_ratio),
        resource=Resource({"service.name": f"luthier-{role}", "service.instance.id": name}),
    )
    exporter = OTLPSpanExporter(endpoint=f"{config.otlp_endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    _tracer = provider.get_tracer("luthier")


@contextlib.contextmanager
def request_span(name: str, traceparent: str) -> Iterator[None]:
    """A span around the block: of a request, in the trace that it brings or in a new one."""
    if _tracer is None:
        yield
        return
    from opentelemetry.trace import SpanKind

    with _span(name, traceparent, kind=SpanKind.SERVER):
        yield


@contextlib.contextmanager
def work_span(name: str, carrier: str, **attributes: str | int) -> Iterator[None]:
    """A span around the block: of work for a request that was queued with this carrier, if any."""
    if _tracer is None or not carrier:
        yield
        return
    with _span(name, carrier, attributes=attributes):
        yield


@contextlib.contextmanager
def _span(name: str, parent: str, **options: Any) -> Iterator[None]:
    """A span around the block; of an error it has the class: what it says may be a user's text."""
    from opentelemetry.trace import StatusCode

    with _tracer.start_as_current_span(
        name,
        context=_context(parent),
        record_exception=False,
        set_status_on_exception=False,
        **options,
    ) as span:
        try:
            yield
        except Exception as error:
            span.set_status(StatusCode.ERROR, type(error).__name__)
            raise


def carried() -> str:
    """What goes with a queued request: traceparent and time of the span around; empty if none."""
    if _tracer is None:
        return ""
    from opentelemetry import propagate

    headers: dict[str, str] = {}
    propagate.inject(headers)
    return f"{headers['traceparent']} {time.time_ns()}" if "traceparent" in headers else ""


def note_queued(carrier: str) -> None:
    """A span for the time since `carried` was called, which ends now."""
    parent, _, since_ns = carrier.partition(" ")
    if _tracer is not None and since_ns.isdecimal():
        queued = _tracer.start_span("queued", context=_context(parent), start_time=int(since_ns))
        queued.end()


def note_since(name: str, carrier: str, began_s: float, **attributes: str | int) -> None:
    """A span from `began_s` (seconds since the epoch) to now, of a request that was queued."""
    if _tracer is not None and carrier:
        noted = _tracer.start_span(
            name,
            context=_context(carrier),
            start_time=int(began_s * 1e9),
            attributes=attributes,
        )
        noted.end()


def _context(parent: str) -> Any:
    from opentelemetry import propagate

    return propagate.extract({"traceparent": parent.partition(" ")[0]}) if parent else None
