"""What the compiler makes of the kernels, for targets that need not be here."""

import importlib.metadata
import importlib.util
import os
import sys

import pytest
import torch


def _triton_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return (0,)


pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(_triton_version() < (3, 2), reason="the package needs Triton 3.2"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Triton's compilers"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


@pytest.fixture(scope="module")
def launches():
    import kernel_launches

    return list(kernel_launches.launches())


def test_every_kernel_is_compiled(launches):
    from support.launches import FILES

    kernels = {name for file in FILES for name in vars(file) if name.endswith("_kernel")} - {"runs_kernel"}
    assert {launch.kernel.__name__ for launch in launches} == kernels


# Bytes. In float32, with three products of TF32: tiles without stack took 1.1 to 1.2 times as long on an H100.
STACK = {"partial_attention_kernel": 16, "linear_kernel": 8}
NOT_OF_AMD = "linear_kernel"  # which is not launched there
OF_3_3 = pytest.mark.skipif(_triton_version() < (3, 3), reason="Triton 3.2 has no assembler for it")


def largest(launches):
    """The last launch, whose sizes are the largest ones, of each kernel, types of its tensors and kind of case."""
    kinds = {}
    for launch in launches:
        types = tuple(each.dtype for each in launch.arguments if isinstance(each, torch.Tensor))
        kinds[launch.kernel, types[:2], *launch.case.split(", ")[2:]] = launch
    return list(kinds.values())


def fits(launch, target, shared):
    """No stack, where spilled registers would be, and at most `shared` KiB of a block's memory."""
    import kernel_resources

    used = kernel_resources.compile_for(launch, target)
    assert not used.spills, launch  # counted by AMD's compiler alone
    assert used.stack <= STACK.get(launch.kernel.__name__, 0), launch
    assert used.shared <= shared * 1024, launch


@pytest.mark.parametrize(
    ("target", "shared"),
    [
        ("sm_80", 163),
        ("sm_90", 227),
        pytest.param("sm_100", 227, marks=OF_3_3),
        pytest.param("gfx942", 64, marks=OF_3_3),
    ],
)
def test_the_largest_launch_of_each_kind_fits(launches, target, shared):
    """`python profiling/kernel_resources.py` compiles all launches for all targets, two minutes for each."""
    for launch in largest(launches):
        if not (target.startswith("gfx") and launch.kernel.__name__ == NOT_OF_AMD):
            fits(launch, target, shared)


def test_every_launch_fits_an_h100(launches):
    for launch in launches:
        fits(launch, "sm_90", 227)


@pytest.mark.parametrize("kernel", ["accept_kernel", "advance_kernel", "reveal_kernel"])
def test_all_threads_read_a_chains_numbers_before_one_of_them_writes_there(kernel, launches):
    """Of several warps each reads for itself: one that came late would decide by what the first has written."""
    import kernel_resources

    found = [launch for launch in launches if launch.kernel.__name__ == kernel and launch.options["num_warps"] > 1]
    for launch in (found[0], found[-1]):
        code = kernel_resources.compiled(launch, "sm_90").asm["ptx"]
        stores = [code.index(line) for line in code.splitlines() if "st.global" in line and ".b64" in line]
        assert code.index("bar.sync") < stores[0], launch


@pytest.mark.parametrize("patches", [256, 1024, 2048, 4096])
def test_renoise_compiles_within_seconds_for_any_number_of_patches(patches, monkeypatch, tmp_path):
    """Without stack, too: a choice by comparing all pairs took 113 s and 24 KB of stack for 2048 (Triton 3.2)."""
    import kernel_launches
    import kernel_resources

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in kernel_launches.renoise_launches("", patches, patches, 4):
        before = sum(os.times()[:4])  # of the processor, here and in the compilers that Triton starts
        used = kernel_resources.compile_for(launch, "sm_90")
        assert sum(os.times()[:4]) - before < 3
        assert used.stack == 0


def test_attention_of_one_tile_takes_one_warp(launches):
    """Four warps for 16 x 16 numbers leave two a thread, and each product waits at a barrier."""
    warps = {launch.case: launch.options["num_warps"] for launch in launches if "attention" in launch.kernel.__name__}
    assert warps["4x4, float16"] == warps["4x4, float32, all"] == 1
    assert warps["9x9, float32"] == warps["wide, float16"] == 4
