"""Selection of the patches that an iteration renoises: among the free ones, by a mask policy or a mask_fn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.kernels.renoise import PatchChoice
from ipr_fast.sampling import arguments, user_code
from ipr_fast.sampling.patches import Positions
from ipr_fast.sampling.policies import (
    AllPatches,
    FixedPatches,
    MaskPolicy,
    RandomPatches,
    SweepPatches,
    UncertainPatches,
    ViolatingPatches,
    all_patches,
    fixed_patches,
    random_patches,
    sweep_patches,
    uncertain_patches,
    violating_patches,
)
from ipr_fast.sampling.signals import Signals, names
from ipr_fast.trace import span

MaskFn = Callable[..., Tensor]  # mask_fn(x, iteration), or with signals=

# Policies that never choose more patches than their sizes, and all N where a size is N.
TRUSTED = (RandomPatches, SweepPatches, UncertainPatches, FixedPatches, AllPatches)
FACTORIES = (random_patches, sweep_patches, uncertain_patches, violating_patches, fixed_patches, all_patches)


class Selection(NamedTuple):
    """The patches that one iteration renoises.

    mask    (B, N) bool
    counts  (B,) int64 on the CPU: upper bounds of the patches in each chain
    choice  a random choice that the engine makes and writes into the mask
    varies  True if counts differ from iteration to iteration
    is_whole  False if a chain whose count is N may have fewer patches in the mask
    """

    mask: Tensor
    counts: Tensor
    choice: PatchChoice | None = None
    varies: bool = False
    is_whole: bool = True


def make_selector(
    mask_fn: object, grid: Positions, free: Tensor, chain_ids: Tensor, seed: int
) -> PolicySelector | FunctionSelector:
    """Return the selector of a `mask_fn` argument, for free patches (B, N). Raises ValueError if it is no mask_fn."""
    for factory in FACTORIES:
        if mask_fn is factory:
            raise ValueError(f"mask_fn: {factory.__name__} makes a policy, call it: {factory.__name__}(...)")
    if isinstance(mask_fn, type) and issubclass(mask_fn, MaskPolicy):
        raise ValueError(f"mask_fn must be an instance of a policy, got the class {mask_fn.__name__}")
    if isinstance(mask_fn, MaskPolicy):
        return PolicySelector(mask_fn, grid, free, chain_ids, seed)
    if callable(mask_fn):
        return FunctionSelector(mask_fn, grid, free)
    raise ValueError(f"mask_fn must be a mask policy or a callable mask_fn(x, iteration), got {type(mask_fn).__name__}")


class FunctionSelector:
    """Selects the patches of each iteration by calling a user's mask_fn with the samples."""

    def __init__(self, mask_fn: Callable[..., object], grid: Positions, free: Tensor) -> None:
        self.mask_fn, self.grid, self.free = mask_fn, grid, free
        self.name = f"mask_fn {checks.name_of(mask_fn)}"
        self.most_active = grid.num_patches
        self.takes_signals = names(mask_fn, "signals")

    def __call__(
        self, iteration: int, on_device: Tensor, images: Callable[[], Tensor], signals: Signals | None = None
    ) -> Selection:
        """Select for one iteration, also given as a scalar tensor; `images()` are the samples (B, *sample_shape).

        signals: what the model told of the patches, of a selector that takes them.
        """
        options = {} if signals is None else {"signals": signals.clone()}
        with span("mask_fn"):
            mask = user_code.call(self.name, iteration, partial(self.mask_fn, **options), images(), iteration)
        mask = arguments.patch_mask(self.name, mask, len(self.free), self.grid, self.free.device) & self.free
        return Selection(mask, mask.sum(1).cpu(), varies=True)  # the iteration's only host synchronisation

    def freeze(self, chains: Tensor) -> bool:
        """Remove the chains (B,) bool from those to refine. Returns True when none is left."""
        self.free = self.free & ~chains.to(self.free.device)[:, None]
        return not bool(self.free.any())

    def verify(self) -> None:
        """Nothing to verify: masks are checked on arrival."""


