"""The time of a recorded refinement, by range of the engine and by kind of operator.

Reads the events of a Chrome trace that profile_refine.py has recorded. On a CPU every microsecond belongs to the
innermost operator or range that is open then, so the rows add up to the whole. On a GPU the whole is the time in which
the device works: a kernel belongs to the operator and the range from which it was launched, and a graph's replay is one
launch, from the range `tick` or `begin`: what is in it is told apart by the kernels' names alone.

On a CPU a product of packed weights (mkldnn::) ends, in the same pass, in the GELU or the sum that follows it; that
time is the product's. A GELU counts as an activation where a layer with few rows, or a GPU, calls it by itself.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from support.device_trace import FROM_HOST, ON_DEVICE

PREFIX = "ipr_fast::"  # of the ranges of ipr_fast.trace in torch's profiler
OUTSIDE, CALL = "(outside of all)", "refine_batch"

PRODUCTS, ATTENTION = "matrix products and convolutions", "attention"
NORMS, NUMBERS, MOVING = "norms and activations", "random numbers", "moving and combining"
VIEWS, OWN, BETWEEN, OTHER = "views and allocation", "update kernels", "Python between operators", "not classified"

# Operators by name, without "aten::", "mkldnn::" and the underscore of in-place variants.
_NAMES = {
    PRODUCTS: """linear matmul mm bmm addmm addmv baddbmm mv dot einsum conv1d conv2d convolution _convolution
        mkldnn_convolution cudnn_convolution thnn_conv2d _slow_conv2d_forward _nnpack_available mkldnn_linear
        conv_transpose2d _linear_pointwise _convolution_pointwise""",
    ATTENTION: """scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_attention_math _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
        _scaled_dot_product_cudnn_attention _flash_attention_forward _efficient_attention_forward
        _cudnn_attention_forward softmax _softmax""",
    NORMS: """layer_norm native_layer_norm group_norm native_group_norm rsqrt gelu silu sigmoid relu tanh
        var_mean std var""",
    # Philox and Box-Muller. Level embeddings also take cosines and sines, unless they are cached.
    NUMBERS: """bitwise_xor bitwise_and bitwise_or __rshift__ __lshift__ __and__ __or__ __xor__ __iand__ __ior__
        __ixor__ __irshift__ __ilshift__ log cos sin sqrt""",
    MOVING: """abs add addcmul addcdiv all amax amin any argsort bitwise_not cat ceil clamp clamp_max clamp_min clone
        copy cumsum div embedding eq exp floor floor_divide fill gather ge gt index index_add index_copy index_put
        _index_put_impl index_select isfinite isin le lerp logical_and logical_not logical_or lt masked_fill
        masked_scatter maximum max mean minimum min mul nan_to_num ne neg nonzero pow reciprocal remainder
        repeat_interleave rsub scatter scatter_add searchsorted sort stack sub sum take_along_dim _to_copy to
        _unique2 upsample_bilinear2d upsample_nearest2d where zero item _local_scalar_dense is_nonzero square
        contiguous repeat roll round sign topk tril triu _reorder_linear_weight _reorder_convolution_weight""",
    VIEWS: """alias arange as_strided _as_strided broadcast_tensors chunk detach empty empty_like empty_strided expand
        expand_as flatten full full_like lift_fresh movedim narrow new_empty new_empty_strided new_full new_ones
        new_zeros ones ones_like permute _reshape_alias reshape resize resolve_conj resolve_neg result_type
        scalar_tensor select slice split split_with_sizes squeeze t tensor_split transpose unbind unflatten unfold
        _unsafe_view unsqueeze view view_as zeros zeros_like""",
}
KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}

_NAMESPACE = re.compile("^(aten|mkldnn)::")

# Kernels by the first pattern that matches their names; library names of CUDA 11 to 13.
KERNELS = [
    (MOVING, r"^map_sum_kernel"),
    (OWN, r"^(renoise|accept|mask_tokens|reveal|categorical|threshold|advance|denoise)_kernel"),
    (MOVING, r"^(slot_inputs|context_mask)_kernel"),
    (ATTENTION, r"^partial_attention(_rows)?_kernel|fmha|flash_fwd|flash_attn|cudnn_generated_fort_native_sdpa"),
    (NORMS, r"^(layer_norm|residual_norm|group_norm|group_norm_turns)_kernel"),
    (NORMS, r"^pixel_(features|head)_kernel"),
    (NORMS, r"layer_norm|LayerNorm|GroupNorm|RowwiseMoments|Gelu|GELU|silu|sigmoid"),
    (
        PRODUCTS,
        r"^linear_kernel|gemm|gemv|cutlass|xmma|nvjet|cublas|splitKreduce|convolve|^cudnn|_cudnn_|conv_depthwise",
    ),
    (MOVING, r"elementwise_kernel|^Mem(cpy|set)|[Cc]opy|index|gather|scatter|CatArray|reduce_kernel|sort|scan"),
]


@dataclass(frozen=True)
class Split:
    """Microseconds of each (range, operator or kernel), the number of ticks, and entries of each range."""

    times: Counter[tuple[str, str]]
    entered: Counter[str]

    @property
    def total(self) -> float:
        return sum(self.times.values())

    @property
    def ticks(self) -> int:
        return max(1, self.entered["tick"])

    def by_range(self) -> list[tuple[str, float]]:
        """Own time of each range, the longest first."""
        return self._summed(lambda where, name: where)

    def by_kind(self) -> list[tuple[str, float]]:
        return self._summed(lambda where, name: kind_of(name))

    def longest(self, number: int) -> list[tuple[str, float]]:
        """The (range, operator) pairs with the most time."""
        most = self.times.most_common(number)
        return [(f"{where}: {_NAMESPACE.sub('', name) or BETWEEN}", time) for (where, name), time in most]

    def of(self, *kinds: str) -> float:
        return sum(time for (_, name), time in self.times.items() if kind_of(name) in kinds)

    def unclassified(self, share: float = 0.02) -> list[tuple[str, float]]:
        """Operators of no known kind that take more than a share of the time."""
        names = self._summed(lambda where, name: name if kind_of(name) == OTHER else "")
        return [(name, time) for name, time in names if name and time > share * self.total]

    def _summed(self, key) -> list[tuple[str, float]]:
        sums: Counter[str] = Counter()
        for (where, name), time in self.times.items():
            sums[key(where, name)] += time
        return sums.most_common()


def kind_of(name: str) -> str:
    """Return the kind of an operator (aten::addmm), a kernel, or a range's own time ("")."""
    if name in ("", "PythonDispatchMode"):
        return BETWEEN
    operator = _NAMESPACE.sub("", name)
    for known in (operator, operator.removesuffix("_")):
        if known in KINDS:
            return KINDS[known]
    if operator != name:
        return OTHER
    return next((kind for kind, pattern in KERNELS if re.search(pattern, name)), OTHER)


