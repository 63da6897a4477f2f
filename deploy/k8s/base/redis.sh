#!/bin/sh
# Redis with a user for our parts and one for Celery, whose lock is a script of its own. Neither may do
# what only an operator does, who has the password of `default`: CONFIG, KEYS, DEBUG, SHUTDOWN, ...
set -eu
exec valkey-server "$(dirname "$0")/valkey.conf" --requirepass "$REDIS_ADMIN_PASSWORD" \
  --user luthier on ">$REDIS_PASSWORD" '~*' '&*' \
    +@all -@dangerous -@scripting +info +fcall '+function|load' \
  --user housekeeping on ">$REDIS_HOUSEKEEPING_PASSWORD" '~*' '&*' +@all -@dangerous +info
