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


def gumbels(seed: int, step: np.ndarray, iteration: int, chain_ids: Tensor, slots: int, number: int) -> np.ndarray:
    """Gumbel numbers (B, slots, number) of 64 bits, for positions 0..slots-1 of chains in steps (B,)."""
    quads = np.arange(-(-number // 2)) + (5 << 28)
    places = np.arange(slots)[:, None] + (step[:, None, None] << 16)
    words = philox((quads, places, iteration, chain_ids.cpu().numpy()[:, None, None]), seed)
    bits = np.stack([words[0] * 2.0**32 + words[1], words[2] * 2.0**32 + words[3]], axis=-1)
    u = np.minimum((bits.reshape(*bits.shape[:-2], -1)[..., :number] + 0.5) * 2.0**-64, 1 - 2.0**-24)
    return -np.log(-np.log1p(-u))


def categorical(
    logits: Tensor, temperature: float, seed: int, step: Tensor, iteration: int, chain_ids: Tensor
) -> tuple[Tensor, ...]:
    """Token, log-probability, confidence, odds, gap, entropy of positions 0..A-1, from logits (B, A, V)."""
    _, slots, vocabulary = logits.shape
    classes = min(256, max(16, 1 << (vocabulary - 1).bit_length()))
    members = -(-vocabulary // classes)
    noise = gumbels(seed, step.cpu().numpy(), iteration, chain_ids, slots, classes + members)
    noise = torch.from_numpy(noise).to(logits.device)
    law = F.pad(logits.double() / temperature, (0, members * classes - vocabulary), value=-torch.inf).log_softmax(-1)
    by_class = law.unflatten(-1, (members, classes))
    drawn = (by_class.logsumexp(-2) + noise[..., :classes]).argmax(-1)
    own = by_class.gather(-1, drawn[..., None, None].expand(-1, -1, members, 1))[..., 0]
    token = drawn + classes * ((own + noise[..., classes:]).argmax(-1) if members > 1 else 0)
    below = logits.double() - logits.double().amax(-1, keepdim=True)
    p = below.softmax(-1)
    confidence, others = p.gather(-1, token[..., None])[..., 0], p.scatter(-1, token[..., None], 0.0).sum(-1)
    ordered, weights = (x.sort(-1, descending=True).values[..., 1:] for x in (p, below.exp()))  # of all but the first
    gap = ordered.sum(-1) + ordered[..., :1].sum(-1)
    entropy = weights.sum(-1).log1p() - (p * below).sum(-1)
    return token, law.gather(-1, token[..., None])[..., 0], confidence, others / confidence, gap, entropy


def accept(proposed: Tensor, old: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
    """Samples, twice, rewards and decisions of chains that gain either 1 or -1,000 at temperature 1."""
    accepted = gain > 0
    values = torch.where(accepted[:, None], proposed, old)
    return values, values, gain.clamp(min=0), accepted


def threshold(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The lowest logit (B, A) of the smallest set of ids that has `top_p` of the mass."""
    ordered = logits.double().sort(-1, descending=True).values
    law = (ordered / temperature).softmax(-1)
    kept = (law.cumsum(-1) - law < top_p).sum(-1, keepdim=True)
    return ordered.gather(-1, kept - 1)[..., 0]


def mask_tokens(tokens: Tensor, index: Tensor, mask_id: int) -> tuple[Tensor, ...]:
    """tokens, mask, index and count, after the positions of `index` (B, A) have been masked."""
    new, mask = tokens.clone(), torch.zeros_like(tokens)
    for chain, own in enumerate(index.tolist()):
        new[chain, own], mask[chain, own] = mask_id, 1
    return new, mask, index, torch.full((len(index),), index.shape[1], device=index.device)


def reveal(tokens: Tensor, drawn: Tensor, score: Tensor, mask_id: int, number: int) -> Tensor:
    """tokens (B, N), after the `number` masked positions of lowest score took what was drawn."""
    new = tokens.clone()
    for chain, (own, scores) in enumerate(zip(tokens.tolist(), score.tolist(), strict=True)):
        masked = sorted((scores[i], i) for i, token in enumerate(own) if token == mask_id)
        for _, i in masked[:number]:
            new[chain, i] = drawn[chain, i]
    return new


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


def map_sum(h: Tensor, bias: Tensor, g: Tensor) -> Tensor:
    return h.double() + bias.double()[:, None, None] + g.double()


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    out = F.linear(x.double(), weight.double(), bias.double())
    return F.gelu(out, approximate="tanh") if gelu else out


def attention(q: Tensor, keys: Tensor, values: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    q, keys, values = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, keys, values))
    mask = None if bias is None else bias.double()
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)
