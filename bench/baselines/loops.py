"""Baselines: Iterative Partial Refinement as loops in plain torch.

    one_at_a_time   as published: one sample after another, state on the CPU, network on a device; each step copies
                    patches and levels there, and the prediction back
    batched         the whole batch on the device, eager, all patches through the network in each step; with a network
                    from torch.compile it is the third baseline

Both run the same algorithm, without known patches: each iteration replaces a random subset of max(1, floor(ratio * N))
patches of each sample by noise and regenerates it. So all samples share the schedule's integers, and the host knows
them in advance. Except for the copies of `one_at_a_time`, no step synchronises with the host.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from baselines.per_pixel import PerPixelUNet
from baselines.plain_transformer import PlainTransformer
from ipr_fast import Denoiser, PatchGrid, Prediction, Schedule
from ipr_fast.kernels import philox
from ipr_fast.kernels.renoise import PatchChoice, choose_patches
from ipr_fast.models import PatchTransformer, SRMUNet
from ipr_fast.sampling import flow
from ipr_fast.sampling.policies import num_chosen


class Network(Protocol):
    """Returns the prediction of all patches (B, N, P), given levels (B, N) and is_active (B, N) bool."""

    grid: PatchGrid

    def __call__(self, patches: Tensor, levels: Tensor, is_active: Tensor) -> Prediction: ...


class EveryPatch(nn.Module):
    """A Denoiser as a Network, for models to which a clean patch is one of level 0."""

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.inner, self.grid = model, model.grid

    def forward(self, patches: Tensor, levels: Tensor, is_active: Tensor) -> Prediction:
        return self.inner(patches, levels)


def baseline_network(model: Denoiser) -> Network:
    """Return the baseline's network: a copy of the model's weights, none of this project's kernels."""
    if isinstance(model, PatchTransformer):
        return PlainTransformer(copy.deepcopy(model))
    if isinstance(model, SRMUNet):
        return EveryPatch(PerPixelUNet(copy.deepcopy(model).to(memory_format=torch.contiguous_format)))
    return EveryPatch(model)


class Sampling(NamedTuple):
    """The arguments of `refine_batch` of the same names."""

    schedule: Schedule
    ratio: float = 0.25
    stochasticity: float = 0.5
    temperature: float = 1.0


class Noise(Protocol):
    """Random numbers on the state's device: the patches to renoise (B, N) bool, and normals (B, N, P)."""

    def choose(self, iteration: int, batch: int, num_patches: int, size: int) -> Tensor: ...

    def renoise(self, iteration: int, like: Tensor) -> Tensor: ...

    def posterior(self, iteration: int, step: int, like: Tensor) -> Tensor: ...

    def of(self, chain: int) -> Noise:
        """Return the noise of one chain, as of a batch of one."""
        ...


class TorchNoise(NamedTuple):
    """Torch's generator, with which the loops are timed."""

    device: torch.device

    def choose(self, iteration: int, batch: int, num_patches: int, size: int) -> Tensor:
        return torch.rand(batch, num_patches, device=self.device).argsort(1) < size

    def renoise(self, iteration: int, like: Tensor) -> Tensor:
        return torch.randn_like(like)

    def posterior(self, iteration: int, step: int, like: Tensor) -> Tensor:
        return torch.randn_like(like)

    def of(self, chain: int) -> TorchNoise:
        return self


