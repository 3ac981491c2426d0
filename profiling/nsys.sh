#!/usr/bin/env bash
# A timeline of a refinement on a GPU, by Nsight Systems 2023.2 or newer, and its tables.
#
#     profiling/nsys.sh [--print] [--whole-graphs] [OUT] [options of profile_refine.py]
#
# OUT: the report is OUT.nsys-rep (default: refine). --print: print the commands, run nothing. --whole-graphs: a replay
# is one bar, as it runs without a profiler; by default every kernel in it shows, which costs time with each.
# PYTHON names the interpreter (default: that of .venv, where there is one).
set -euo pipefail
here=. && [[ $0 == */* ]] && here=${0%/*}
# shellcheck source=profiling/common.sh
source "$here/common.sh"

graphs=node out=refine
while [[ ${1-} == --print || ${1-} == --whole-graphs ]]; do
  if [[ $1 == --print ]]; then print=yes; else graphs=graph; fi
  shift
done
if [[ $# -gt 0 && $1 != -* ]]; then
  out=${1%.nsys-rep}
  shift
fi

if [[ $print == no ]]; then
  instead="$python $here/profile_refine.py --chrome trace.json.gz (a table and a trace, by torch's profiler)"
  need_tool nsys "NVIDIA Nsight Systems (developer.nvidia.com/nsight-systems) and with the CUDA toolkit" "$instead"
  need_gpu "$instead"
fi

# Only what lies between cudaProfilerStart and cudaProfilerStop is recorded; at the stop the program goes on (by default
# nsys would end it). Without samples of the processor, which cost time on the very thread that launches.
run nsys profile --trace=cuda,nvtx,osrt,cublas,cudnn --cuda-graph-trace="$graphs" --sample=none --cpuctxsw=none \
  --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true --output="$out" \
  "$python" "$here/profile_refine.py" --nvtx --device cuda "$@"

reports=nvtx_sum,nvtx_gpu_proj_sum,cuda_gpu_kern_sum,cuda_gpu_mem_time_sum,cuda_api_sum
run nsys stats --force-export=true --report "$reports" "$out.nsys-rep"
