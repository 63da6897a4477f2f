"""One trace from a call of the SDK through gateway, queue and worker, and back, sent by OTLP."""

import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.contract.gateway_client import BASE_MODEL
from tests.contract.gateway_stack import KEYS, GatewayStack, running_gateway_stack

import luthier
from luthier import types
from luthier_core import tracing

pytest.importorskip("opentelemetry.sdk.trace", reason="the extra `tracing` is not installed")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

ARRIVES_S = 30.0


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP, as an OpenTelemetry collector does, and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, str]] = []
        """(trace id, service, name)"""
        self.bodies: list[bytes] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def names(self, trace_id: str) -> set[tuple[str, str]]:
        """(service, name) of every span of a trace."""
        return {(service, name) for trace, service, name in self.spans if trace == trace_id}


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        import gzip

        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = next(
                a.value.string_value
                for a in resource.resource.attributes
                if a.key == "service.name"
            )
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.server.spans.append((span.trace_id.hex(), service, span.name))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def traced_stack(collector: Collector) -> Iterator[GatewayStack]:
    with (
        tempfile.TemporaryDirectory(prefix="lu-tr-") as folder,
        running_gateway_stack(Path(folder), otlp_endpoint=collector.url) as stack,
    ):
        yield stack


@pytest.fixture(scope="module")
def tracer() -> Any:
    """What a program that uses OpenTelemetry has."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    trace.set_tracer_provider(TracerProvider())
    return trace.get_tracer("a-program")


def test_a_step_and_a_sample_are_one_trace_each(
    collector: Collector, traced_stack: GatewayStack, tracer: Any
) -> None:
    with luthier.ServiceClient(base_url=traced_stack.url, api_key=KEYS["ann"]) as service:
        run = service.create_lora_training_client(base_model=BASE_MODEL, rank=4).result()
        datum = types.Datum(
            model_input=types.ModelInput.from_ints([1, 2, 3]),
            loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]},
        )
        with tracer.start_as_current_span("step") as span:
            run.forward_backward([datum], "cross_entropy").result()
            step = f"{span.get_span_context().trace_id:032x}"
        sampler = service.create_sampling_client(base_model=BASE_MODEL).result()
        with tracer.start_as_current_span("sample") as span:
            params = types.SamplingParams(max_tokens=2)
            sampler.sample(types.ModelInput.from_ints([1, 2]), 1, params).result()
            sample = f"{span.get_span_context().trace_id:032x}"

    _until_has(
        collector,
        step,
        {
            ("luthier-gateway", "POST /api/v1/forward_backward"),
            ("luthier-trainer", "queued"),
            ("luthier-trainer", "execute forward_backward"),
            ("luthier-trainer", "finish"),
            ("luthier-trainer", "commit"),
            ("luthier-gateway", "POST /api/v1/retrieve_future"),
        },
    )
    _until_has(
        collector,
        sample,
        {
            ("luthier-gateway", "POST /api/v1/asample"),
            ("luthier-sampler", "queued"),
            ("luthier-sampler", "sample"),
        },
    )


def _until_has(collector: Collector, trace_id: str, wanted: set[tuple[str, str]]) -> None:
    deadline = time.monotonic() + ARRIVES_S
    while not wanted <= collector.names(trace_id):
        assert time.monotonic() < deadline, wanted - collector.names(trace_id)
        time.sleep(0.05)  # spans are sent once a second


def test_a_span_tells_the_class_of_an_error_and_not_its_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, kept = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("luthier"))
    with pytest.raises(ValueError, match="prompt"), tracing.request_span("POST /x", ""):
        raise ValueError("a user's prompt")
    (span,) = kept.get_finished_spans()
    assert span.status.description == "ValueError"
    assert "prompt" not in span.to_json()
