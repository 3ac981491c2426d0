"""A model's own patches in place of clean ones in training, so that it learns to read what it writes.

A sequential model conditions each patch on patches that it has made. Trained on a task's samples alone it never sees
such patches, misreads some, and its mistakes feed on each other (exposure bias: Ranzato et al. 2016, arXiv 1511.06732).
Here the starting model has made some of the clean patches of a training sample, context and finished ones, with the
same symbols. What is learnt, the velocity of noisy patches, stays that of the task's samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.policies import random_patches
from ipr_fast.tasks.base import ReadableTask
from ipr_fast.training.objective import uniform
from ipr_fast.training.samples import check_form

SAMPLES = 320  # in which a model's patches are looked for, once as generated and once as refined
ITERATIONS, RATIO = 4, 0.25  # of the refinement, whose schedule may leave other marks in a patch than generation's


class OwnPatches(NamedTuple):
    """Patches (M, P) that a model made, sorted by their symbols; the number of each symbol's, and its first's index."""

    patches: Tensor
    counts: Tensor
    firsts: Tensor

    @classmethod
    def of(cls, patches: Tensor, symbols: Tensor, num_symbols: int) -> OwnPatches:
        """Sort patches (M, P) by their symbols (M,) int64; drop those whose symbol is not in 0..num_symbols-1."""
        shown = (symbols >= 0) & (symbols < num_symbols)
        patches, symbols = patches[shown], symbols[shown]
        count = symbols.bincount(minlength=num_symbols)
        return cls(patches[symbols.argsort(stable=True)], count, count.cumsum(0) - count)

    def replace(
        self, clean: Tensor, symbols: Tensor, levels: Tensor, share: float, generator: torch.Generator
    ) -> Tensor:
        """Return patches (B, N, P), some of those at level 0 replaced by own ones of the same symbols (B, N).

        share: of the samples in which each such patch is replaced with a probability, the square root of a uniform
        number: most are, as where a model has made all patches but a few given ones. A symbol without own patches
        keeps the clean one.
        """
        batch, num_patches, _ = clean.shape
        rate = uniform(batch, 1, generator).sqrt() * (uniform(batch, 1, generator) < share)
        count = self.counts[symbols]
        chosen = (uniform(batch, num_patches, generator) < rate) & (levels == 0) & (count > 0)
        offset = (uniform(batch, num_patches, generator) * count).long().clamp_max(count - 1)
        own = self.patches[(self.firsts[symbols] + offset).clamp_min(0)]
        return torch.where(chosen[..., None], own, clean)


def make_own_patches(model: PatchTransformer, task: ReadableTask, seed: int, *, progress: bool = False) -> OwnPatches:
    """Generate and refine samples of a model, and sort their patches by the symbols that the task reads in them.

    Raises ValueError where it reads none, and for symbols that are not (B, N) int64 on the samples' device.
    """
    x = generate_batch(SAMPLES, model=model, seed=seed, progress=progress)
    refined = refine_batch(x, random_patches(RATIO), ITERATIONS, model=model, seed=seed, progress=progress)
    samples = torch.cat([x, refined])
    symbols, shape = task.read_symbols(samples), (len(samples), model.grid.num_patches)
    words = "read_symbols() must return"
    check_form(task, shape, samples.device, symbols, torch.int64, words)  # type: ignore[arg-type]  # it is a Task too
    own = OwnPatches.of(model.grid.to_patches(samples).flatten(0, 1), symbols.flatten(), task.num_symbols)
    if not len(own.patches):
        raise ValueError("own_patches: the task reads no symbol in the model's samples")
    return own
