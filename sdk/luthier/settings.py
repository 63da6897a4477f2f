"""Where the server is and who asks: the only module of the SDK that reads the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from luthier.errors import LuthierError

DEFAULT_BASE_URL = "http://127.0.0.1:8080"
"""Where `luthier up` listens."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one client. given_api_key: the key came as an argument, so other processes lack it."""

    base_url: str
    api_key: str = field(repr=False)
    given_api_key: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    tags: tuple[str, ...] = ()
    project_id: str | None = None


def read_settings(
    base_url: str | None = None,
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    project_id: str | None = None,
) -> Settings:
    """Arguments first, then TINKER_BASE_URL, TINKER_API_KEY, TINKER_TAGS, TINKER_PROJECT_ID.

    LuthierError if there is no key or the URL is none.
    """
    url = base_url or os.environ.get("TINKER_BASE_URL") or DEFAULT_BASE_URL
    key = api_key or os.environ.get("TINKER_API_KEY") or ""
    if not url.startswith(("http://", "https://")):
        raise LuthierError(f"base_url: {url!r} must begin with http:// or https://")
    if not key:
        raise LuthierError(
            "no API key: give api_key, or set TINKER_API_KEY (`luthier up` prints it)"
        )
    tags = os.environ.get("TINKER_TAGS", "")
    return Settings(
        base_url=url.removesuffix("/"),
        api_key=key,
        given_api_key=bool(api_key),
        headers={**_access_headers(), **(headers or {})},
        tags=tuple(tag.strip() for tag in tags.split(",") if tag.strip()),
        project_id=project_id or os.environ.get("TINKER_PROJECT_ID") or None,
    )


def _access_headers() -> dict[str, str]:
    """For servers behind Cloudflare Access."""
    names = {"CF-Access-Client-Id": "ID", "CF-Access-Client-Secret": "SECRET"}
    values = {
        header: os.environ.get(f"CLOUDFLARE_ACCESS_CLIENT_{name}", "")
        for header, name in names.items()
    }
    return {header: value for header, value in values.items() if value}
