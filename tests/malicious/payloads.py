"""Serialized Python objects, which run code when they are read, at every door (reliability S6)."""

import io
import json
import random
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kombu import serialization
from kombu.exceptions import ContentDisallowed, DecodeError
from pydantic import ValidationError
from tests.malicious.harness import Family, Guard

from luthier_core.config import Config
from luthier_core.errors import BadRequest
from luthier_core.records import RunRecord
from luthier_core.safetensors_check import read_header
from luthier_core.types import SaveWeights
from luthier_core.types import parse as parse_wire
from luthier_core.validation import parse_forward_backward
from luthier_registry import tasks
from luthier_registry.requests import CreateRun
from luthier_registry.requests import parse as parse_internal

CANARY = Path(tempfile.gettempdir()) / "lu-canary"
_COMMAND = f"touch {CANARY}".encode()
_TEXT_PICKLE = b"cposix\nsystem\n(S'" + _COMMAND + b"'\ntR."
_BINARY_PICKLE = (
    b"\x80\x02cposix\nsystem\nX" + struct.pack("<I", len(_COMMAND)) + _COMMAND + b"\x85R."
)
_CONFIG = Config(redis_url="redis://h/0", store_url="", registry_url="", secret_file="")


def _from_the_broker(data: bytes, content_type: str) -> object:
    """As a Celery worker decodes a message."""
    accept = set(tasks.make_app(_CONFIG).conf.accept_content)
    serializer = {"application/x-python-serialize": "pickle"}.get(content_type, content_type)
    try:
        return serialization.loads(
            data, content_type, "binary", accept=serialization.prepare_accept_content(accept)
        )
    except (ContentDisallowed, DecodeError, ValueError) as error:
        raise BadRequest(f"{serializer}: {error}") from None


def _record(data: bytes) -> object:
    try:
        return RunRecord.from_bytes(data)
    except ValidationError as error:
        raise BadRequest(str(error)[:100]) from None


DOORS: dict[str, Callable[[bytes], object]] = {
    "gateway, JSON": lambda data: parse_wire(SaveWeights, data),
    "gateway, protobuf": parse_forward_backward,
    "registry": lambda data: parse_internal(CreateRun, data),
    "object store": _record,
    "tensors": lambda data: read_header(data, "adapter_model.safetensors"),
    "broker, pickle": lambda data: _from_the_broker(data, "application/x-python-serialize"),
    "broker, YAML": lambda data: _from_the_broker(data, "application/x-yaml"),
    "broker, JSON": lambda data: _from_the_broker(data, "application/json"),
}


def check(case: tuple[str, bytes]) -> object:
    """AssertionError if a payload was executed: it makes a file."""
    door, data = case
    CANARY.unlink(missing_ok=True)
    try:
        return DOORS[door](data)
    finally:
        assert not CANARY.exists(), f"executed at {door}"


def _zipped() -> bytes:
    """What torch.save writes: a zip with a pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", _BINARY_PICKLE)
    return file.getvalue()


def _numpy() -> bytes:
    """An .npy file of objects."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + _BINARY_PICKLE


KINDS: dict[str, bytes] = {
    "text pickle": _TEXT_PICKLE,
    "binary pickle": _BINARY_PICKLE,
    "compressed pickle": zlib.compress(_BINARY_PICKLE),
    "torch file": _zipped(),
    "numpy file": _numpy(),
    "YAML": b"!!python/object/apply:posix.system ['" + _COMMAND + b"']",
    "jsonpickle": json.dumps({"py/reduce": [{"py/function": "posix.system"}, ["x"]]}).encode(),
    "source": b"__import__('posix').system('" + _COMMAND + b"')",
    "marshal": b"\xe3" + bytes(20) + _COMMAND,
    "pickle behind a safetensors length": struct.pack("<Q", len(_TEXT_PICKLE)) + _TEXT_PICKLE,
}


def _at_a_door(data: bytes) -> Callable[[random.Random], tuple[str, bytes]]:
    refusing = [door for door in DOORS if (door, data) != ("broker, JSON", KINDS["jsonpickle"])]
    return lambda rng: (rng.choice(refusing), data)


def _good() -> Any:
    return "gateway, JSON", b'{"model_id": "m", "seq_id": 1, "path": "x"}'


PAYLOADS = Family(
    name="S6 payloads",
    check=check,
    good=_good,
    classes={kind: _at_a_door(data) for kind, data in KINDS.items()},
    guards={
        "JSON only": Guard(tasks, "ACCEPT", ["json", "pickle", "yaml"], lets_in="binary pickle")
    },
    num_inputs=400,
)
