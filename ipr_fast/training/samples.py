"""Checks of the samples that a task draws for training."""

from __future__ import annotations

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.sampling.tokens import Vocabulary
from ipr_fast.tasks.base import Task

ROUNDING = 1e-5  # by which a sample may leave [-1, 1], or in proportion another range: 80 ULPs of float32 at 1
SYMBOLS = "the symbols of sample_with_symbols() must be"


def check_form(
    task: Task,
    shape: tuple[int, ...],
    device: torch.device,
    samples: object,
    dtype: torch.dtype = torch.float32,
    words: str = "sample() must return",
) -> None:
    """Raise ValueError unless samples are a dense tensor of this shape (B, ...) and dtype on the device."""
    wanted = _form(dtype, shape, device)
    came = type(samples).__name__
    if isinstance(samples, Tensor):
        came = _form(samples.dtype, tuple(samples.shape), samples.device)
        came += f" in {samples.layout}" * (samples.layout != torch.strided)
    if came != wanted:
        raise ValueError(f"task {task.name}: {words} {wanted}, got {came}")


def _form(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{'an' if name.startswith('i') else 'a'} {name} tensor of shape {shape} on {device}"


def check_values(task: Task, samples: Tensor, value_range: tuple[float, float] | None) -> None:
    """Raise ValueError unless all values are finite and in the range, if any; synchronises with the device."""
    bad = checks.count_not_finite(samples)
    low, high = samples.min().item(), samples.max().item()
    least, most = value_range or (low, high)
    slack = ROUNDING * (most - least) / 2
    if bad or low < least - slack or high > most + slack:
        came = f"NaN or inf in {bad} of {len(samples)} samples" if bad else f"values from {low:g} to {high:g}"
        within = "" if value_range is None else f" in [{least:g}, {most:g}]"
        raise ValueError(f"task {task.name}: sample() must return finite values{within}, got {came}")


def check_tokens(task: Task, tokens: Tensor, vocabulary: Vocabulary) -> None:
    """Raise ValueError unless all tokens are in the vocabulary and none is the mask; synchronises with the device."""
    low, high, masked = tokens.min().item(), tokens.max().item(), int((tokens == vocabulary.mask_id).sum())
    if low < 0 or high >= vocabulary.size or masked:
        came = f"{masked} masks" if masked else f"{low} to {high}"
        raise ValueError(
            f"task {task.name}: sample() must return tokens in 0..{vocabulary.size - 1}, none of them the mask "
            f"{vocabulary.mask_id}, got {came}"
        )


def check_symbols(task: Task, symbols: Tensor, num_symbols: int) -> None:
    """Raise ValueError unless all symbols are in 0..num_symbols-1; synchronises with the device."""
    low, high = symbols.min().item(), symbols.max().item()
    if low < 0 or high >= num_symbols:
        raise ValueError(f"task {task.name}: {SYMBOLS} in 0..{num_symbols - 1}, got {low} to {high}")
