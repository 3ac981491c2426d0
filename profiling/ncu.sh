#!/usr/bin/env bash
# What limits single kernels on a GPU, by Nsight Compute 2023.1 or newer.
#
#     profiling/ncu.sh [--print] [--roofline] [--skip N] [--count N] [OUT] [KERNELS] [options of profile_refine.py]
#
# OUT: the report is OUT.ncu-rep (default: refine). KERNELS: a regular expression for their names (default: our own).
# --roofline: the roofline alone, in place of every section. --skip, --count: of the launches that match, leave out so
# many (default 0), then profile so many (default 40). --print: print the commands, run nothing.
# PYTHON names the interpreter (default: that of .venv, where there is one).
set -euo pipefail
here=. && [[ $0 == */* ]] && here=${0%/*}
# shellcheck source=profiling/common.sh
source "$here/common.sh"

sections=(--set full) skip=0 count=40 out=refine
kernels='^(renoise|accept|mask_tokens|reveal|categorical|threshold|slot_inputs|advance|denoise|linear|partial_attention|partial_attention_rows|context_mask|pixel_features|pixel_head|layer_norm|residual_norm|map_sum|group_norm|group_norm_turns)_kernel$'
while [[ $# -gt 0 ]]; do
  case $1 in
    --print) print=yes ;;
    --roofline) sections=(--section SpeedOfLight --section SpeedOfLight_RooflineChart) ;;
    --skip) skip=${2-} && need_number --skip "$skip" && shift ;;
    --count) count=${2-} && need_number --count "$count" && shift ;;
    *) break ;;
  esac
  shift
done
if [[ $# -gt 0 && $1 != -* ]]; then
  out=${1%.ncu-rep}
  shift
fi
if [[ $# -gt 0 && $1 != -* ]]; then
  kernels=$1
  shift
fi

if [[ $print == no ]]; then
  instead="$python $here/kernel_resources.py (registers and shared memory of every kernel, without a GPU)
     and: $python $here/profile_refine.py --chrome trace.json.gz (a table and a trace, by torch's profiler)"
  need_tool ncu "NVIDIA Nsight Compute (developer.nvidia.com/nsight-compute) and with the CUDA toolkit" "$instead"
  need_gpu "$instead"
fi

# Without graphs, so that a kernel is launched within the range of its operation. With `--backend graphs` among the
# options the kernels of a graph are profiled one by one as well, all within the range of its replay.
run ncu --profile-from-start off --graph-profiling node --nvtx --nvtx-include ipr_fast@iteration/ \
  --kernel-name "regex:$kernels" --launch-skip "$skip" --launch-count "$count" "${sections[@]}" \
  --force-overwrite --export "$out" \
  "$python" "$here/profile_refine.py" --nvtx --device cuda --backend torch --iters 1 "$@"

run ncu --import "$out.ncu-rep" --page details --print-summary per-kernel
