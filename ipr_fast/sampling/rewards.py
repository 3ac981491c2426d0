"""Calls a user's reward on samples and checks what it returns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.sampling import user_code
from ipr_fast.trace import span

Reward = Callable[[Tensor], Tensor]  # of samples (B, ...): (B,) real numbers, higher is better


def callable_reward(reward: Reward) -> Reward:
    """Return a reward. Raises ValueError if it cannot be called."""
    if not callable(reward) or isinstance(reward, type):
        raise ValueError(f"reward must be a function of samples, got {checks.instance_or_class(reward)}")
    return reward


def rewards_of(reward: Reward, x: Tensor, iteration: int, unit: str = "iteration") -> Tensor:
    """Return the rewards (B,) float64 of samples, on their device, as a new tensor; on a CPU, NaN is a ValueError.

    unit: what the number `iteration` counts, for messages.
    """
    name = f"reward {checks.name_of(reward)}"
    with span("reward"), torch.no_grad(), user_code.read_only(name, x=x):
        found = user_code.call(name, iteration, reward, x, unit=unit)
    if not isinstance(found, Tensor) or tuple(found.shape) != (len(x),) or found.is_complex() or not _is_dense(found):
        kind = "" if not isinstance(found, Tensor) or _is_dense(found) else f", {found.device} {found.layout}"
        raise ValueError(
            f"{name} must return real numbers of shape ({len(x)},), got {checks.described(found)}{kind} in {unit} "
            f"{iteration}"
        )
    rewards = found.detach().to(x.device, torch.float64, copy=True)  # the caller may keep its own
    if rewards.device.type == "cpu":
        check_nan(reward, rewards.isnan(), f" in {unit} {iteration}")
    return rewards


def _is_dense(found: Tensor) -> bool:
    """Return whether a tensor can be copied to another device and type."""
    return found.layout == torch.strided and not found.is_meta and not found.is_quantized


def check_nan(reward: Reward, nan: Tensor, where: str = "") -> None:
    """Raise ValueError if there is a NaN among the rewards of chains (B,)."""
    if bool(nan.any()):
        number = f"NaN for {int(nan.sum())} of {len(nan)} samples{where}"
        raise ValueError(f"reward {checks.name_of(reward)} must not return NaN, got {number}")
