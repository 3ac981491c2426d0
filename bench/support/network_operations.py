"""The operations of the networks: norms, sums, networks of pixels, linear layers, attention; see operations.py."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ipr_fast.kernels import (
    group_norm,
    linear,
    map_sum,
    modulated_norm,
    partial_attention,
    pixel_features,
    pixel_head,
    residual_norm,
    scaled_attention,
)
from support import definitions
from support.operations import Inputs, Operation

GROUPS = 32
LEVELS = 16  # rows of the tables that modulate tokens


def layer_norm(shape: tuple[int, int], batch: int, device: torch.device, seed: int) -> Operation:
    """shape: tokens, width. Each token has a row of the tables, which are slices of a wider one, as in the network."""
    inputs, (tokens, width), eps = Inputs(device, seed), shape, 1e-6
    h, row = inputs.normals(batch, tokens, width), inputs.integers(LEVELS, batch, tokens)
    scale, shift, *_ = inputs.normals(LEVELS, 6 * width).chunk(6, dim=-1)
    return Operation(
        lambda: (modulated_norm.modulated_layer_norm(h, scale, shift, eps=eps, row=row),),
        lambda: (modulated_norm._modulated_layer_norm(h, scale, shift, eps, row),),
        lambda: (definitions.layer_norm(h, scale[row], shift[row], eps),),
        modulated_norm.bytes_moved(batch, tokens, width, h.element_size(), table=True),
        8 * h.numel(),
    )


def gated_norm(shape: tuple[int, int], batch: int, device: torch.device, seed: int) -> Operation:
    """shape: tokens, width. Each token's gate, scale and shift are a row of tables, as in `layer_norm`."""
    inputs, (tokens, width), eps = Inputs(device, seed), shape, 1e-6
    (h, x), row = inputs.normals(2, batch, tokens, width), inputs.integers(LEVELS, batch, tokens)
    scale, shift, gate, *_ = inputs.normals(LEVELS, 6 * width).chunk(6, dim=-1)
    return Operation(
        lambda: residual_norm.gated_norm(h, gate, x, scale, shift, eps=eps, row=row),
        lambda: residual_norm._gated_norm(h, gate, x, scale, shift, eps, row),
        lambda: definitions.residual_norm(h.double() + gate[row].double() * x.double(), scale[row], shift[row], eps),
        residual_norm.bytes_moved(batch, tokens, width, h.element_size(), table=True),
        10 * h.numel(),
    )


def embedded_norm(shape: tuple[int, int], batch: int, device: torch.device, seed: int) -> Operation:
    """shape: tokens, width. As `gated_norm`, with the sum of each token and a row of an embedding."""
    inputs, (tokens, width), eps = Inputs(device, seed), shape, 1e-6
    x, row = inputs.normals(batch, tokens, width), inputs.integers(LEVELS, batch, tokens)
    embedding, index = inputs.normals(4 * tokens, width), inputs.subset(batch, 4 * tokens, tokens).int()
    scale, shift, *_ = inputs.normals(LEVELS, 6 * width).chunk(6, dim=-1)
    return Operation(
        lambda: residual_norm.embedded_norm(embedding, index, x, scale, shift, eps=eps, row=row),
        lambda: residual_norm._embedded_norm(embedding, index, x, scale, shift, eps, row),
        lambda: definitions.residual_norm(embedding[index].double() + x.double(), scale[row], shift[row], eps),
        residual_norm.bytes_moved(batch, tokens, width, x.element_size(), table=True, embeds=True),
        9 * x.numel(),
    )


def encode_pixels(shape: tuple[int, int, int, int], batch: int, device: torch.device, seed: int) -> Operation:
    """shape: patches, channels, pixels, features."""
    inputs, (patches, channels, pixels, features) = Inputs(device, seed), shape
    z = inputs.normals(batch, patches, channels * pixels)
    weight, bias = inputs.normals(features, channels), inputs.normals(features)
    return Operation(
        lambda: (pixel_features.pixel_features(z, weight, bias),),
        lambda: (pixel_features._pixel_features(z, weight, bias),),
        lambda: (definitions.pixel_features(z, weight, bias),),
        pixel_features.bytes_moved(batch, patches, channels * pixels, features, 4, 4),
        2 * batch * patches * pixels * features * (channels + 1),
    )


def read_pixels(shape: tuple[int, int, int, int], batch: int, device: torch.device, seed: int) -> Operation:
    """shape: patches, channels, pixels, hidden units."""
    inputs, (patches, channels, pixels, hidden), floor = Inputs(device, seed), shape, 0.05
    weights = inputs.normals(batch, patches, sum(pixel_head.sizes(channels, hidden)) + 1)
    z, level = inputs.normals(batch, patches, channels * pixels), inputs.normals(batch, patches).abs()
    return Operation(
        lambda: pixel_head.pixel_head(weights, z, level, channels=channels, hidden=hidden, floor=floor),
        lambda: pixel_head._pixel_head(weights, z, level, channels, hidden, floor),
        lambda: definitions.pixel_head(weights, z, level, channels, hidden, floor),
        pixel_head.bytes_moved(batch, patches, channels * pixels, channels, hidden, 4, 4),
        2 * batch * patches * pixels * hidden * 3 * channels,
    )


