"""The object stores that one suite runs on: `--stores disk,moto,rgw`."""

import contextlib
import io
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest
from minio import Minio
from tests.stores.rgw import ACCESS_KEY, SECRET_KEY, missing_programs, running_rgw

KINDS = ("disk", "moto", "rgw")


@dataclass(frozen=True, slots=True)
class Store:
    """An object store that is running."""

    kind: str
    endpoint: str = ""
    """host:port of an S3 server."""

    def new_url(self, folder: Path) -> str:
        """The store_url of an empty store: a folder of the disk, or a new bucket."""
        if self.kind == "disk":
            return f"file://{folder}/store"
        bucket = f"t-{uuid.uuid4().hex}"
        server = Minio(self.endpoint, ACCESS_KEY, SECRET_KEY, secure=False, region="us-east-1")
        server.make_bucket(bucket)
        return f"s3+http://{self.endpoint}/{bucket}"


def parametrize_stores(metafunc: pytest.Metafunc, default: Sequence[str]) -> None:
    """One variant per store for each test that asks, at whatever distance, for `store`."""
    if "store" not in metafunc.fixturenames:
        return
    asked: str = metafunc.config.getoption("stores")
    kinds = asked.split(",") if asked else default
    assert set(kinds) <= set(KINDS), f"--stores: {kinds} are not all of {KINDS}"
    marked = [
        kind if kind == "disk" else pytest.param(kind, marks=pytest.mark.s3) for kind in kinds
    ]
    metafunc.parametrize("store", marked, indirect=True, scope="session")


@contextlib.contextmanager
def running_store(kind: str) -> Iterator[Store]:
    """A store of this kind; where the programs of one are missing, the tests fail and name them."""
    if kind == "disk":
        yield Store(kind)
    elif kind == "moto":
        with running_moto() as endpoint:
            yield Store(kind, endpoint)
    elif missing := missing_programs():
        pytest.fail(f"--stores rgw: apt-get install radosgw ceph-mon ceph-osd; missing: {missing}")
    else:
        with (
            tempfile.TemporaryDirectory(prefix="lu-rw-") as folder,
            running_rgw(Path(folder)) as endpoint,
        ):
            yield Store(kind, endpoint)


@contextlib.contextmanager
def running_moto() -> Iterator[str]:
    """host:port of an in-process S3 server that works on one request at a time.

    Left alone two conditional writes can both win: it looks and stores without a lock.
    """
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    dispatch, alone = DomainDispatcherApplication(create_backend_app), Lock()

    def application(environ: Any, start_response: Any) -> Any:
        # Whole before the lock: one that is streamed from this very server would wait for itself.
        length = int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        with alone:
            return dispatch(environ, start_response)

    server = make_server(
        "127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler
    )
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
