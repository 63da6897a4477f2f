"""Errors in the form of the OpenAI API."""

import re
from typing import Any

from aiohttp import web

from luthier_core.errors import LuthierError, NotFound, TooManyRequests, Unauthorized
from luthier_core.redaction import redact
from luthier_gateway.web_io import json_response

_FIELD = re.compile(r"([a-z_]+)[.:=\[]")


class ClientGone(LuthierError):
    """The client has closed its connection."""

    status, category = 499, "user"


def error_object(error: LuthierError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    is_ours = error.category != "user"
    field = None if is_ours else _FIELD.match(error.detail)
    return {
        "error": {
            "message": redact(error.message),
            "type": "server_error" if is_ours else "invalid_request_error",
            # Every detail about a field begins with its name.
            "param": field[1] if field else None,
            "code": _code(error),
        }
    }


def error_response(error: LuthierError) -> web.Response:
    response = json_response(error_object(error), status=error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response


def _code(error: LuthierError) -> str | None:
    match error:
        case Unauthorized():
            return "invalid_api_key"
        case TooManyRequests():
            return "rate_limit_exceeded"
        case NotFound():
            return "model_not_found" if error.detail.startswith("model") else "not_found"
    return None
