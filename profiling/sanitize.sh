#!/usr/bin/env bash
# The kernels' tests on a GPU under NVIDIA's compute-sanitizer: out-of-bounds and misaligned accesses, then races.
#
#     profiling/sanitize.sh [PYTHON]          PYTHON: the interpreter with ipr_fast installed (default: python)
set -euo pipefail
cd "$(dirname "$0")/.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed: it comes with the CUDA toolkit" >&2; exit 1; }
for tool in memcheck racecheck; do
  compute-sanitizer --tool "$tool" --error-exitcode 1 "${1:-python}" -m pytest -m gpu tests/triton -p no:cacheprovider
done