def group_norm_silu(shape: tuple[int, int, int], batch: int, device: torch.device, seed: int) -> Operation:
    """shape: channels, pixels a side, cells a side. Adds a row for each cell before the norm; SiLU after it."""
    inputs, (channels, size, cells), eps = Inputs(device, seed), shape, 1e-5
    original = inputs.normals(batch, channels, size, size).to(memory_format=torch.channels_last)
    h, rows = original.clone(), inputs.normals(16, channels)
    weight, bias = inputs.normals(2, channels)
    index = inputs.integers(len(rows), batch, cells, cells)
    return Operation(
        lambda: (group_norm.group_norm(h, weight, bias, groups=GROUPS, eps=eps, rows=rows, index=index),),
        lambda: (group_norm._group_norm(h, weight, bias, GROUPS, eps, rows, index),),
        lambda: (definitions.group_norm(original, weight, bias, GROUPS, eps, rows, index),),
        group_norm.bytes_moved(batch, channels, size, size, h.element_size()),
        11 * h.numel(),
        lambda: h.copy_(original),  # the twin adds the rows in place
    )


def map_sum_of(shape: tuple[int, int], batch: int, device: torch.device, seed: int) -> Operation:
    """shape: channels, pixels a side."""
    inputs, (channels, size) = Inputs(device, seed), shape
    original, g = (x.to(memory_format=torch.channels_last) for x in inputs.normals(2, batch, channels, size, size))
    h, bias = original.clone(), inputs.normals(channels)
    return Operation(
        lambda: (map_sum.map_sum(h, bias, g),),
        lambda: (map_sum._map_sum(h, bias, g),),
        lambda: (definitions.map_sum(original, bias, g),),
        map_sum.bytes_moved(h.numel(), h.element_size(), two=True),
        2 * h.numel(),
        lambda: h.copy_(original),
    )


def linear_layer(shape: tuple[int, int, int], gelu: bool, batch: int, device: torch.device, seed: int) -> Operation:
    """shape: tokens, inputs, outputs. plain: torch's layer, and its GELU in place."""
    inputs, (tokens, width, outputs) = Inputs(device, seed), shape
    x, weight, bias = inputs.normals(batch, tokens, width), inputs.normals(outputs, width), inputs.normals(outputs)
    weight /= width**0.5
    parts = linear.split(weight)

    def plain() -> torch.Tensor:
        out = F.linear(x, weight, bias)
        return torch.ops.aten.gelu_.default(out, approximate="tanh") if gelu else out

    return Operation(
        lambda: (linear.linear(x, parts, bias, gelu=gelu),),
        lambda: (linear._linear(x, parts, bias, gelu),),
        lambda: (definitions.linear(x, weight, bias, gelu),),
        linear.bytes_moved(batch * tokens, outputs, width),
        2 * batch * tokens * width * outputs,
        plain=plain,
    )


def context_attention(
    shape: tuple[int, int, int], dtype: torch.dtype, batch: int, device: torch.device, seed: int
) -> Operation:
    """shape: N tokens, a quarter of them active, heads, head size. plain: torch's attention with a mask."""
    inputs, (tokens, heads, size) = Inputs(device, seed), shape
    qkv, index = inputs.normals(batch, tokens, 3 * heads * size, dtype=dtype), inputs.subset(batch, tokens, tokens // 4)
    q, keys_values = qkv[..., : heads * size], qkv[..., heads * size :]
    cache = torch.cat([keys_values.flatten(0, 1), keys_values[0, :1]])
    slot = torch.full((batch, tokens + 1), -1, dtype=torch.int32, device=device)
    slot.scatter_(1, index, torch.arange(tokens // 4, dtype=torch.int32, device=device).expand_as(index))
    bias = torch.zeros(batch, -(-tokens // 16) * 16, dtype=dtype, device=device).scatter_(1, index, -torch.inf)
    bias = bias[:, None, None, :tokens]
    by_head = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1)]
    return Operation(
        lambda: (partial_attention.context_attention(q, keys_values, cache, slot, bias, heads=heads),),
        lambda: (partial_attention._context_attention(q, keys_values, bias, heads),),
        lambda: (definitions.attention(q, *keys_values.chunk(2, dim=-1), heads, bias),),
        partial_attention.bytes_moved(batch, tokens, tokens - tokens // 4, heads * size, q.element_size()),
        4 * batch * tokens * tokens * heads * size,
        dtype=dtype,
        plain=lambda: scaled_attention.scaled_attention(*by_head, bias),
    )


def attention(
    shape: tuple[int, int, int, int], dtype: torch.dtype, batch: int, device: torch.device, seed: int
) -> Operation:
    """shape: A queries, N tokens, heads, head size. plain: all N queries, with a mask of roles."""
    inputs, (slots, tokens, heads, size) = Inputs(device, seed), shape
    width, index = heads * size, inputs.subset(batch, tokens, slots)
    every, keys, values = (inputs.normals(batch, tokens, width, dtype=dtype) for _ in range(3))
    rows = index[..., None].expand(-1, -1, width)
    q, own = every.gather(1, rows), torch.cat([keys.gather(1, rows), values.gather(1, rows)], dim=-1)
    cache = torch.cat([torch.cat([keys, values], dim=-1).flatten(0, 1), own[0, :1]])
    place = index + tokens * torch.arange(batch, device=device)[:, None]
    slot = torch.full((batch, tokens + 1), -1, dtype=torch.int32, device=device)
    slot.scatter_(1, index, torch.arange(slots, dtype=torch.int32, device=device).expand_as(index))
    is_active = torch.zeros(batch, tokens, dtype=torch.bool, device=device).scatter_(1, index, True)
    mask = (is_active[:, :, None] | ~is_active[:, None, :])[:, None]
    by_head = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (every, keys, values)]
    return Operation(
        lambda: (partial_attention.partial_attention(q, own, cache, slot, place, heads=heads),),
        lambda: (partial_attention._partial_attention(q, own, cache, slot, place, heads),),
        lambda: (definitions.attention(q, keys, values, heads),),
        partial_attention.bytes_moved(batch, slots, tokens, width, q.element_size()),
        4 * batch * slots * tokens * width,
        dtype=dtype,
        plain=lambda: F.scaled_dot_product_attention(*by_head, attn_mask=mask),
    )
