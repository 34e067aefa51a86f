#!/usr/bin/env bash
# What the Slurm tests need, from the distribution's packages: `make slurm-deps`. Says what it did, and always ends well: where it cannot
# install anything the tests skip, with their own reason.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

declare -A package=(
  [slurmctld]=slurmctld [slurmd]=slurmd [sbatch]=slurm-client [munged]=munge [ip]=iproute2 [unshare]=util-linux
)
missing=()
for program in "${!package[@]}"; do
  command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
without() { echo "slurm-deps: ${missing[*]} missing, and $1; the Slurm tests will skip"; exit 0; }

if [[ ${#missing[@]} -eq 0 ]]; then echo "slurm-deps: all there"; exit 0; fi
[[ $(id -u) -eq 0 ]] || without "only root can install packages"
command -v apt-get >/dev/null || without "there is no apt-get"

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || without "apt-get update failed"  # a list of packages that is old, or none, as in images
apt-get install -qq -y --no-install-recommends "${missing[@]}" || without "apt-get install failed"
echo "slurm-deps: installed ${missing[*]}"

# Tests bring up their own daemons. The packages' own start only where a service manager runs.
if [[ -d /run/systemd/system ]]; then
  for name in "${missing[@]}"; do
    case $name in slurmctld | slurmd | munge) systemctl disable --quiet --now "$name" || echo "slurm-deps: $name may be running" ;; esac
  done
fi
