"""What is derived from the server secret: names of API key records, and the token between services.

API keys are 256 random bits, so one fast keyed hash is the right store for them (reliability S1):
the key itself is kept nowhere on the server.
"""

import hashlib
import hmac


def key_hmac(secret: bytes, key: str) -> str:
    """HMAC-SHA256 of an API key under the server secret, in hex: the name of its record."""
    # The prefix keeps a key that somebody sends from being any other text that is signed.
    return hmac.new(secret, b"api-key:" + key.encode(), hashlib.sha256).hexdigest()


def service_token(secret: bytes) -> str:
    """The bearer token with which the gateway and the workers speak to the registry, in hex."""
    return hmac.new(secret, b"service:registry", hashlib.sha256).hexdigest()
