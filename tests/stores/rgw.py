"""A Ceph RGW of its own: monitor, OSD in memory and gateway as processes in one folder.

A real S3 server, from Debian: `apt-get install --no-install-recommends radosgw ceph-mon ceph-osd`.
"""

import contextlib
import shutil
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = (
    *("ceph", "ceph-authtool", "ceph-mon", "ceph-osd"),
    *("monmaptool", "radosgw", "radosgw-admin"),
)
ACCESS_KEY, SECRET_KEY = "key", "secret"
START_S = 60.0
STOP_S = 10.0
MEMORY_BYTES = 8 * 2**30

_CONFIG = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}/0
keyring = {folder}/keyring
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.$pid.asok
pid file = {folder}/$name.pid
mon data = {folder}/mon
mon allow pool size one = true
mon max pg per osd = 10000
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = {memory_bytes}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
[client]
rgw frontends = beast endpoint=127.0.0.1:{rgw_port}
rgw enable apis = s3
rgw enable usage log = false
"""

_CAPS = {
    "mon.": ("mon",),
    "client.admin": ("mon", "osd", "mgr"),
    "osd.0": ("mon", "osd", "mgr"),
}


def missing_programs() -> list[str]:
    """What is not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextlib.contextmanager
def running_rgw(folder: Path) -> Iterator[str]:
    """host:port of an empty RGW; TimeoutError with its last words if it does not start."""
    mon_port, rgw_port = _free_ports(2)
    config = folder / "ceph.conf"
    fsid = str(uuid.uuid4())
    config.write_text(
        _CONFIG.format(
            folder=folder,
            fsid=fsid,
            mon_port=mon_port,
            rgw_port=rgw_port,
            memory_bytes=MEMORY_BYTES,
        )
    )
    with contextlib.ExitStack() as daemons:

        def run(*command: str) -> None:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=START_S)

        def start(*command: str) -> None:
            daemons.enter_context(_running([*command, "-c", str(config), "-f"], folder))

        _make_keyring(run)
        run(
            *("monmaptool", "--create", "--fsid", fsid),
            *("--addv", "a", f"[v2:127.0.0.1:{mon_port}]", "monmap"),
        )
        for name in ("mon", "osd"):
            (folder / name).mkdir()
        conf = ("-c", str(config))
        run("ceph-mon", *conf, "-i", "a", "--mkfs", "--monmap", "monmap", "--keyring", "keyring")
        start("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        run("ceph", *conf, "osd", "new", osd)
        run("ceph", *conf, "auth", "import", "-i", "keyring")
        run("ceph-osd", *conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        start("ceph-osd", "-i", "0")
        start("radosgw", "-n", "client.admin")
        _wait_until_it_answers(rgw_port, folder)
        run(
            *("radosgw-admin", *conf, "user", "create", "--uid", "tests", "--display-name", "t"),
            *("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY, "--max-buckets", "0"),
        )
        yield f"127.0.0.1:{rgw_port}"


def _make_keyring(run: Callable[..., None]) -> None:
    run("ceph-authtool", "-C", "keyring")
    for name, parts in _CAPS.items():
        caps = [word for part in parts for word in ("--cap", part, "allow *")]
        run("ceph-authtool", "keyring", "--gen-key", "-n", name, *caps)


@contextlib.contextmanager
def _running(command: list[str], folder: Path) -> Iterator[None]:
    with (folder / f"{command[0]}.out").open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_it_answers(port: int, folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    words = {path.name: path.read_text()[-1000:] for path in folder.glob("*.out")}
    raise TimeoutError(f"RGW did not start: {words}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        probes = [opened.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
