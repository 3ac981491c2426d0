"""Registers, stack, spills (AMD) and shared memory of every Triton kernel, compiled without a GPU.

    python profiling/kernel_resources.py                     all kernels, all targets, as a table
    python profiling/kernel_resources.py --targets sm_90     one of them

Each kernel is compiled as its launcher launches it (kernel_launches.py). Registers a thread, bytes of stack and of
spilled registers a thread, bytes of shared memory a block. NVIDIA's compiler puts spilled registers on the stack, and
does not count them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_launches import Launch, launches
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel: stack and spills in bytes per thread, shared memory in bytes per block."""

    registers: int
    stack: int
    shared: int
    spills: int | None = None  # of AMD alone


def compile_for(launch: Launch, target: str) -> Resources:
    """Compile a launch, and return what it needs."""
    return _of_amd(compiled(launch, target)) if target.startswith("gfx") else _of_nvidia(compiled(launch, target))


def compiled(launch: Launch, target: str) -> Any:
    """Compile a launch as Triton would, with its divisibility by 16 of pointers and integers."""
    signature, constants, attributes = {}, {}, {}
    names = [parameter.name for parameter in launch.kernel.params]
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {}
    for name, value in launch.options.items():
        if value == "tf32x3" and target.startswith("gfx"):
            value = "ieee"  # as the launcher does on AMD's devices
        if name in names:
            signature[name], constants[name] = "constexpr", value
        else:
            options[name] = value
    source = ast_source(launch.kernel, signature, constants, attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return triton.compile(source, target=TARGETS[target], options=options)


def ast_source(kernel: Any, signature: dict[str, str], constants: dict[str, Any], attributes: dict) -> ASTSource:
    """Return the source of a kernel to compile, by the interface of Triton 3.3 or that of 3.2."""
    try:
        from triton.backends.compiler import AttrsDescriptor
    except ImportError:
        return ASTSource(kernel, signature, constants, attributes)
    signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    divisible = AttrsDescriptor.from_hints({index: 16 for (index,) in attributes})
    return ASTSource(kernel, signature, constants, divisible)


def _of_nvidia(compiled: Any) -> Resources:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", dump.stdout)}
    return Resources(used["REG"], used["STACK"], compiled.metadata.shared)


def _of_amd(compiled: Any) -> Resources:
    def used(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])[1])

    spills = 4 * used("vgpr_spill_count")
    return Resources(used("vgpr_count"), used("private_segment_fixed_size"), compiled.metadata.shared, spills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    arguments = parser.parse_args()
    columns = f"{'warps':>5} {'registers':>9} {'stack':>6} {'spills':>6} {'shared':>7}"
    print(f"{'target':7} {'kernel':26} {'case':30} {columns}")
    for target in arguments.targets:
        for launch in launches():
            used = compile_for(launch, target)
            name, warps = launch.kernel.__name__, launch.options["num_warps"]
            spills = "" if used.spills is None else used.spills
            print(
                f"{target:7} {name:26} {launch.case:30} {warps:5} {used.registers:9} {used.stack:6} {spills:6} "
                f"{used.shared:7}",
                flush=True,
            )


if __name__ == "__main__":
    main()
