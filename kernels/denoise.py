"""The posterior step of the slots whose level falls, from t to t', in place.

With x0 = z - t u and eps = z + (1-t) u, the step z' = (1-t') x0 + gamma eps + tau sigma xi is linear in z and u:

    r     = ((1-t) t' / ((1-t') t))**2
    gamma = t' sqrt(1 - eta**2 (1-r))
    z'    = (1 - t' + gamma) z + (gamma (1-t) - (1-t') t) u + tau sigma xi
    sigma = eta sqrt(1-r) t' (t/t')**v                      (v = 0 without a variance head)

A flow that preserves variance, in units where a + b = 1, has b/b' = t/t' ((t'^2 + (1-t')^2) / (t^2 + (1-t)^2))^(1/2)
in place of t/t'.

so a slot has three coefficients, and an element takes two products, one power and one normal. At t' = 0: z' = x0, as
gamma, sigma and r are 0. A network may leave the mix a logit, whose sigmoid is taken here.

Shapes: patches (B, N, P) float32; level, next_level, index (B, A); velocity, variance_mix, slot_values (B, A, P); seed,
iteration () int64; step, chain_ids (B,) int64.
Bytes that must move, for each moving slot: z read and written, 8 P, the predictions read once, slot_values written.
Source: Kang, Yoon, Ahn 2026, in rectified flow's notation; the variance mix is of Nichol & Dhariwal 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast.kernels.launch import contiguous, jit, launch, power_of_2, rows_of, runs_kernel
from ipr_fast.kernels.philox import STREAM_POSTERIOR, normals_4, patch_normals
from ipr_fast.kernels.rows import patch_rows, read_rows, write_rows

try:
    import triton.language as tl
except ImportError:  # macOS and Windows
    tl = None


@jit
def denoise_kernel(
    p_patches,
    p_index,
    p_level,
    p_next_level,
    p_velocity,
    p_mix,
    p_values,
    p_noise,
    p_step,
    p_iteration,
    p_chain_ids,
    p_seed,
    eta,
    tau,
    SLOTS,
    A,
    N,
    P,
    VELOCITY_STRIDE,
    MIX_STRIDE,
    STREAM: tl.constexpr,
    HAS_MIX: tl.constexpr,
    IS_LOGIT: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    FRESH: tl.constexpr,
    GIVEN: tl.constexpr,
    PRESERVING: tl.constexpr,
    S_BLOCK: tl.constexpr,
    Q_BLOCK: tl.constexpr,
):
    """One program for S_BLOCK slots, of one or several chains, and 4 * Q_BLOCK elements of their patches."""
    blocks = tl.cdiv(tl.cdiv(P, 4), Q_BLOCK)
    i_block = tl.program_id(0) % blocks
    i_slot = (tl.program_id(0) // blocks).to(tl.int64) * S_BLOCK + tl.arange(0, S_BLOCK)
    m_slot = i_slot < SLOTS
    t = tl.load(p_level + i_slot, mask=m_slot, other=0.0)
    s = tl.load(p_next_level + i_slot, mask=m_slot, other=0.0)
    patch = tl.load(p_index + i_slot, mask=m_slot, other=-1)
    moves = (t != s) & (patch >= 0)
    t = tl.where(moves, t, 1.0)  # idle slots are not stored; keep their arithmetic finite
    s = tl.where(moves, s, 0.0)

    root = tl.div_rn((1.0 - t) * s, (1.0 - s) * t)
    r = root * root
    gamma = s * tl.sqrt_rn(1.0 - eta * eta * (1.0 - r))
    of_z = 1.0 - s + gamma
    of_u = gamma * (1.0 - t) - (1.0 - s) * t
    scale = eta * tau * tl.sqrt_rn(1.0 - r) * s
    log_ratio = tl.where(s > 0, tl.log(t / tl.maximum(s, 1.0e-30)), 0.0)
    if PRESERVING:
        log_ratio += 0.5 * tl.log((s * s + (1.0 - s) * (1.0 - s)) / (t * t + (1.0 - t) * (1.0 - t)))

    i_chain = i_slot // A
    row = (i_chain * N + patch) * P
    o_quad = i_block * Q_BLOCK + tl.arange(0, Q_BLOCK)
    o_element = i_block * 4 * Q_BLOCK + tl.arange(0, 4 * Q_BLOCK)
    m_element = moves[:, None] & (o_element < P)[None, :]
    o_patch = row[:, None] + o_element[None, :]
    z = tl.load(p_patches + o_patch, mask=m_element, other=0.0)
    o_velocity = i_slot[:, None] * VELOCITY_STRIDE + o_element[None, :]
    u = tl.load(p_velocity + o_velocity, mask=m_element, other=0.0).to(tl.float32)
    z = z * of_z[:, None] + u * of_u[:, None]
    if FRESH:
        if GIVEN:
            xi = tl.load(p_noise + o_patch, mask=m_element, other=0.0)
        else:
            iteration, seed = tl.load(p_iteration).to(tl.int32), tl.load(p_seed)
            step = tl.load(p_step + i_chain, mask=m_slot, other=0).to(tl.int32)
            chain_id = tl.load(p_chain_ids + i_chain, mask=m_slot, other=0).to(tl.int32)
            place = (step << 16) | tl.maximum(patch, 0)
            quad = (STREAM << 28) | o_quad[None, :]
            n0, n1, n2, n3 = normals_4(quad, place[:, None], iteration, chain_id[:, None], seed)
            xi = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
        sigma = scale[:, None]
        if HAS_MIX:
            o_mix = i_slot[:, None] * MIX_STRIDE + o_element[None, :]
            v = tl.load(p_mix + o_mix, mask=m_element, other=0.0).to(tl.float32)
            if IS_LOGIT:
                v = tl.sigmoid(v)
            sigma = sigma * tl.exp(v * log_ratio[:, None])
        z += tl.where((s > 0)[:, None], sigma, 0.0) * xi  # an extreme mix may make sigma infinite: no 0 * inf
    tl.store(p_patches + o_patch, z, mask=m_element)
    if HAS_VALUES:
        tl.store(p_values + i_slot[:, None] * P + o_element[None, :], z, mask=m_element)


def denoise(
    patches: Tensor,
    *,
    index: Tensor,
    level: Tensor,
    next_level: Tensor,
    velocity: Tensor,
    variance_mix: Tensor | None,
    stochasticity: float,
    temperature: float,
    seed: Tensor,
    step: Tensor,
    iteration: Tensor,
    chain_ids: Tensor,
    noise: Tensor | None = None,
    mix_is_logit: bool = False,
    slot_values: Tensor | None = None,
    preserving: bool = False,
) -> None:
    """Update the slots whose level changes; every other patch keeps its bits.

    noise: (B, N, P), replaces the normals that seed and counters define. mix_is_logit: `variance_mix` is the logit of
    the mix. slot_values: the slots' patches as of `slot_inputs`, updated too. preserving: the mix is between the bounds
    of a flow that preserves variance.
    """
    if not runs_kernel(denoise_kernel, patches, velocity, variance_mix, noise):
        counters = (seed, STREAM_POSTERIOR, step[:, None], iteration, chain_ids)
        mix = variance_mix.sigmoid() if variance_mix is not None and mix_is_logit else variance_mix
        settings = stochasticity, temperature, counters, noise, slot_values, preserving
        _denoise(patches, index, level, next_level, velocity, mix, *settings)
        return
    (batch, slots), (_, num_patches, numel) = index.shape, patches.shape
    if index.numel() == 0:
        return
    contiguous(patches=patches, index=index, level=level, next_level=next_level)
    contiguous(step=step, chain_ids=chain_ids, noise=noise, slot_values=slot_values)
    velocity, velocity_stride = rows_of(velocity)
    mix, mix_stride = (None, 0) if variance_mix is None else rows_of(variance_mix)
    quads = -(-numel // 4)
    q_block = min(power_of_2(quads), 256)
    s_block = max(1, min(64, 256 // q_block))
    launch(
        denoise_kernel,
        (-(-batch * slots // s_block) * -(-quads // q_block),),
        patches,
        index,
        level,
        next_level,
        velocity,
        mix,
        slot_values,
        noise,
        step,
        iteration,
        chain_ids,
        seed,
        stochasticity,
        temperature,
        batch * slots,
        slots,
        num_patches,
        numel,
        velocity_stride,
        mix_stride,
        STREAM=STREAM_POSTERIOR,
        HAS_MIX=mix is not None,
        IS_LOGIT=mix_is_logit,
        HAS_VALUES=slot_values is not None,
        FRESH=stochasticity * temperature > 0,
        GIVEN=noise is not None,
        PRESERVING=preserving,
        S_BLOCK=s_block,
        Q_BLOCK=q_block,
        num_warps=4,
    )


def bytes_moved(moving: int, numel: int, size: int, mix: bool, values_size: int = 0) -> int:
    """Return the bytes that must move for `moving` slots, with predictions of `size` bytes a number.

    values_size: the bytes of a number of `slot_values`, 0 without them.
    """
    return moving * numel * (8 + size * (2 if mix else 1) + values_size)


def _denoise(
    patches: Tensor,
    index: Tensor,
    level: Tensor,
    next_level: Tensor,
    velocity: Tensor,
    variance_mix: Tensor | None,
    stochasticity: float,
    temperature: float,
    counters: tuple[Tensor, int, Tensor, Tensor, Tensor],
    noise: Tensor | None,
    slot_values: Tensor | None = None,
    preserving: bool = False,
) -> None:
    """The torch twin; the mix is no logit."""
    _, num_patches, numel = patches.shape
    rows = patch_rows(index, num_patches)
    z = read_rows(patches, rows)

    t, s = level[..., None], next_level[..., None]
    moves = t != s
    t = torch.where(moves, t, 1.0)  # idle slots' results are dropped; keep their arithmetic finite
    s = torch.where(moves, s, 0.0)
    r = ((1 - t) * s / ((1 - s) * t)).square()
    gamma = s * torch.sqrt(1 - stochasticity**2 * (1 - r))
    new = torch.addcmul(z * (1 - s + gamma), velocity.float(), gamma * (1 - t) - (1 - s) * t)
    if stochasticity * temperature > 0:
        xi = patch_normals(*counters, index.clamp(min=0), numel) if noise is None else read_rows(noise, rows)
        scale = stochasticity * temperature * torch.sqrt(1 - r) * s
        if variance_mix is not None:
            log_ratio = torch.where(s > 0, torch.log(t / s.clamp_min(1e-30)), 0.0)
            if preserving:
                log_ratio = log_ratio + 0.5 * torch.log((s * s + (1 - s) ** 2) / (t * t + (1 - t) ** 2))
            scale = scale * torch.exp(variance_mix.float() * log_ratio)
        # An extreme mix or temperature may make the scale infinite: no 0 * inf.
        new = torch.addcmul(new, torch.where(s > 0, scale, 0.0), xi)
    new = torch.where(moves, new, z)
    write_rows(patches, rows, new, index >= 0)
    if slot_values is not None:
        slot_values.copy_(new)
