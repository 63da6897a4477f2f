"""The object stores that one contract suite runs on."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from luthier_core.blobs import Blobs
from luthier_core.disk_blobs import DiskBlobs


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """host:port of an in-process S3 server with an empty bucket `luthier`."""
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    from minio import Minio

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        endpoint = f"{host}:{port}"
        Minio(endpoint, "key", "secret", secure=False, region="us-east-1").make_bucket("luthier")
        yield endpoint
    finally:
        running.stop()


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
async def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Blobs]:
    """An empty store of each sort."""
    if request.param == "disk":
        yield DiskBlobs(tmp_path, "http://gateway", b"secret")
        return
    from luthier_core.s3_blobs import S3Blobs

    async with S3Blobs(
        request.getfixturevalue("s3_endpoint"),
        "luthier",
        access_key="key",
        secret_key="secret",
        secure=False,
        region="us-east-1",
        retry_base_s=0.0,
    ) as store:
        yield store
        async for info in store.list(""):
            await store.delete(info.key)
