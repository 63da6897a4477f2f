"""JSON logs on standard error, bound to ids. Never tokens, prompts, weights or keys."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from luthier_core.errors import ConfigError
from luthier_core.redaction import redact

LEVELS = ("debug", "info", "warning", "error")

_bound: ContextVar[dict[str, str] | None] = ContextVar("luthier_log_fields", default=None)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, service, logger, message, and the bound ids."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": redact(record.getMessage()),
            **(_bound.get() or {}),
        }
        if record.exc_info:
            line["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(line)


def setup_logging(service: str, level: str = "info") -> None:
    """Send all logs of this process to standard error as JSON lines; ConfigError on no level."""
    if level not in LEVELS:
        raise ConfigError(f"LUTHIER_LOG_LEVEL: {level!r} is not one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(without_request)


def without_request(record: logging.LogRecord) -> bool:
    """A filter: of a request that is no HTTP the sort of error, not the line it came with.

    That line may be a header with a key, or a piece of a body whose length was wrong.
    """
    error = record.exc_info[1] if record.exc_info else None
    if type(error).__module__ == "aiohttp.http_exceptions":  # unimported: the engine has no HTTP
        record.msg, record.args = f"{record.getMessage()}: {type(error).__name__}", ()
        record.exc_info = None
    return True


@contextmanager
def log_fields(**fields: str) -> Iterator[None]:
    """Bind ids to every log line inside the block."""
    token = _bound.set({**(_bound.get() or {}), **fields})
    try:
        yield
    finally:
        _bound.reset(token)
