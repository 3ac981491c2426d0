"""What the tests of both norms share."""

import torch


def types(device):
    """The interpreter reads bfloat16 as something else."""
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device.type == "cuda" else [])


def assert_near(found, expected, dtype, terms):
    """Values of order ten through some thirty float32 roundings and a sum of `terms`, then one rounding to dtype."""
    exact = 10 * (30 + terms**0.5) * 2**-24
    last = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.float(), atol=exact + 1e-3 * last, rtol=last)
