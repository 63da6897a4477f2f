"""As much of valkey-cli as the probes use: `valkey-cli ping`. The wheel has the server only."""

import os
import sys

import redis

if __name__ == "__main__":
    assert sys.argv[1:] == ["ping"], sys.argv
    client = redis.Redis(os.environ["POD_ADDRESS"], password=os.environ["REDISCLI_AUTH"])
    try:
        print("PONG" if client.ping() else "")
    except redis.RedisError as error:
        sys.exit(str(error))
