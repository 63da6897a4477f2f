#!/bin/sh
# The secrets of a deployment, new and random: in files of FOLDER, or, with `kubectl` as the second
# argument, as the Secret `luthier` on standard output (kubectl apply -f -).
#
#   deploy/secrets.sh FOLDER [kubectl]
#
# What is in FOLDER already is kept, so it may be run again. Keep FOLDER: without server-secret no API
# key is known any more. Only its owner can enter it; the files themselves are readable, because compose
# mounts them one by one for the user of the containers.
set -eu
folder=$1
umask 077
mkdir -p "$folder"
chmod 700 "$folder"

random_hex() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }
make() {
  [ -s "$folder/$1" ] || printf '%s\n' "$2" > "$folder/$1"
  chmod 444 "$folder/$1"
}

make server-secret "$(random_hex 32)"
make operator-key "luthier-operator-$(random_hex 32)"
for user in admin- housekeeping- ""; do
  make "redis-${user}password" "$(random_hex 32)"
done
make s3-access-key "luthier-$(random_hex 8)"
make s3-secret-key "$(random_hex 32)"

if [ "${2:-}" = kubectl ]; then
  arguments=""
  for name in server-secret operator-key redis-admin-password redis-housekeeping-password redis-password s3-access-key s3-secret-key; do
    # A trailing newline would become part of a password.
    printf %s "$(cat "$folder/$name")" > "$folder/.$name"
    arguments="$arguments --from-file=$name=$folder/.$name"
  done
  # shellcheck disable=SC2086  (the arguments are words)
  kubectl create secret generic luthier --namespace luthier --dry-run=client -o yaml $arguments
  rm "$folder"/.[a-z]*
fi