class LibraryNoise(NamedTuple):
    """The counter-based numbers of `refine_batch` for chains (B,), with which results must be the same."""

    seed: int
    chain_ids: Tensor

    def choose(self, iteration: int, batch: int, num_patches: int, size: int) -> Tensor:
        device = self.chain_ids.device
        free = torch.ones(batch, num_patches, dtype=torch.bool, device=device)
        sizes, number = torch.full((batch,), size, device=device), torch.tensor(iteration, device=device)
        return choose_patches(PatchChoice(free, sizes, number), seed=self.seed, chain_ids=self.chain_ids)

    def renoise(self, iteration: int, like: Tensor) -> Tensor:
        return self._normals(philox.STREAM_RENOISE, iteration, 0, like)

    def posterior(self, iteration: int, step: int, like: Tensor) -> Tensor:
        return self._normals(philox.STREAM_POSTERIOR, iteration, step, like)

    def of(self, chain: int) -> LibraryNoise:
        return self._replace(chain_ids=self.chain_ids[chain : chain + 1])

    def _normals(self, stream: int, iteration: int, step: int, like: Tensor) -> Tensor:
        batch, num_patches, numel = like.shape
        patches = torch.arange(num_patches, device=like.device).expand(batch, -1)
        return philox.patch_normals(self.seed, stream, step, iteration, self.chain_ids, patches, numel)


@torch.inference_mode()
def batched(network: Network, x: Tensor, iters: int, sampling: Sampling, noise: Noise) -> Tensor:
    """Refine images x (B, C, H, W) all at once, on their device."""
    patches = network.grid.to_patches(x)
    for iteration in range(1, iters + 1):
        patches = _iterate(network, x.device, patches, iteration, sampling, noise)
    return network.grid.to_images(patches)


@torch.inference_mode()
def one_at_a_time(
    network: Network, x: Tensor, iters: int, sampling: Sampling, noise: Noise, device: torch.device
) -> Tensor:
    """Refine images x (B, C, H, W) on the CPU one after another, with the network on `device`."""
    refined = []
    for chain in range(len(x)):
        patches, own = network.grid.to_patches(x[chain : chain + 1]), noise.of(chain)
        for iteration in range(1, iters + 1):
            patches = _iterate(network, device, patches, iteration, sampling, own)
        refined.append(patches)
    return network.grid.to_images(torch.cat(refined)) if refined else x.clone()


def _iterate(
    network: Network, device: torch.device, patches: Tensor, iteration: int, sampling: Sampling, noise: Noise
) -> Tensor:
    """Run one iteration on patches (B, N, P) on any device; the network is on `device`."""
    batch, num_patches, _ = patches.shape
    size = num_chosen(sampling.ratio, num_patches)
    schedule = sampling.schedule
    num_steps, block, starts = schedule.steps(size), schedule.block(size), schedule.starts(size)
    is_active = noise.choose(iteration, batch, num_patches, size)
    patches = torch.where(is_active[..., None], noise.renoise(iteration, patches), patches)
    level = is_active.float()
    start = torch.where(is_active, math.inf, -math.inf)  # active patches wait; the context was clean long ago
    roles = is_active.to(device)

    for step in range(num_steps):
        there = network(patches.to(device), level.to(device), roles)
        velocity, mix, log_variance = (field.to(patches.device).float() for field in there)
        starting = starts.count(step)
        if starting:
            order = torch.where(start == math.inf, log_variance, math.inf)
            start.scatter_(1, _lowest(order, starting), float(step))
        if step + 1 < num_steps:
            next_level = ((block - (step + 1)) + start).div_(block).clamp_(0, 1)
        else:
            next_level = torch.zeros_like(level)
        patches = flow.posterior_step(
            patches,
            velocity,
            mix,
            level[..., None],
            next_level[..., None],
            noise.posterior(iteration, step, patches),
            eta=sampling.stochasticity,
            tau=sampling.temperature,
        )
        level = next_level
    return patches


def _lowest(order: Tensor, number: int) -> Tensor:
    """Return the indices of the lowest numbers of each row; the first of equals."""
    if number == 1:
        return order.argmin(1, keepdim=True)
    return order.argsort(dim=1, stable=True)[:, :number]


def compiled(network: Network, mode: str | None = None) -> Callable[..., Prediction]:
    """Compile the network for fixed shapes."""
    return torch.compile(network, dynamic=False, mode=mode)
