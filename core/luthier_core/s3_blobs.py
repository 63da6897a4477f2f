"""Objects in an S3-compatible bucket: minio signs URLs, aiohttp carries the bytes.

The store must honour `If-None-Match: *` and `If-Match: <etag>` on PUT. Conditions travel as headers
outside the signature, the ETag without its quotes: that is what every store we tried understands.
Only listing goes through minio itself, in a thread.
"""

import asyncio
import base64
import hashlib
import io
import logging
import random
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import aiohttp
import urllib3
from minio import Minio
from minio.error import MinioException
from urllib3.exceptions import HTTPError
from yarl import URL

from luthier_core.blobs import (
    PIECE_BYTES,
    BlobInfo,
    BlobMissing,
    Pieces,
    check_key,
    check_prefix,
)
from luthier_core.errors import Unavailable

log = logging.getLogger(__name__)

MAX_TRIES = 8
"""With full jitter below 0.1, 0.2, ... 6.4 s between them: about 6 s on average. A short outage
costs what it takes, and not the 20 s after which a client that was told 503 comes again."""

CONNECT_S, ANSWER_S = 5.0, 60.0
"""Of one try. An answer may be long in coming: the store acknowledges what it has on disk."""

# 409 is S3's answer to two conditional writes at the same moment; SlowDown comes as 503 or 429.
_TRY_AGAIN = frozenset({408, 409, 429, 500, 502, 503, 504})
_SIGNED_FOR = timedelta(hours=1)
_LARGE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes
    repeated: bool
    """An earlier try got no definite answer: it may have been carried out."""

    @property
    def etag(self) -> str:
        return self.headers.get("ETag", "").strip('"')


