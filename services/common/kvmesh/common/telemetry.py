"""Logs and traces of a process.

Logs are structlog events on stderr: `ts level event role trace_id span_id` and the caller's fields, JSON
lines or text. Spans go to an OTLP collector when one is configured; without one a span costs a few
microseconds and still gives its work ids, which logs show and `current_traceparent` passes on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from contextvars import Token
from types import TracebackType
from typing import Any, TextIO

import structlog
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)

from kvmesh.common import trace
from kvmesh.common.config import Config

# Longest that an unreachable collector holds up one export, and so the end of the process.
EXPORT_TIMEOUT_S = 2

_role = "process"
_tracer: Tracer | None = None
_shutdown: Any = None


def setup(role: str, config: Config, stream: TextIO | None = None) -> None:
    """Configure this process's logs and traces; a later call replaces an earlier one."""
    global _role
    _role = role
    output: TextIO = stream or sys.stderr
    settings = config.telemetry
    text = settings.log_format == "text" or (settings.log_format == "auto" and output.isatty())
    _setup_logs(settings.log_level, text, output)
    shutdown()
    if settings.otlp_endpoint:
        _setup_traces(role, settings.otlp_endpoint)


def shutdown() -> None:
    """Send what spans are left and stop exporting; blocks for the exporter's timeout at most."""
    global _tracer, _shutdown
    if _shutdown is not None:
        _shutdown()
    _tracer = _shutdown = None


def role() -> str:
    """The role given to `setup`."""
    return _role


def current_traceparent() -> str:
    """The running span as a W3C `traceparent` header; empty outside any span."""
    context = trace.CURRENT.get()
    return str(context) if context is not None else ""


class span:
    """`with span("route"):` the work inside is one span, child of `parent` (a traceparent) or of the current.

    An exception marks the span as failed and passes through. Attributes are str, bool, int or float.
    """

    __slots__ = ("_attributes", "_name", "_otel", "_parent", "_token")

    def __init__(self, name: str, parent: str = "", **attributes: Any) -> None:
        self._name = name
        self._parent = parent
        self._attributes = attributes
        self._otel: Span | None = None
        self._token: Token[trace.TraceContext | None] | None = None

    def __enter__(self) -> span:
        parent = (trace.parse(self._parent) if self._parent else None) or trace.CURRENT.get()
        if _tracer is None:
            context = parent.child() if parent else trace.new()
        else:
            self._otel = _start(_tracer, self._name, parent, self._attributes)
            made = self._otel.get_span_context()
            context = trace.TraceContext(made.trace_id, made.span_id, int(made.trace_flags))
        self._token = trace.CURRENT.set(context)
        return self

    @property
    def recorded(self) -> bool:
        """Whether anybody will see its attributes."""
        return self._otel is not None

    def set(self, **attributes: Any) -> None:
        """Add attributes known only later."""
        if self._otel is not None:
            self._otel.set_attributes(attributes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._token is not None:
            trace.CURRENT.reset(self._token)
        if self._otel is not None:
            if error is not None:
                self._otel.set_status(Status(StatusCode.ERROR, str(error)))
            self._otel.end()


def _start(tracer: Tracer, name: str, parent: trace.TraceContext | None, attributes: dict[str, Any]) -> Span:
    context = None
    if parent is not None:
        remote = SpanContext(parent.trace_id, parent.span_id, True, TraceFlags(parent.flags))
        context = set_span_in_context(NonRecordingSpan(remote))
    return tracer.start_span(name, context=context, attributes=attributes)


def _setup_traces(role: str, endpoint: str) -> None:
    # Imported here: the SDK costs every process memory and start-up time that only an exporter repays.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    global _tracer, _shutdown
    provider = TracerProvider(resource=Resource.create({"service.name": f"kvmesh-{role}"}))
    provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S))
    )
    _tracer = provider.get_tracer("kvmesh")
    _shutdown = provider.shutdown


def _setup_logs(level: str, text: bool, stream: TextIO) -> None:
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _add_identity,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.processors.StackInfoRenderer(),
    ]
    if text:
        shared.append(_text_timestamp)
        renderer: Any = structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            sort_keys=False,
            # The default one shows local variables, among them keys and prompts.
            exception_formatter=structlog.dev.plain_traceback,
        )
        rendering: list[Any] = [renderer]
    else:
        rendering = [structlog.processors.format_exc_info, _order, structlog.processors.JSONRenderer()]
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )
    # Libraries log through `logging`; their warnings take the same shape.
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h.formatter, structlog.stdlib.ProcessorFormatter)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(threshold, logging.WARNING))


def _add_identity(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event.setdefault("role", _role)
    context = trace.CURRENT.get()
    if context is not None:
        event["trace_id"] = f"{context.trace_id:032x}"
        event["span_id"] = f"{context.span_id:016x}"
    return event


def _order(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    head = {key: event.pop(key) for key in ("ts", "level", "event", "role") if key in event}
    return {**head, **event}


def _text_timestamp(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    # ConsoleRenderer puts `timestamp` first.
    event["timestamp"] = event.pop("ts")
    return event
