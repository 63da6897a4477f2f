"""The gateway's metrics: what each request took, and what must never happen."""

import time
from collections import OrderedDict
from zlib import crc32

from aiohttp import web
from aiohttp.typedefs import Handler

from luthier_core import metrics, tracing
from luthier_core.futures import FutureId
from luthier_gateway.backends import BACKENDS, TENANT
from luthier_gateway.generation import GENERATION

REMEMBERED = 10_000
"""Delivered results whose checksum a gateway keeps."""


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count and time every request, by the route's pattern: ids would be without end."""
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "none"
    began, status = time.monotonic(), 499  # the client went away before there was an answer
    parent = request.headers.get("traceparent", "")[:64]
    try:
        with tracing.request_span(f"{request.method} {route}", parent):
            response = await handler(request)
        status = response.status
        return response
    finally:
        metrics.REQUEST_SECONDS.labels(route).observe(time.monotonic() - began)
        metrics.REQUESTS.labels(request.method, route, status).inc()
        if status == 429:
            metrics.TOO_MANY_REQUESTS.labels(request.get(TENANT, "")).inc()


async def refresh(app: web.Application) -> None:
    """Set what is read only when it is asked for."""
    metrics.OPEN_POLLS.set(app[BACKENDS].futures.num_waiting)
    metrics.GENERATION_MISMATCH.set(not await app[GENERATION].is_confirmed())


class Delivered:
    """Checksums of what was delivered last: a result is the same however often it is asked for."""

    def __init__(self) -> None:
        self._checksums: OrderedDict[int, int] = OrderedDict()
        """By the question's hash: a gateway keeps thousands."""

    def note(self, path: str, future: FutureId, response: web.Response) -> None:
        """Count a result that is another than the one given before, to the same question."""
        body = response.body
        if not isinstance(body, bytes):
            return
        key = hash((path, future, response.content_type))
        checksum = crc32(body)
        if self._checksums.setdefault(key, checksum) != checksum:
            metrics.CHANGED_OUTCOMES.inc()
        self._checksums.move_to_end(key)
        if len(self._checksums) > REMEMBERED:
            self._checksums.popitem(last=False)


DELIVERED = web.AppKey("delivered", Delivered)
