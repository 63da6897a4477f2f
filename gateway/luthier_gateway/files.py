"""Downloads: signed, expiring links to single objects, as S3 would serve them.

On S3 the link leads to the bucket. The disk store has no server of its own, so its links lead here:
whoever has one may GET that object, whole or in ranges, until the link expires. No key is needed.
"""

from pathlib import Path

from aiohttp import web

from luthier_core.blobs import BlobMissing
from luthier_core.disk_blobs import DiskBlobs
from luthier_core.errors import Forbidden
from luthier_gateway.backends import BACKENDS

PREFIX = "/api/v1/files/"
LINK_S = 15 * 60
"""How long a link is good: SDKs fetch new ones in the last 5 minutes."""

_HEADERS = {
    "Content-Type": "application/octet-stream",
    "Content-Disposition": "attachment",
    "Referrer-Policy": "no-referrer",  # the link is the permission: it must not travel on
    "Cache-Control": "private, no-store",
    "X-Content-Type-Options": "nosniff",
}


def link(request: web.Request, key: str) -> str:
    """A URL that anybody can GET this object from for LINK_S."""
    url = request.app[BACKENDS].blobs.signed_url(key, LINK_S)
    return f"{request.scheme}://{request.host}{url}" if url.startswith("/") else url


async def download(request: web.Request) -> web.StreamResponse:
    """The object that the link was made for; Forbidden for any other, and after its time."""
    return web.FileResponse(_file_of(request), headers=_HEADERS)


def _file_of(request: web.Request) -> Path:
    """One answer for a wrong link and for a missing object: a link tells nothing else."""
    blobs = request.app[BACKENDS].blobs
    key, query = request.match_info["key"], request.query
    expires, signature = query.get("expires", ""), query.get("signature", "")
    if (
        isinstance(blobs, DiskBlobs)
        and expires.isdecimal()
        and len(expires) <= 12
        and blobs.signature_is_valid(key, int(expires), signature)
    ):
        try:
            return blobs.file(key)
        except BlobMissing:
            pass
    raise Forbidden("ask for a new one")
