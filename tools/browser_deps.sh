#!/usr/bin/env bash
# What the tests of pages need, from the distribution's packages: `make browser-deps`. Says what it did, and always ends well: where
# it cannot install anything those tests skip, with their own reason.
set -euo pipefail

for program in chromium chromium-browser google-chrome; do
  if command -v "$program" >/dev/null; then echo "browser-deps: $program is there"; exit 0; fi
done
without() { echo "browser-deps: no Chromium, and $1; the tests of pages will skip"; exit 0; }

[[ $(id -u) -eq 0 ]] || without "only root can install packages"
command -v apt-get >/dev/null || without "there is no apt-get"

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || without "apt-get update failed"
apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core || without "apt-get install failed"
echo "browser-deps: installed chromium"
