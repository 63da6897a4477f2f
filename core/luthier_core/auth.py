"""API keys, and what is derived from the server secret: names of key records, the service token.

API keys are 256 random bits, so one fast keyed hash is the right store for them (reliability S1):
the key itself is kept nowhere on the server.
"""

import hashlib
import hmac
import re
import secrets
import zlib

KEY_PREFIX = "tml-lu1"
"""The SDK wants `tml-`; what follows says that a checksum ends the key."""

_CHECKED_KEY = re.compile(rf"({KEY_PREFIX}[A-Za-z0-9_-]{{43}})([0-9a-f]{{8}})")


def new_api_key() -> str:
    """A key of 256 random bits that ends in a checksum of the rest."""
    body = KEY_PREFIX + secrets.token_urlsafe(32)
    return body + _checksum(body)


def is_damaged(key: str) -> bool:
    """Whether this cannot be a key as it was given out: cut short, mistyped, or made up.

    Keys that an operator has chosen have another prefix and no checksum.
    """
    if not key.startswith(KEY_PREFIX):
        return False
    found = _CHECKED_KEY.fullmatch(key)
    return found is None or _checksum(found[1]) != found[2]


def key_hmac(secret: bytes, key: str) -> str:
    """HMAC-SHA256 of an API key under the server secret, in hex: the name of its record."""
    # The prefix keeps a key that somebody sends from being any other text that is signed.
    return hmac.new(secret, b"api-key:" + key.encode(), hashlib.sha256).hexdigest()


def key_id(key_name: str) -> str:
    """The public name of a key, from its HMAC: 48 bits that open nothing."""
    return key_name[:12]


def service_token(secret: bytes) -> str:
    """The bearer token with which the gateway and the workers speak to the registry, in hex."""
    return hmac.new(secret, b"service:registry", hashlib.sha256).hexdigest()


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
