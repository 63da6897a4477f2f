"""API keys of the embedded stack, as records in the object store."""

from collections.abc import Sequence
from datetime import UTC, datetime

from luthier.up.options import ApiKey
from luthier_core import keys
from luthier_core.auth import key_hmac
from luthier_core.blobs import BlobMissing, Blobs, open_blobs
from luthier_core.config import Config
from luthier_core.errors import ConfigError, LuthierError
from luthier_core.records import ApiKeyRecord, OrgRecord

ADMIN_SCOPES = ("read", "admin", "operator")


async def register_keys(config: Config, secret: bytes, api_keys: Sequence[ApiKey]) -> None:
    """Makes every key valid for its tenant; ConfigError if the store cannot be written."""
    try:
        async with open_blobs(config) as blobs:
            for tenant in {api_key.tenant for api_key in api_keys}:
                org = OrgRecord(org_id=tenant, name=tenant, created_at=datetime.now(UTC))
                await blobs.put_if_absent(keys.org_record(tenant), org.to_bytes())
            for api_key in api_keys:
                await _register(blobs, key_hmac(secret, api_key.key), api_key)
    except (LuthierError, OSError) as error:
        raise ConfigError(f"cannot write to {config.store_url}: {error}") from error


async def _register(blobs: Blobs, name: str, api_key: ApiKey) -> None:
    """Writes the record unless it says the same already: a start changes nothing that is right."""
    path = keys.api_key_record(name)
    try:
        there = ApiKeyRecord.from_bytes(await blobs.get(path))
        if (there.tenant, there.scopes) == (api_key.tenant, api_key.scopes):
            return
    except BlobMissing:
        pass
    record = ApiKeyRecord(
        tenant=api_key.tenant,
        scopes=api_key.scopes,
        created_at=datetime.now(UTC),
        note="luthier up",
    )
    await blobs.put(path, record.to_bytes())