def split(events: list[dict], within: str, on_device: bool = False) -> Split:
    """Split the time inside the host's range `within`, which is in the trace once, or that of the device."""
    whole = next((event for event in events if _is_range(event) and event["name"] == within), None)
    if whole is None:
        raise ValueError(f"the trace holds no range {within!r}")
    host, entered, launched = _walk(events, whole)
    if not on_device:
        return Split(host, entered)
    device: Counter[tuple[str, str]] = Counter()
    for event in events:
        found = launched.get(event["args"].get("correlation")) if event.get("cat") in ON_DEVICE else None
        if found is not None:
            where, operator = found
            device[where, operator if kind_of(operator) not in (BETWEEN, OTHER) else event["name"]] += event["dur"]
    if not device:
        raise ValueError(f"the trace holds no work of the device in {within!r}")
    return Split(device, entered)


def _walk(events: list[dict], whole: dict) -> tuple[Counter, Counter, dict[int, tuple[str, str]]]:
    """Return the host's own time by (range, operator), entries of ranges, and the origin of each launch."""
    times, entered, launched = Counter(), Counter(), {}
    open_now: list[tuple[float, str, str]] = []  # end, range, operator
    for event in _on_thread(events, whole):
        while open_now and open_now[-1][0] <= event["ts"]:
            open_now.pop()
        where, operator = open_now[-1][1:] if open_now else (OUTSIDE, "")
        if event["cat"] in FROM_HOST:
            if "correlation" in event["args"]:
                launched[event["args"]["correlation"]] = where, operator
            continue
        end = event["ts"] + event["dur"]
        if open_now:
            end = min(end, open_now[-1][0])  # a few events outlast the one that they began in
            times[where, operator] -= end - event["ts"]
        if not _is_range(event):
            operator = event["name"]
        elif event["name"].startswith(PREFIX):
            name, operator = event["name"].removeprefix(PREFIX), ""
            if where != CALL or name in ("iteration", "callback"):  # else a trial step that counts bytes
                where = name
                entered[name] += 1
        times[where, operator] += end - event["ts"]
        open_now.append((end, where, operator))
    return times, entered, launched


def _on_thread(events: list[dict], whole: dict) -> list[dict]:
    """Return the events of a range's thread in it, and all launches, by time, outer before inner."""
    start, end = whole["ts"], whole["ts"] + whole["dur"]
    found = (e for e in events if e.get("ph") == "X" and start <= e["ts"] < end)
    found = (e for e in found if e.get("cat") in FROM_HOST or _thread(e) == _thread(whole))
    found = (e for e in found if e.get("cat") in ("cpu_op", "user_annotation", *FROM_HOST))
    return sorted(found, key=lambda e: (e["ts"], -e["dur"]))


def _thread(event: dict) -> tuple:
    return event["pid"], event["tid"]


def _is_range(event: dict) -> bool:
    return event.get("cat") == "user_annotation"