class S3Blobs:
    """Blobs in one bucket. `async with` opens and closes its connections."""

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        *,
        access_key: str,
        secret_key: str,
        secure: bool,
        region: str,
        link_access_key: str = "",
        link_secret_key: str = "",
        retry_base_s: float = 0.1,
        answer_s: float = ANSWER_S,
    ) -> None:
        """Links are signed with the link keys, where there are some."""
        # With the region given minio asks the server nothing: signing is arithmetic.
        self._minio = Minio(
            endpoint,
            access_key=access_key,
            secret_key=secret_key,
            secure=secure,
            region=region,
            # Its own would wait for five minutes, six times, on a thread that others need.
            http_client=urllib3.PoolManager(
                timeout=urllib3.Timeout(connect=CONNECT_S, read=answer_s),
                retries=urllib3.Retry(
                    total=MAX_TRIES - 1, backoff_factor=retry_base_s, status_forcelist=_TRY_AGAIN
                ),
            ),
        )
        self._links = Minio(
            endpoint,
            access_key=link_access_key or access_key,
            secret_key=link_secret_key or secret_key,
            secure=secure,
            region=region,
        )
        self._bucket = bucket
        self._retry_base_s = retry_base_s
        self._timeout = aiohttp.ClientTimeout(total=600, sock_connect=CONNECT_S, sock_read=answer_s)
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            timeout=self._timeout,
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._http.close()

    async def put(self, key: str, data: bytes) -> str:
        return (await self._put(key, data, {}, {200})).etag

    async def put_if_absent(self, key: str, data: bytes) -> bool:
        headers = {"If-None-Match": "*", "Content-Type": _new_mark()}
        reply = await self._put(key, data, headers, {200, 412})
        return reply.status == 200 or await self._own_etag(reply, key, headers) is not None

    async def put_if_match(self, key: str, data: bytes, etag: str) -> str | None:
        headers = {"If-Match": etag, "Content-Type": _new_mark()}
        reply = await self._put(key, data, headers, {200, 404, 412})
        return reply.etag if reply.status == 200 else await self._own_etag(reply, key, headers)

    async def get(self, key: str) -> bytes:
        return (await self.get_with_etag(key))[0]

    async def get_with_etag(self, key: str) -> tuple[bytes, str]:
        reply = await self._send("GET", check_key(key), {200, 404})
        if reply.status == 404:
            raise BlobMissing(key)
        return reply.body, reply.etag

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        num_read, problem = 0, ""
        for attempt in range(MAX_TRIES):
            await self._pause_before(attempt)
            # A try that broke off is taken up where it did: what was given away cannot be recalled.
            headers = {"Range": f"bytes={num_read}-"} if num_read else {}
            try:
                async with self._http.get(
                    self._sign("GET", check_key(key)), headers=headers
                ) as response:
                    if response.status == 404:
                        raise BlobMissing(key)
                    if response.status == (206 if num_read else 200):
                        async for piece in response.content.iter_chunked(PIECE_BYTES):
                            num_read += len(piece)
                            yield piece
                        return
                    problem = f"answered {response.status}"
                    if response.status not in _TRY_AGAIN:
                        break
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                problem = repr(error)
        log.error("object store: GET %s %s", key, problem)
        raise Unavailable("the object store does not answer as it should")

    async def put_stream(self, key: str, pieces: Pieces, num_bytes: int) -> None:
        failures: list[Exception] = []

        async def body() -> AsyncIterator[bytes]:
            try:
                async for piece in pieces():
                    yield piece
            except Exception as error:
                failures.append(error)
                raise

        headers = {"Content-Length": str(num_bytes)}
        await self._send(
            "PUT", check_key(key), {200}, data=body, headers=headers, failures=failures
        )

    async def size(self, key: str) -> int | None:
        info = await self.head(key)
        return None if info is None else info.num_bytes

    async def head(self, key: str) -> BlobInfo | None:
        reply = await self._send("HEAD", check_key(key), {200, 404})
        if reply.status == 404:
            return None
        return BlobInfo(key, int(reply.headers["Content-Length"]), reply.etag)

    async def list(self, prefix: str) -> AsyncIterator[BlobInfo]:
        check_prefix(prefix)
        try:
            found = await asyncio.to_thread(self._list, prefix)
        except (MinioException, HTTPError) as error:
            log.error("object store: list %s %r", prefix, error)
            raise Unavailable("the object store does not answer as it should") from error
        for info in found:
            yield info

    async def delete(self, key: str) -> None:
        await self._send("DELETE", check_key(key), {200, 204, 404})

    async def refuses_damaged(self, key: str) -> bool:
        headers = {"Content-MD5": _content_md5(b"other bytes")}
        reply = await self._send("PUT", check_key(key), {200, 400}, data=b"bytes", headers=headers)
        return reply.status == 400

    def signed_url(self, key: str, expires_s: int) -> str:
        url: str = self._links.get_presigned_url(
            "GET",
            self._bucket,
            check_key(key),
            expires=timedelta(seconds=expires_s),
            response_headers={"response-content-disposition": "attachment"},
        )
        return url

    async def _put(
        self, key: str, data: bytes, condition: Mapping[str, str], expected: set[int]
    ) -> _Reply:
        # The store compares the digest before it stores, so a damaged upload is refused there.
        if len(data) > _LARGE_BYTES:
            digest = await asyncio.to_thread(_content_md5, data)
        else:
            digest = _content_md5(data)
        headers = {**condition, "Content-MD5": digest}
        return await self._send("PUT", check_key(key), expected, data=data, headers=headers)

    async def _own_etag(self, reply: _Reply, key: str, headers: Mapping[str, str]) -> str | None:
        """The object's ETag if an earlier try of this very write made it.

        A try may have been carried out although its reply was lost; and Ceph RGW answers 500 to all
        but one of the conditional writes of one moment. The contents would not tell them apart: a
        writer that lost may have had the same.
        """
        if not reply.repeated:
            return None
        stored = await self._send("HEAD", key, {200, 404})
        is_own = stored.headers.get("Content-Type") == headers["Content-Type"]
        return stored.etag if stored.status == 200 and is_own else None

    async def _send(
        self,
        method: str,
        key: str,
        expected: set[int],
        *,
        data: bytes | Pieces | None = None,
        headers: Mapping[str, str] | None = None,
        failures: Sequence[Exception] = (),
    ) -> _Reply:
        """One request with retries; Unavailable once they are used up or the answer is no.

        What `data` raises it adds to `failures`: that is raised, and nothing is tried again.
        """
        problem = ""
        num_sent = 0

        async def count(
            request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
        ) -> aiohttp.ClientResponse:
            # Per transmission: aiohttp repeats a request by itself if a connection breaks.
            nonlocal num_sent
            num_sent += 1
            return await send(request)

        for attempt in range(MAX_TRIES):
            await self._pause_before(attempt)
            try:
                async with self._http.request(
                    method,
                    self._sign(method, key),
                    data=_body(data),
                    headers=headers,
                    middlewares=(count,),
                ) as response:
                    body = await response.read()
                    if response.status in expected:
                        return _Reply(response.status, response.headers, body, num_sent > 1)
                    problem = f"answered {response.status}: {body[:300]!r}"
                    if response.status not in _TRY_AGAIN:
                        break
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                problem = repr(error)
            if failures:
                raise failures[-1]
        log.error("object store: %s %s %s", method, key, problem)
        raise Unavailable("the object store does not answer as it should")

    async def _pause_before(self, attempt: int) -> None:
        if attempt:
            await asyncio.sleep(random.uniform(0, self._retry_base_s * 2 ** (attempt - 1)))

    def _sign(self, method: str, key: str) -> URL:
        signed = self._minio.get_presigned_url(method, self._bucket, key, expires=_SIGNED_FOR)
        # encoded: another spelling of the same URL would not match its signature.
        return URL(signed, encoded=True)

    def _list(self, prefix: str) -> Sequence[BlobInfo]:
        entries = self._minio.list_objects(self._bucket, prefix=prefix, recursive=True)
        return [BlobInfo(entry.object_name, entry.size) for entry in entries]


def _body(data: bytes | Pieces | None) -> bytes | io.BytesIO | AsyncIterator[bytes] | None:
    """aiohttp sends a file in pieces and raw bytes in one go, which would hold up the loop."""
    if callable(data):
        return data()
    return io.BytesIO(data) if data is not None and len(data) > _LARGE_BYTES else data


def _new_mark() -> str:
    """A Content-Type that no other write has: S3 keeps it and, unlike x-amz-meta-*, does not want
    it signed.
    """
    return f"application/octet-stream; write={uuid.uuid4().hex}"


def _content_md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
