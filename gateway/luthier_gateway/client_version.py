"""Which release of the official SDK a request comes from, and what depends on that."""

import re
from typing import Any

from aiohttp import web

from luthier_core.errors import Unsupported

Version = tuple[int, int, int]

OLDEST: Version = (0, 3, 0)
"""Releases before have no sessions and no seq_ids; all of them say that they are 0.0.1."""
PATIENT_POLLS_SINCE: Version = (0, 21, 0)
"""Releases before give a future up when its poll is answered with 429."""
_REDIRECTS_ARE_FOLLOWED: tuple[Version, Version] = ((0, 22, 0), (0, 22, 1))
"""By their pyqwest transport even where they want to see the redirect itself."""

_USER_AGENT = re.compile(r"AsyncTinker/Python (\S{1,40})")
_NUMBERS = re.compile(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})")


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


def refuse_too_old(request: web.Request) -> None:
    """Unsupported for a release that has no sessions yet."""
    if is_before(request, OLDEST):
        raise Unsupported(
            "tinker SDK 0.2.2 or older; this server needs 0.3.0 or newer: pip install -U tinker"
        )


def client_config(version: Version | None, *, custom_losses: bool) -> dict[str, Any]:
    """What client/config tells this release; what it does not know, it ignores.

    One poller per sampling client instead of a long poll per sample, handles of a sampling session
    told apart by the server, a run and its checkpoint in one request, binary and compressed
    training data from the releases that can send it.
    """
    config = {
        "sample_use_retrieve_futures": True,
        "sample_join_sampling_session": True,
        "create_model_via_load_weights": True,
        "proto_write_fwdbwd": True,
        "fwd_via_fwdbwd": True,
        "proto_compress_fwdbwd": True,
    }
    if custom_losses:
        config["custom_loss_server_side"] = True
    if version in _REDIRECTS_ARE_FOLLOWED:
        config["use_pyqwest_transport"] = False
    return config
