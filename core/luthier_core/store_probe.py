"""Asks an object store at the start whether it keeps the promises that a takeover relies on.

Fencing rests on conditional writes: with a store that ignores them two owners of one run would both
win (reliability S20). So what needs more than one worker of a model is refused there.
"""

import logging
import secrets

from luthier_core import keys
from luthier_core.blobs import Blobs, open_blobs
from luthier_core.config import Config
from luthier_core.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)


async def broken_promises(blobs: Blobs) -> list[str]:
    """What the store does otherwise than it should; it is left as it was."""
    key = keys.store_probe(secrets.token_hex(8))
    broken = []
    try:
        if not await blobs.put_if_absent(key, b"first"):
            broken.append("create-if-absent of a new object is refused")
        if await blobs.put_if_absent(key, b"second"):
            broken.append("create-if-absent replaces what is there")
        _, etag = await blobs.get_with_etag(key)
        if await blobs.put_if_match(key, b"third", etag) is None:
            broken.append("a write under the current ETag is refused")
        if await blobs.put_if_match(key, b"fourth", etag) is not None:
            broken.append("a write under an old ETag is carried out")
        if not broken and await blobs.get(key) != b"third":
            broken.append("a read does not see the write before it")
        if not await blobs.refuses_damaged(key):
            broken.append("a damaged upload is stored")
    finally:
        await blobs.delete(key)
    return broken


async def probe_store(config: Config) -> None:
    """check_store at the start of a service that lives without its store for a while."""
    async with open_blobs(config) as blobs:
        try:
            await check_store(blobs, config)
        except Unavailable:
            log.warning("object store: it does not answer, so it was not probed")


async def check_store(blobs: Blobs, config: Config) -> None:
    """ConfigError if a model has several trainers on a store that cannot fence them."""
    broken = await broken_promises(blobs)
    if not broken:
        return
    problems = "; ".join(broken)
    shared = [model.name for model in config.models if model.num_trainers > 1]
    if shared:
        raise ConfigError(
            f"store_url {config.store_url}: {problems}. Several trainers of a model need a store "
            f"with conditional writes: set num_trainers = 1 for {shared}, or use another store"
        )
    log.warning("object store: %s; it must not be shared by several trainers of a model", problems)
