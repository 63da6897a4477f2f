"""A PEFT adapter in a folder, read for an upload: its configuration, and its weights in pieces."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PIECE_BYTES = 1 << 20
MIN_BYTES_PER_S = 64 * 1024
"""The server waits for no slower an upload."""
GRACE_S = 120.0


@dataclass(frozen=True, slots=True)
class Upload:
    """What is to be sent."""

    name: str
    config: dict[str, Any]
    path: Path
    num_bytes: int
    sha256: str

    @property
    def base_model(self) -> str | None:
        """What the adapter's configuration says."""
        return self.config.get("base_model_name_or_path")

    @property
    def timeout_s(self) -> float:
        return GRACE_S + self.num_bytes / MIN_BYTES_PER_S

    async def pieces(self, on_progress: Callable[[int, int], None]) -> AsyncIterator[bytes]:
        """The weights from their beginning."""
        num_sent = 0
        on_progress(num_sent, self.num_bytes)
        with self.path.open("rb") as file:
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield piece
                num_sent += len(piece)
                on_progress(num_sent, self.num_bytes)


def read_upload(folder: Path) -> Upload:
    """The adapter in the folder; ValueError if there is none."""
    config_path, path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for needed in (config_path, path):
        if not needed.is_file():
            raise ValueError(f"{needed} is missing: it must be the folder of a PEFT adapter")
    try:
        config = json.loads(config_path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{config_path}: no JSON object")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Upload(folder.resolve().name, config, path, path.stat().st_size, sha256)
