"""Uploads of adapters that were made elsewhere: announced with their configuration, then sent.

The weights are checked while they pass (reliability S7, S9): what is not exactly a PEFT adapter of
this base model, or not what was announced, is never stored. Nothing that is uploaded is unpacked.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from luthier_core import keys
from luthier_core.caller import REFUSAL
from luthier_core.errors import InvalidField, LuthierError, Unavailable, Unreadable, Unsupported
from luthier_core.peft_files import (
    MAX_FROZEN_COPIES,
    WEIGHTS_FILE,
    check_adapter,
    file_shapes,
    portable_config,
)
from luthier_core.records import UploadRecord
from luthier_core.rest_types import CreateUpload
from luthier_core.safetensors_check import MAX_HEADER_BYTES, PassingCheck, TensorInfo
from luthier_core.types import parse
from luthier_gateway.backends import BACKENDS, TENANT, Backends
from luthier_gateway.web_io import MAX_SMALL_BODY, json_response, read_body

PIECE_BYTES = 1024 * 1024
MIN_BYTES_PER_S = 64 * 1024
GRACE_S = 60.0
"""An upload may take this long, and as long as it takes at MIN_BYTES_PER_S."""
_VALUE_BYTES = 4
"""Of float32, the widest type that is taken."""

Modules = dict[str, dict[str, tuple[int, ...]]]


async def create_upload(request: web.Request) -> web.Response:
    """Announce an adapter: its configuration is checked before its weights travel."""
    backends = request.app[BACKENDS]
    wanted = parse(CreateUpload, await read_body(request, MAX_SMALL_BODY))
    if refusal := REFUSAL.get():
        raise refusal
    if wanted.base_model not in backends.config.model_names:
        names = backends.config.model_names
        raise InvalidField(
            f"base_model: {wanted.base_model!r} is not served here; there are {names}"
        )
    config = portable_config(wanted.adapter_config, wanted.base_model)
    if config["r"] > backends.config.limits.max_rank:
        most = backends.config.limits.max_rank
        raise InvalidField(f"adapter_config.r: {config['r']}; allowed are 1 to {most}")
    facts = await backends.model_facts(wanted.base_model)
    most_bytes = _max_bytes(facts, config["r"])
    if wanted.num_bytes > most_bytes:
        raise InvalidField(
            f"num_bytes: {wanted.num_bytes}; an adapter of rank {config['r']} for this model has "
            f"at most {most_bytes}"
        )
    upload = await backends.registry.create_upload(
        request[TENANT],
        {
            **wanted.model_dump(),
            "adapter_config": config,
            "idempotency_key": request.headers.get("X-Idempotency-Key"),
        },
    )
    return json_response({"upload_id": upload.upload_id})


async def put_upload(request: web.Request) -> web.Response:
    """Send the weights that were announced, adapter_model.safetensors as it is; a repeat is none.

    The answer has the paths of the checkpoints that they are now.
    """
    backends, tenant = request.app[BACKENDS], request[TENANT]
    upload, paths = await backends.registry.upload(tenant, request.match_info["upload_id"])
    if not paths:
        switches = await _receive(backends, request, upload)
        paths = await backends.registry.adopt_upload(tenant, upload.upload_id, switches)
    return json_response({"tinker_path": paths[0], "sampler_path": paths[1]})


async def _receive(
    backends: Backends, request: web.Request, upload: UploadRecord
) -> Mapping[str, bool]:
    """Store the weights; which kinds of modules they are on."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise Unsupported("Content-Encoding: send the file as it is")
    if request.content_length != upload.num_bytes:
        raise InvalidField(
            f"Content-Length: {request.content_length}; announced were {upload.num_bytes} bytes"
        )
    arriving = _Arriving(request, upload, await backends.model_facts(upload.base_model))
    prefix = keys.checkpoint_prefix(upload.tenant, upload.run_id, 0, 0)
    try:
        async with asyncio.timeout(GRACE_S + upload.num_bytes / MIN_BYTES_PER_S):
            await backends.blobs.put_stream(
                f"{prefix}{WEIGHTS_FILE}", arriving.pieces, upload.num_bytes
            )
    except TimeoutError:
        raise Unreadable(f"it came at less than {MIN_BYTES_PER_S} bytes per second") from None
    return arriving.switches


class _Arriving:
    """The body of one upload, checked piece by piece."""

    def __init__(
        self, request: web.Request, upload: UploadRecord, facts: Mapping[str, Any]
    ) -> None:
        self._request = request
        self._upload = upload
        self._facts = facts
        self._check = PassingCheck(WEIGHTS_FILE, upload.num_bytes, self._check_tensors)
        self._sha256 = hashlib.sha256()
        self._num_left = upload.num_bytes
        self._was_read = False
        self._error: LuthierError = Unavailable("the object store did not take the upload")
        self.switches: Mapping[str, bool] = {}

    async def pieces(self) -> AsyncIterator[bytes]:
        """The bytes; what is wrong with them is raised, at the latest instead of their end.

        They can be had once: at another try of the store the client has to send them again.
        """
        if self._was_read:
            raise self._error
        self._was_read = True
        try:
            async for piece in self._gathered():
                await asyncio.to_thread(self._pass, piece)
                self._num_left -= len(piece)
                if self._num_left == 0:  # a store that has all bytes may keep them: check before
                    self._check_end()
                yield piece
            if self._num_left:
                self._check_end()
        except LuthierError as error:
            self._error = error
            raise

    async def _gathered(self) -> AsyncIterator[bytes]:
        """The body in pieces of PIECE_BYTES, however it was cut on the way."""
        gathered = bytearray()
        try:
            async for data in self._request.content.iter_any():
                gathered += data
                if len(gathered) >= PIECE_BYTES:
                    yield bytes(gathered)
                    gathered.clear()
        except web.RequestPayloadError:
            raise Unreadable("the connection ended within the body") from None
        if gathered:
            yield bytes(gathered)

    def _pass(self, piece: bytes) -> None:
        self._check.feed(piece)
        self._sha256.update(piece)

    def _check_end(self) -> None:
        self._check.end()
        if self._sha256.hexdigest() != self._upload.sha256:
            raise InvalidField("sha256: the bytes that came have another one")

    def _check_tensors(self, tensors: Mapping[str, TensorInfo]) -> None:
        facts = self._facts
        self.switches = check_adapter(
            tensors,
            self._upload.adapter_config,
            _modules(facts),
            (facts["vocab_size"], facts["hidden_size"]),
        )


def _modules(facts: Mapping[str, Any]) -> Modules:
    """What an adapter can be on: switch -> name -> shape."""
    if "lora_modules" not in facts:
        raise Unavailable("the trainers of this base model are older than this gateway")
    return {
        switch: {name: tuple(shape) for name, shape in modules.items()}
        for switch, modules in facts["lora_modules"].items()
    }


def _max_bytes(facts: Mapping[str, Any], rank: int) -> int:
    """Of an adapter of that rank on every module, with the copies that PEFT adds."""
    num_values: int = MAX_FROZEN_COPIES * facts["vocab_size"] * facts["hidden_size"]
    for modules in _modules(facts).values():
        for name, shape in modules.items():
            for rows, columns in file_shapes(name, modules, shape, rank).values():
                num_values += rows * columns
    return MAX_HEADER_BYTES + 8 + _VALUE_BYTES * num_values
