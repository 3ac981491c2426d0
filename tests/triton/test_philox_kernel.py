import math

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from ipr_fast.kernels import philox  # noqa: E402
from ipr_fast.kernels.launch import jit  # noqa: E402


@jit
def words_kernel(p_out, p_c0, p_c1, p_c2, p_c3, p_seed, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    c0, c1, c2, c3 = tl.load(p_c0 + o), tl.load(p_c1 + o), tl.load(p_c2 + o), tl.load(p_c3 + o)
    w0, w1, w2, w3 = philox.words_4(c0, c1, c2, c3, tl.load(p_seed))
    tl.store(p_out + o, w0.to(tl.int64))
    tl.store(p_out + SIZE + o, w1.to(tl.int64))
    tl.store(p_out + 2 * SIZE + o, w2.to(tl.int64))
    tl.store(p_out + 3 * SIZE + o, w3.to(tl.int64))


@jit
def normals_kernel(p_out, p_u1, p_u2, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    n0, n1 = philox.box_muller(tl.load(p_u1 + o), tl.load(p_u2 + o))
    tl.store(p_out + o, n0)
    tl.store(p_out + SIZE + o, n1)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63 + 12345, 2**64 - 1])
def test_words_are_those_of_the_twin(seed, device, generator):
    counters = torch.randint(0, 2**32, (4, 256), generator=generator)
    counters[:, 0], counters[:, 1] = 0, 2**32 - 1
    out = torch.full((4, 256), -1, dtype=torch.int64, device=device)
    words_kernel[(1,)](out, *counters.to(device), philox.seed_tensor(seed, device), SIZE=256)
    expected = torch.stack(philox.philox_4x32(*counters, seed))
    assert torch.equal(out.cpu(), expected)


def test_box_muller_is_exact_to_rounding(device, generator):
    """Against float64, at the ends of the range as well: uniforms are multiples of 2**-31 in [0, 1)."""
    u = torch.rand(2, 1024, generator=generator)
    ends = torch.tensor([0.0, 2**-31, 1e-7, 0.25, 0.5, 0.75, 1 - 2**-24, 1 - 2**-23, 0.125, 0.375, 0.625, 0.875])
    u[:, : len(ends)], u[1, : len(ends)] = ends, ends.flip(0)
    out = torch.full((2, 1024), float("nan"), device=device)
    normals_kernel[(1,)](out, *u.to(device), SIZE=1024)
    radius = (-2 * u[0].double().clamp(min=1e-7).log()).sqrt()
    angle = 2 * math.pi * u[1].double()
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()])
    # The radius, at most 5.7, to two ulps; sine and cosine to two more.
    torch.testing.assert_close(out.cpu().double(), expected, atol=5.7 * 4 * 2**-24, rtol=0)
