"""Grids of the kernels at the largest sizes: CUDA takes 2**31 - 1 programs in x, and 65,535 in y and in z."""

from unittest.mock import patch

import pytest
import torch

from ipr_fast.kernels import (
    categorical,
    context_mask,
    denoise,
    group_norm,
    linear,
    modulated_norm,
    partial_attention,
    pixel_features,
    pixel_head,
    renoise,
    residual_norm,
    slot_inputs,
    threshold,
)
from ipr_fast.kernels.launch import triton
from ipr_fast.kernels.philox import MAX_PATCH_NUMEL, MAX_PATCHES

pytestmark = pytest.mark.skipif(triton is None, reason="needs Triton")


class Grids:
    """Stands in for the kernels of a file and keeps the grids of their launches."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        self.seen.append(grid)
        return lambda *arguments, **options: None


def grids_of(file, call):
    grids = Grids()
    names = [name for name in vars(file) if name.endswith("_kernel") and name != "runs_kernel"]
    with patch.multiple(file, **dict.fromkeys(names, grids)):
        call()
    assert grids.seen
    return grids.seen


def meta(*shape, dtype=torch.float16):
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def norm_map(batch, channels, height, width):
    h, weight = meta(batch, channels, height, width), meta(channels)
    group_norm.group_norm(h, weight, weight, groups=32, eps=1e-5)


def denoise_slots(batch, slots, numel):
    level, counter = meta(batch, slots, dtype=torch.float32), meta(dtype=torch.int64)
    ids = meta(batch, dtype=torch.int64)
    denoise.denoise(
        meta(batch, slots, numel, dtype=torch.float32),
        index=meta(batch, slots, dtype=torch.int32),
        level=level,
        next_level=level,
        velocity=meta(batch, slots, numel),
        variance_mix=None,
        stochasticity=0.5,
        temperature=1.0,
        seed=counter,
        step=ids,
        iteration=counter,
        chain_ids=ids,
    )


def renoise_patches(batch, patches):
    index, count = meta(batch, patches, dtype=torch.int32), meta(batch, dtype=torch.int32)
    counter, ids = meta(dtype=torch.int64), meta(batch, dtype=torch.int64)
    into = renoise.Slots(index, count, meta(batch, patches, dtype=torch.float32), index, ids)
    z, mask = meta(batch, patches, 1, dtype=torch.float32), meta(batch, patches, dtype=torch.bool)
    renoise.renoise(z, mask, into, seed=counter, stream=1, iteration=counter, chain_ids=ids)


def attend(batch, slots, heads):
    width = heads * 16
    qkv, cache = meta(batch, slots, 3 * width), meta(batch * slots + 1, 2 * width)
    slot, place = meta(batch, slots + 1, dtype=torch.int32), meta(batch, slots, dtype=torch.int64)
    partial_attention.partial_attention(qkv[..., :width], qkv[..., width:], cache, slot, place, heads=heads)


def multiply(rows, columns):
    linear.linear(meta(rows, 8, dtype=torch.float32), meta(2, columns, 8, dtype=torch.float32))


def mask_context(batch, slots):
    index, count = meta(batch, slots, dtype=torch.int32), meta(batch, dtype=torch.int32)
    context_mask.context_mask(index, count, meta(batch, slots + 1, dtype=torch.int32), torch.float32)


def layer_norm(batch, tokens):
    h = meta(batch, tokens, 8)
    modulated_norm.modulated_layer_norm(h, h, h, eps=1e-6)


def gated_norm(batch, tokens):
    h = meta(batch, tokens, 8)
    residual_norm.gated_norm(h, h, h, h, h, eps=1e-6)


def gather_slots(batch, slots, numel):
    z, level = meta(batch, slots, numel, dtype=torch.float32), meta(batch, slots, dtype=torch.float32)
    slot_inputs.slot_inputs(z, meta(batch, slots, dtype=torch.int32), level, level[0], torch.float16)


def encode_pixels(batch, tokens, channels, size):
    z, weight = meta(batch, tokens, channels * size**2), meta(32, channels)
    pixel_features.pixel_features(z, weight, weight[:, 0])


def read_pixels(batch, tokens, channels, size):
    weights = meta(batch, tokens, sum(pixel_head.sizes(channels, 16)))
    z, level = meta(batch, tokens, channels * size**2), meta(batch, tokens)
    pixel_head.pixel_head(weights, z, level, channels=channels, hidden=16, floor=0.05)


def draw(batch, slots, vocabulary):
    ids, counter = meta(batch, dtype=torch.int64), meta(dtype=torch.int64)
    categorical.categorical(
        meta(batch, slots, vocabulary),
        index=meta(batch, slots, dtype=torch.int32),
        step=ids,
        iteration=counter,
        chain_ids=ids,
        seed=counter,
        out=categorical.Drawn.empty(batch, slots, "meta"),
    )


def find_threshold(batch, slots, vocabulary):
    index, out = meta(batch, slots, dtype=torch.int32), meta(batch, slots, dtype=torch.float32)
    threshold.threshold(meta(batch, slots, vocabulary), index=index, out=out, top_p=0.9)


@pytest.mark.parametrize(
    ("file", "call", "sizes"),
    [
        (group_norm, norm_map, (1, 128, 2048, 2048)),
        (group_norm, norm_map, (2, 32, 16384, 16384)),
        (group_norm, norm_map, (100_000, 512, 1, 1)),
        (denoise, denoise_slots, (1, 2, MAX_PATCH_NUMEL)),
        (denoise, denoise_slots, (100_000, 16, 1)),
        (renoise, renoise_patches, (100_000, renoise.MAX_PROGRAM_PATCHES)),
        (partial_attention, attend, (100_000, 4, 6)),
        (partial_attention, attend, (1, MAX_PATCHES, 6)),
        (context_mask, mask_context, (100_000, 16)),
        (linear, multiply, (30_000_000, 96)),
        (modulated_norm, layer_norm, (100_000, 81)),
        (residual_norm, gated_norm, (100_000, 81)),
        (slot_inputs, gather_slots, (1, 2, MAX_PATCH_NUMEL)),
        (slot_inputs, gather_slots, (100_000, 16, 1)),
        (pixel_features, encode_pixels, (100_000, 81, 3, 4)),
        (pixel_head, read_pixels, (100_000, 81, 3, 4)),
        (pixel_head, read_pixels, (1, 2, 1, 512)),
        (categorical, draw, (100_000, 81, 10)),
        (categorical, draw, (100_000, 256, 2**18)),
        (threshold, find_threshold, (100_000, 256, 2**18)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_grid_is_within_what_a_device_takes(file, call, sizes):
    for x, *others in grids_of(file, lambda: call(*sizes)):
        assert 0 < x < 2**31
        assert all(0 < size <= 65_535 for size in others)
