#!/usr/bin/env bash
# The kernels' tests on a GPU under NVIDIA's compute-sanitizer: out-of-bounds and misaligned accesses, then races.
#
#     profiling/sanitize.sh [--print]
#
# --print: print the commands, run nothing. PYTHON names the interpreter (default: that of .venv, where there is one).
set -euo pipefail
here=. && [[ $0 == */* ]] && here=${0%/*}
# shellcheck source=profiling/common.sh
source "$here/common.sh"

if [[ ${1-} == --print ]]; then
  print=yes
else
  instead="TRITON_INTERPRET=1 $python -m pytest $here/../tests/triton (Triton's interpreter, on any machine)"
  need_tool compute-sanitizer "the CUDA toolkit" "$instead"
  need_gpu "$instead"
fi

for tool in memcheck racecheck; do
  run compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$python" -m pytest -m gpu "$here/../tests/triton" -p no:cacheprovider
done
