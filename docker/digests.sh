#!/usr/bin/env bash
# Holds the bases of docker/Dockerfile by what their tags name in the registry now (`make image-digests`). All of them or none.
set -euo pipefail
file=$(dirname "$0")/Dockerfile
names=$(sed -nE 's/^ARG [A-Z]+_BASE=([^@]+).*/\1/p' "$file")
edits=()
for name in $names; do
  digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$name")
  [[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] || { echo "image-digests: no digest of $name, but: $digest" >&2; exit 1; }
  edits+=(-e "s|=$name(@.*)?$|=$name@$digest|")
done
sed -i -E "${edits[@]}" "$file"
grep -E '^ARG [A-Z]+_BASE=' "$file"
