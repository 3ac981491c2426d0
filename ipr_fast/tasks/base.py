"""The protocols of a task: what the trainer, the demo and the evaluation ask of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ipr_fast.sampling.tokens import Vocabulary


class Report(Protocol):
    """A judge's verdict on B samples: a NamedTuple of tensors with B rows each."""

    @property
    def good(self) -> Tensor:
        """(B,) bool: whether the sample satisfies the task."""
        ...

    def measures(self) -> dict[str, Tensor]:
        """Return distances from a good sample by name: (B,) numbers, 0 at best."""
        ...

    def __iter__(self) -> Iterator[Tensor]: ...


class Judge(Protocol):
    """A function that judges samples."""

    @property
    def note(self) -> str:
        """One line on the judge's own errors, printed beside its counts; empty if it makes none."""
        ...

    def __call__(self, samples: Tensor, /) -> Report:
        """Judge samples (B, ...), on their device."""
        ...


class Task(Protocol):
    """A source of training samples, and their judge.

    noun, adjective: words for a sample and for a good one ("board", "valid"), used in printed results.

    To be trained, a task of your own also needs its network's `config`, see `ipr_fast.training.configs`.
    """

    name: str
    noun: str
    adjective: str

    def sample(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw samples on the generator's device, from its random numbers only.

        Float32 (B, *sample_shape) of the grid of its `config`, in its `value_range`: images (B, C, H, W) in [-1, 1].
        Of a `TokenTask` tokens (B, N) int64.
        """
        ...

    def judge(self) -> Judge:
        """Return the judge of this task's samples."""
        ...


@runtime_checkable
class TokenTask(Protocol):
    """What a task of discrete tokens has in addition: samples hold `length` tokens of `vocabulary`, never its mask."""

    vocabulary: Vocabulary
    length: int


@runtime_checkable
class SymbolTask(Protocol):
    """What a task has in addition if it knows the symbol that each patch of a sample shows, such as a digit.

    Training then adds a head that predicts the symbols of noisy patches; the saved model is without it.
    """

    num_symbols: int

    def sample_with_symbols(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the samples of `sample`, and their symbols (B, N) int64 in 0..num_symbols-1."""
        ...


@runtime_checkable
class ReadableTask(SymbolTask, Protocol):
    """What a SymbolTask has in addition if it can read the symbols of samples that a model made."""

    def read_symbols(self, samples: Tensor) -> Tensor:
        """Return the symbols (B, N) int64 of samples (B, ...); any other number for a patch that shows none."""
        ...
