"""Links have a key of their own: it opens nothing else, and another one ends them."""

from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from luthier_core.blobs import open_blobs
from luthier_core.config import Config
from luthier_core.disk_blobs import DiskBlobs
from luthier_core.errors import ConfigError

KEY = "t/ann/archives/0.tar"


def config_of(folder: Path, store_url: str) -> Config:
    (folder / "secret").write_text("5" * 64)
    return Config(
        redis_url="",
        store_url=store_url,
        registry_url="",
        secret_file=str(folder / "secret"),
        s3_access_key="store",
        s3_secret_key="secret-of-store",
    )


async def test_s3_links_are_signed_by_the_identity_for_links(tmp_path: Path) -> None:
    config = config_of(tmp_path, "s3+http://127.0.0.1:9/bucket")
    for given, signer in (({}, "store"), ({"link_access_key": "links"}, "links")):
        secret = {"link_secret_key": "s"} if given else {}
        async with open_blobs(replace(config, **given, **secret)) as blobs:
            query = parse_qs(urlsplit(blobs.signed_url(KEY, 60)).query)
        assert query["X-Amz-Credential"][0].split("/")[0] == signer
    with pytest.raises(ConfigError, match="both"):
        async with open_blobs(replace(config, link_access_key="links")):
            pass


async def test_another_secret_ends_the_links_of_a_folder(tmp_path: Path) -> None:
    config = config_of(tmp_path, f"file://{tmp_path}/objects")

    def is_valid(blobs: object, url: str) -> bool:
        assert isinstance(blobs, DiskBlobs)
        query = parse_qs(urlsplit(url).query)
        return blobs.signature_is_valid(KEY, int(query["expires"][0]), query["signature"][0])

    async with open_blobs(replace(config, link_secret_key="one")) as blobs:
        url = blobs.signed_url(KEY, 60)
        assert is_valid(blobs, url)
    for other in ("two", ""):
        async with open_blobs(replace(config, link_secret_key=other)) as blobs:
            assert not is_valid(blobs, url)