class PolicySelector:
    """Selects the patches of each iteration by a mask policy; without host synchronisation, unless the policy varies.

    most_active: upper bound of the active patches of a chain in any iteration.
    """

    def __init__(self, policy: MaskPolicy, grid: Positions, free: Tensor, chain_ids: Tensor, seed: int) -> None:
        self.policy, self.grid, self.free, self.chain_ids, self.seed = policy, grid, free, chain_ids, seed
        self.takes_x, self.takes_signals = (names(policy.choose, argument) for argument in ("x", "signals"))
        self.policy = self._bind()
        self.sizes = self._sizes()  # (B,), until chains are frozen
        self.counts = self.sizes.cpu()
        self.most_active = max(self.counts.tolist(), default=0)
        self._excess: Tensor | None = None  # (), the most patches that a chain has had beyond its size

    @property
    def name(self) -> str:
        return f"mask policy {checks.name_of(self.policy)}"

    def __call__(
        self, iteration: int, on_device: Tensor, images: Callable[[], Tensor], signals: Signals | None = None
    ) -> Selection:
        """See `FunctionSelector.__call__`."""
        if type(self.policy) is RandomPatches:
            choice = self.policy.choice(self.free, on_device)
            return Selection(torch.zeros_like(self.free), self.counts, choice)
        asked = {"x": images()} if self.takes_x else {}
        mask = self._choose(iteration, on_device, asked | ({"signals": signals} if self.takes_signals else {}))
        if self.policy.varies:
            return Selection(mask, mask.sum(1).cpu(), varies=True)
        return Selection(mask, self.counts, is_whole=self._is_trusted)

    def freeze(self, chains: Tensor) -> bool:
        """Remove the chains (B,) bool from those to refine. Returns True when none is left."""
        self.free = self.free & ~chains.to(self.free.device)[:, None]
        sizes = self._sizes()
        counts, free = torch.stack([sizes, self.free.sum(1)]).cpu()  # the only host synchronisation
        if not torch.equal(counts, self.counts):  # keep the same object: Engine caches its plan by identity
            self.sizes, self.counts = sizes, counts
        return not bool(free.any())

    def verify(self) -> None:
        """Raise ValueError if the policy chose more patches than its `sizes`; synchronises with the device."""
        if self._excess is not None and int(self._excess) > 0:
            raise ValueError(
                f"{self.name}: its `choose` returned up to {int(self._excess)} patches more for a chain than its "
                "`sizes` said. Chains are scheduled for `sizes` patches, so extra ones would stay noise: `sizes` must "
                "be an upper bound of `choose`"
            )

    @property
    def _is_trusted(self) -> bool:
        return type(self.policy) in TRUSTED

    def _choose(self, iteration: int, on_device: Tensor, asked: dict[str, Any]) -> Tensor:
        """Call the policy's `choose` and check the mask (B, N). asked: what it asks for besides."""
        choose: Callable[..., Any] = self.policy.choose
        choose = partial(choose, seed=self.seed, iteration=on_device, chain_ids=self.chain_ids, **asked)
        if self._is_trusted or type(self.policy) is ViolatingPatches:
            return choose(self.free)
        tensors = {name: value for name, value in asked.items() if name == "x"}
        if (signals := asked.get("signals")) is not None:
            tensors |= {f"signals[{number}]": each for number, each in enumerate(signals.present)}
        inputs = {"free": self.free, "iteration": on_device, "chain_ids": self.chain_ids, **tensors}
        with user_code.read_only(self.name, **inputs):
            mask = user_code.call(self.name, iteration, choose, self.free)
        mask = arguments.patch_mask(self.name, mask, len(self.free), self.grid, self.free.device) & self.free
        excess = (mask.sum(1) - self.sizes).amax()
        is_first = self._excess is None
        self._excess = excess if self._excess is None else torch.maximum(self._excess, excess)
        if is_first or excess.device.type == "cpu":  # on a GPU once now and once at the end
            self.verify()
        return mask

    def _bind(self) -> MaskPolicy:
        """Call the policy's `bind`."""
        with user_code.errors_as_value_error(f"{self.name}: bind"):
            bound: object = self.policy.bind(self.grid, len(self.free), self.free.device)
        if not isinstance(bound, MaskPolicy):
            raise ValueError(f"{self.name}: bind must return a MaskPolicy, got {type(bound).__name__}")
        return bound

    def _sizes(self) -> Tensor:
        """Call the policy's `sizes`, check them (B,), and limit them to 0..N."""
        batch = len(self.free)
        guard = nullcontext() if self._is_trusted else user_code.read_only(self.name, free=self.free)
        with guard, user_code.errors_as_value_error(f"{self.name}: sizes"):
            sizes: object = self.policy.sizes(self.free)
        if not isinstance(sizes, Tensor) or tuple(sizes.shape) != (batch,) or sizes.dtype != torch.int64:
            got = checks.described(sizes)
            raise ValueError(f"{self.name}: sizes must be an int64 tensor of shape ({batch},), got {got}")
        return sizes.clamp(0, self.grid.num_patches)
