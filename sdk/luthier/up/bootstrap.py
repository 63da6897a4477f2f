"""What a new deployment needs before its first request: a bucket, and an operator's key.

    python -m luthier.up.bootstrap --config FILE --operator-key-file FILE [--make-bucket]

`luthier up` does the same by itself. May be repeated: what is there is left as it is, so it runs
before every start of the registry (deploy/k8s).
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from luthier.up.access import ADMIN_SCOPES, register_keys
from luthier.up.options import ApiKey
from luthier_core.auth import is_damaged
from luthier_core.config import Config, load_config
from luthier_core.errors import ConfigError

MIN_KEY_CHARS = 32


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m luthier.up.bootstrap", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--operator-key-file", type=Path, required=True, metavar="FILE")
    parser.add_argument("--make-bucket", action="store_true", help="make the bucket of store_url")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit 0, or 2 and one line on standard error."""
    arguments = parser().parse_args(argv)
    try:
        config = load_config(arguments.config, os.environ)
        key = read_key(arguments.operator_key_file)
        if arguments.make_bucket:
            make_bucket(config)
        operator = ApiKey(key, scopes=ADMIN_SCOPES)
        asyncio.run(register_keys(config, config.secret(), [operator]))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def read_key(path: Path) -> str:
    """The key in a file; ConfigError if it could be guessed or was cut short."""
    try:
        key = path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"--operator-key-file: {error}") from error
    if len(key) < MIN_KEY_CHARS or is_damaged(key):
        raise ConfigError(f"--operator-key-file {path}: it holds no key, or part of one")
    return key


def make_bucket(config: Config) -> None:
    """Make the bucket of an S3 store, if it is not there; nothing for a folder."""
    from minio import Minio
    from minio.error import MinioException
    from urllib3.exceptions import HTTPError

    url = urlsplit(config.store_url)
    if not url.scheme.startswith("s3+"):
        return
    client = Minio(
        url.netloc,
        access_key=config.s3_access_key,
        secret_key=config.s3_secret_key,
        secure=url.scheme == "s3+https",
    )
    try:
        if not client.bucket_exists(url.path.strip("/")):
            client.make_bucket(url.path.strip("/"))
    except (MinioException, HTTPError) as error:
        raise ConfigError(f"cannot make the bucket of {config.store_url}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
