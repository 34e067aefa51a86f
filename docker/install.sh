#!/usr/bin/env bash
# What an image holds, and the empty environment of a test (tests/unit/test_docker.py): run where the environment's bin is first in PATH.
#
#   docker/install.sh cpu|gpu [dependencies|package]      default: both
#
# Beside `docker` lies what .dockerignore lets in. `dependencies` reads only constraints.txt and pyproject.toml: the slow layer of
# an image, which an edit of our code leaves as it is. `gpu` adds the extras of pyproject.toml, `dev` and `te` left out.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?cpu or gpu} part=${2:-}
export PIP_CONSTRAINT=$PWD/constraints.txt
unset PYTHONSAFEPATH  # DeepSpeed's setup.py imports what lies beside it

wanted() {
  python - "$kind" <<'PYTHON'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = {name: lines for name, lines in project["optional-dependencies"].items() if name not in ("dev", "te")}
chosen = {"cpu": [], "gpu": extras.values()}[sys.argv[1]]
print(*project["dependencies"], *(line for lines in chosen for line in lines), sep="\n")
PYTHON
}

if [[ $part != package ]]; then
  requirements=$(wanted)
  # torch first: DeepSpeed, and extras with kernels of their own, are built against it. DeepSpeed without its CUDA operations.
  pip install torch numpy setuptools wheel packaging ninja
  DS_BUILD_OPS=0 pip install --no-build-isolation --requirement <(echo "$requirements")
fi
if [[ $part != dependencies ]]; then
  pip install --no-deps --no-build-isolation .
  pip check
fi
