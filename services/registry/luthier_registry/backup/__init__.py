"""A deployment in a folder, and back: every object of the store, and every key of Redis.

    python -m luthier_registry.backup save --config FILE --folder DIR
    python -m luthier_registry.backup restore --config FILE --folder DIR

Nothing else may run meanwhile but Redis and the store: objects and log are one state. The store may
be of another kind than before. The server secret is not in it: without it no API key is known.
"""

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import redis.asyncio as redis

from luthier_core import keys
from luthier_core.blobs import Blobs, open_blobs
from luthier_core.config import Config
from luthier_core.errors import ConfigError
from luthier_core.oplog import Oplog, connect

OBJECTS, INDEX, REDIS = "objects", "objects.jsonl", "redis.jsonl"
DONE = "complete"
"""A backup without this file is half of one."""
PIECE_BYTES = 1024 * 1024
SCAN_KEYS = 500


def save(config: Config, folder: Path) -> str:
    """Write everything to a new folder; ConfigError if a worker is alive, or it is not empty."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(f"--folder {folder}: it is not empty")
    done = asyncio.run(_save_all(config, folder))
    (folder / DONE).touch()
    return done


async def _save_all(config: Config, folder: Path) -> str:
    async with connect(config.redis_url) as client, open_blobs(config) as blobs:
        if alive := await Oplog(client).live_workers():
            raise ConfigError(f"stop the workers first: {', '.join(alive)}")
        num_keys = await _save_redis(client, folder / REDIS)
        num_objects = await _save_objects(blobs, folder)
    return f"{num_objects} objects and {num_keys} keys in {folder}"


def restore(config: Config, folder: Path) -> str:
    """Write everything back; ConfigError if the backup is not whole, or something is there."""
    if not (folder / DONE).exists():
        raise ConfigError(f"--folder {folder}: it holds no complete backup")
    return asyncio.run(_restore_all(config, folder))


async def _restore_all(config: Config, folder: Path) -> str:
    async with connect(config.redis_url) as client, open_blobs(config) as blobs:
        if await client.dbsize():
            raise ConfigError("Redis is not empty")
        async for info in blobs.list(""):
            raise ConfigError(f"the object store is not empty: {info.key}")
        num_objects = await _restore_objects(blobs, folder)
        num_keys = await _restore_redis(client, folder / REDIS)
    return f"{num_objects} objects and {num_keys} keys from {folder}"


# --- Redis ----------------------------------------------------------------------------------------


async def _save_redis(client: redis.Redis, path: Path) -> int:
    """One line for each key: its name, what DUMP gives, and the milliseconds it has to live."""
    num_keys = 0
    with path.open("w") as file:
        async for key in client.scan_iter(count=SCAN_KEYS):
            value = await cast(Any, client.dump(key))
            ttl_ms = await client.pttl(key)
            if value is None:  # expired since
                continue
            line = {"key": _text(key), "value": _text(value), "ttl_ms": max(ttl_ms, 0)}
            file.write(json.dumps(line) + "\n")
            num_keys += 1
    return num_keys


async def _restore_redis(client: redis.Redis, path: Path) -> int:
    """The generation comes last: until it is there no gateway takes anything."""
    num_keys, last = 0, None
    with path.open() as file:
        for line in file:
            entry = json.loads(line)
            if base64.b64decode(entry["key"]) == keys.GENERATION.encode():
                last = entry
            else:
                await _put_back(client, entry)
            num_keys += 1
    if last is not None:
        await _put_back(client, last)
    return num_keys


async def _put_back(client: redis.Redis, entry: dict[str, Any]) -> None:
    key, value = base64.b64decode(entry["key"]), base64.b64decode(entry["value"])
    await cast(Any, client.restore(key, entry["ttl_ms"], value))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- objects --------------------------------------------------------------------------------------


async def _save_objects(blobs: Blobs, folder: Path) -> int:
    num_objects = 0
    with (folder / INDEX).open("w") as index:
        async for info in blobs.list(""):
            path, digest = folder / OBJECTS / info.key, hashlib.sha256()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                async for piece in blobs.stream(info.key):
                    file.write(piece)
                    digest.update(piece)
            index.write(json.dumps({"key": info.key, "sha256": digest.hexdigest()}) + "\n")
            num_objects += 1
    return num_objects


async def _restore_objects(blobs: Blobs, folder: Path) -> int:
    """Checked before the first is written: half a restore is worse than none."""
    with (folder / INDEX).open() as index:
        entries = [json.loads(line) for line in index]
    for entry in entries:
        path, digest = folder / OBJECTS / entry["key"], hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
        if digest.hexdigest() != entry["sha256"]:
            raise ConfigError(f"{path}: its content is not what was saved")
    for entry in entries:
        path = folder / OBJECTS / entry["key"]
        await blobs.put_stream(entry["key"], partial(_pieces, path), path.stat().st_size)
    return len(entries)


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece
