"""Which release of the official SDK a request comes from."""

import re

from aiohttp import web

Version = tuple[int, int, int]

_USER_AGENT = re.compile(r"AsyncTinker/Python (\S{1,40})")
_NUMBERS = re.compile(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})", re.ASCII)


def sdk_version(request: web.Request) -> Version | None:
    """Release of the SDK that sent the request; None for every other client."""
    named = _USER_AGENT.match(request.headers.get("User-Agent", ""))
    text = named[1] if named else request.headers.get("X-Stainless-Package-Version", "")
    numbers = _NUMBERS.match(text)
    return (int(numbers[1]), int(numbers[2]), int(numbers[3])) if numbers else None


def is_before(request: web.Request, since: Version) -> bool:
    """Whether a release of the SDK that is older than `since` sent the request."""
    version = sdk_version(request)
    return version is not None and version < since
