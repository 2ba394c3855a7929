"""Trace context, spans and logs."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from fixtures.logs import logged
from kvmesh.common import telemetry, trace
from kvmesh.common.config import Config

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def logs() -> Iterator[io.StringIO]:
    with logged("router", log_format="json") as stream:
        yield stream


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
    ],
)
def test_malformed_traceparents_are_ignored(text: str) -> None:
    assert trace.parse(text) is None


def test_traceparent_round_trip() -> None:
    assert str(trace.parse(PARENT)) == PARENT
    # A later version may say more; what is known of it is used.
    assert str(trace.parse("01" + PARENT[2:] + "-more")) == PARENT


def test_no_span_no_traceparent() -> None:
    assert telemetry.current_traceparent() == ""


def test_spans_nest_in_one_trace() -> None:
    with telemetry.span("outer"):
        outer = trace.CURRENT.get()
        assert outer is not None
        with telemetry.span("inner"):
            inner = trace.CURRENT.get()
            assert inner is not None
            assert inner.trace_id == outer.trace_id
            assert inner.span_id != outer.span_id
        assert trace.CURRENT.get() == outer
    assert trace.CURRENT.get() is None


def test_a_parent_from_elsewhere_is_continued() -> None:
    with telemetry.span("route", parent=PARENT):
        assert telemetry.current_traceparent().split("-")[1] == PARENT.split("-")[1]
        assert telemetry.current_traceparent() != PARENT


def test_an_exception_passes_and_the_span_ends() -> None:
    with pytest.raises(ValueError, match="no"), telemetry.span("route"):
        raise ValueError("no")
    assert telemetry.current_traceparent() == ""


async def test_tasks_inherit_the_span() -> None:
    async def child() -> str:
        return telemetry.current_traceparent()

    with telemetry.span("outer"):
        assert await asyncio.create_task(child()) == telemetry.current_traceparent()


def test_logs_are_json_lines_with_ids(logs: io.StringIO) -> None:
    log = structlog.get_logger()
    with telemetry.span("route", parent=PARENT):
        log.info("placed", worker="decode-0")
    log.debug("below the level")
    (line,) = lines(logs)
    assert list(line)[:4] == ["ts", "level", "event", "role"]
    assert (line["level"], line["event"], line["role"]) == ("info", "placed", "router")
    assert line["worker"] == "decode-0"
    assert line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert len(str(line["span_id"])) == 16


def test_tracebacks_stay_on_one_line(logs: io.StringIO) -> None:
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        structlog.get_logger().exception("failed")
    (line,) = lines(logs)
    assert "RuntimeError: boom" in str(line["exception"])


def test_libraries_log_in_the_same_shape(logs: io.StringIO) -> None:
    logging.getLogger("some.library").warning("careful: %s", "x")
    logging.getLogger("some.library").info("chatter")
    (line,) = lines(logs)
    assert (line["event"], line["level"], line["role"]) == ("careful: x", "warning", "router")


def test_text_format(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    config = Config()
    config.telemetry.log_format = "text"
    telemetry.setup("router", config, stream)
    structlog.get_logger().info("listening", port=1)
    telemetry.setup("router", Config(), sys.stderr)
    structlog.reset_defaults()
    assert "listening" in stream.getvalue()
    assert "port=1" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_exported_spans_keep_the_trace_and_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))

    def work() -> None:
        with telemetry.span("outer", parent=PARENT, model="m") as outer:
            outer.set(tokens=3)
            with telemetry.span("inner"):
                pass
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        work()
    inner_span, outer_span = exporter.get_finished_spans()
    assert outer_span.context is not None
    assert inner_span.context is not None
    assert inner_span.parent is not None
    assert outer_span.parent is not None
    assert f"{outer_span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{outer_span.parent.span_id:016x}" == PARENT.split("-")[2]
    assert inner_span.parent.span_id == outer_span.context.span_id
    assert dict(outer_span.attributes or {}) == {"model": "m", "tokens": 3}
    assert not outer_span.status.is_ok
    assert inner_span.status.is_ok


def test_spans_reach_a_collector_and_one_that_is_gone_holds_up_nothing() -> None:
    class Collector(TraceServiceServicer):
        def Export(self, request: ExportTraceServiceRequest, context: object) -> ExportTraceServiceResponse:
            requests.append(request)
            return ExportTraceServiceResponse()

    requests: list[ExportTraceServiceRequest] = []
    server = grpc.server(ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(Collector(), server)
    config = Config()
    config.telemetry.otlp_endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        telemetry.setup("router", config, io.StringIO())
        with telemetry.span("route", parent=PARENT, model="m"):
            pass
        # What has not been sent is sent now.
        telemetry.shutdown()
        (group,) = requests[0].resource_spans
        names = {attribute.key: attribute.value.string_value for attribute in group.resource.attributes}
        assert names["service.name"] == "kvmesh-router"
        (span,) = group.scope_spans[0].spans
        assert span.name == "route"
        assert span.trace_id.hex() == PARENT.split("-")[1]
        assert span.parent_span_id.hex() == PARENT.split("-")[2]
        telemetry.setup("router", config, io.StringIO())
        server.stop(None).wait()
        with telemetry.span("route"):
            pass
    finally:
        server.stop(None)
        telemetry.shutdown()
        structlog.reset_defaults()
