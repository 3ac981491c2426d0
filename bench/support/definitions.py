"""The operations of kernels/ by their formulas, in float64: the torch twins are checked against these.

Independent of kernels/: Philox uses numpy's unsigned integers, a choice is Python's sort, the posterior step is that of
ipr_fast/sampling/flow.py, norms and attention are torch's own. Inputs are not modified. Shapes: see kernels/.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast import Schedule
from ipr_fast.sampling import flow

WORD = np.uint64(0xFFFFFFFF)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def philox(counter: tuple, seed: int) -> list[np.ndarray]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011) on four counter words, uint64 arrays that broadcast."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.atleast_1d(np.asarray(word, np.uint64)) for word in counter))
    shift = np.uint64(32)
    for i in range(10):
        k0, k1 = (
            np.uint64((word + i * step) & 0xFFFFFFFF) for word, step in zip((seed, seed >> 32), KEY_STEPS, strict=True)
        )
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1 = (product1 >> shift) ^ c1 ^ k0, product1 & WORD
        c2, c3 = (product0 >> shift) ^ c3 ^ k1, product0 & WORD
    return [c0, c1, c2, c3]


def normals(
    seed: int, stream: int, step: int, iteration: int, chain_ids: Tensor, patches: Tensor, numel: int
) -> Tensor:
    """Standard normals (B, A, numel) for patches (B, A) of chains (B,), of uniforms that float32 has rounded."""
    quads = np.arange(-(-numel // 4)) + (stream << 28)
    places = patches.cpu().numpy()[:, :, None] + (step << 16)
    words = philox((quads, places, iteration, chain_ids.cpu().numpy()[:, None, None]), seed)
    folded = (np.where(word >> np.uint64(31), WORD - word, word) for word in words)
    u = [(word.astype(np.float32) * np.float32(4.6566127342e-10)).astype(np.float64) for word in folded]
    numbers = []
    for u1, u2 in ((u[0], u[1]), (u[2], u[3])):
        radius = np.sqrt(-2 * np.log(np.maximum(u1, 1e-7)))
        numbers += [radius * np.cos(2 * np.pi * u2), radius * np.sin(2 * np.pi * u2)]
    whole = np.stack(numbers, axis=-1).reshape(*patches.shape, -1)
    return torch.from_numpy(whole[..., :numel].copy()).to(patches.device)


def choose(free: Tensor, size: int, seed: int, iteration: int, chain_ids: Tensor) -> Tensor:
    """The `size` free patches of each chain with the smallest keys (B, size), in ascending order."""
    patches = np.arange(free.shape[1])
    keys, *_ = philox((3 << 28, patches, iteration, chain_ids.cpu().numpy()[:, None]), seed)
    chosen = []
    for own, allowed in zip(keys.tolist(), free.tolist(), strict=True):
        candidates = sorted((key, patch) for patch, key in enumerate(own) if allowed[patch])
        chosen.append(sorted(patch for _, patch in candidates[:size]))
    return torch.tensor(chosen, device=free.device)


def renoise(patches: Tensor, index: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """patches, mask, index, count, level and start, after the patches of `index` (B, A) have become their noise."""
    batch, slots = index.shape
    new, mask = patches.double(), torch.zeros(patches.shape[:2], device=patches.device)
    for chain, own in enumerate(index.tolist()):
        new[chain, own], mask[chain, own] = noise[chain], 1.0
    level = torch.ones_like(index)
    return new, mask, index, torch.full((batch,), slots, device=index.device), level, -level


def slot_inputs(patches: Tensor, index: Tensor, level: Tensor, levels: Tensor) -> tuple[Tensor, ...]:
    """The values of each slot, of patch 0 for padding, the rows of its level, and its place among all patches."""
    batch, num_patches, _ = patches.shape
    values, place = patches.new_empty(*index.shape, patches.shape[2]), index.long()
    for chain, own in enumerate(index.tolist()):
        values[chain] = patches[chain, [max(patch, 0) for patch in own]]
        place[chain] = torch.tensor(
            [batch * num_patches if patch < 0 else chain * num_patches + patch for patch in own]
        )
    return values, (levels[None, None] < level[..., None]).sum(-1), place


def advance(start: Tensor, step: int, log_variance: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """start and next level of chains whose slots are all taken."""
    slots = start.shape[1]
    block, num_steps, starts = schedule.block(slots), schedule.steps(slots), schedule.starts(slots)
    due, new, levels = sum(first <= step for first in starts), start.tolist(), []
    for own, uncertainty in zip(new, log_variance.tolist(), strict=True):
        waiting = sorted((slot for slot in range(slots) if own[slot] < 0), key=uncertainty.__getitem__)
        for slot in waiting[: due - (slots - len(waiting))]:
            own[slot] = step
        left = [1.0 if first < 0 else (block - (step + 1 - first)) / block for first in own]
        levels.append([min(max(level, 0.0), 1.0) if step + 1 < num_steps else 0.0 for level in left])
    return torch.tensor(new, device=start.device), torch.tensor(levels, dtype=torch.float64, device=start.device)


def denoise(
    patches: Tensor, index: Tensor, levels: tuple[Tensor, Tensor], u: Tensor, v: Tensor, xi: Tensor, eta: float
) -> Tensor:
    """Patches (B, N, P) after the posterior step of slots `index` (B, A), with temperature 1."""
    new, (t, s) = patches.double(), (level.double()[..., None] for level in levels)
    chains = torch.arange(len(index), device=index.device)[:, None]
    z = new[chains, index.long()]
    new[chains, index.long()] = flow.posterior_step(z, u.double(), v.double(), t, s, xi, eta=eta)
    return new


def layer_norm(h: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return F.layer_norm(h.double(), h.shape[-1:], eps=eps) * (1 + scale.double()) + shift.double()


def residual_norm(total: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm."""
    return total, layer_norm(total, scale, shift, eps)


def pixel_features(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    pixels = z.double().unflatten(-1, (weight.shape[1], -1))
    return (weight.double() @ pixels + bias.double()[:, None]).tanh().mean(-1)


def pixel_head(
    weights: Tensor, z: Tensor, level: Tensor, channels: int, hidden: int, floor: float
) -> tuple[Tensor, Tensor]:
    """Velocity and mix; weights has U, b, the shift, V and a in a row."""
    sizes = (hidden * channels, hidden, channels, 2 * channels * hidden, 2 * channels)
    u, b, shift, v, a = weights.double()[..., : sum(sizes)].split(sizes, dim=-1)
    pixels = z.double().unflatten(-1, (channels, -1))
    units = (u.unflatten(-1, (hidden, -1)) @ (pixels + shift[..., None]) + b[..., None]).tanh()
    clean, mix = (v.unflatten(-1, (-1, hidden)) @ units + a[..., None]).chunk(2, dim=-2)
    velocity = (pixels - clean) / level.double().clamp(min=floor)[..., None, None]
    return velocity.flatten(-2), mix.sigmoid().flatten(-2)


def group_norm(h: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, rows: Tensor, index: Tensor) -> Tensor:
    """GroupNorm and SiLU of h plus each cell's row."""
    cells = F.interpolate(rows.double()[index].permute(0, 3, 1, 2), h.shape[2:], mode="nearest")
    return F.silu(F.group_norm(h.double() + cells, groups, weight.double(), bias.double(), eps))


def attention(q: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    q, keys, values = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
