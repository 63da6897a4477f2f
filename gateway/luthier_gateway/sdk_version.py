"""Which release of the official SDK a request comes from."""

import re

from aiohttp import web

_SDK = re.compile(r"AsyncTinker/Python (\d{1,6})\.(\d{1,6})\.(\d{1,6})", re.ASCII)


def sdk_version(request: web.Request) -> tuple[int, int, int] | None:
    """Its version, or None if the request is not from the SDK."""
    match = _SDK.match(request.headers.get("User-Agent", ""))
    if match is None:
        return None
    major, minor, patch = match.groups()
    return int(major), int(minor), int(patch)
