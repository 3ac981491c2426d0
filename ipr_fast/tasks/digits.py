"""Images of handwritten digits, and a classifier that reads them.

Two sources: scikit-learn's bundled copy of the UCI optical digits (Alpaydin & Kaynak 1998; 1,797 images of 8x8 pixels,
no download), and MNIST's original files (28x28) if the user has them. Models and the reader see training images only;
clues and the reader's accuracy use test images only.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.errors import import_extra

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Digits:
    """Images (M, size, size) float32 in [-1, 1] and their labels (M,) int64 in 0..9."""

    images: Tensor
    labels: Tensor

    @property
    def size(self) -> int:
        return self.images.shape[-1]

    def to(self, device: torch.device | str) -> Digits:
        return Digits(self.images.to(device), self.labels.to(device))

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a random image (..., size, size) for each of the labels (...) int64."""
        by_label, first, count = self._sorted
        u = torch.rand(labels.shape, generator=generator, device=labels.device)
        offset = (u * count[labels]).long().clamp(max=count[labels] - 1)
        return by_label[first[labels] + offset]

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """The images sorted by label, with the first index and the number of images of each label."""
        count = self.labels.bincount(minlength=10)
        return self.images[self.labels.argsort(stable=True)], count.cumsum(0) - count, count


# Largest jitter. The reader misreads one or two of 100,000 jittered training digits; at twice the jitter, one in 100.
TURN, SHEAR, STRETCH, SHIFT = math.radians(3), 0.04, 0.035, 0.025  # radians, ratio, ratio, image widths


def jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, shear, stretch and shift each image (..., size, size) in [-1, 1] by small random amounts.

    Images and generator are on one device. Resampled bilinearly; pixels from beyond the image are -1 (paper).
    """
    if not images.numel():
        return images
    flat = images.reshape(-1, 1, *images.shape[-2:])
    u = 2 * torch.rand(len(flat), 6, generator=generator, device=generator.device) - 1
    turn, shear, (wide, high) = TURN * u[:, 0], SHEAR * u[:, 1], (1 + STRETCH * u[:, 2:4]).unbind(1)
    x, y = (2 * SHIFT * u[:, 4:]).unbind(1)
    x_row = torch.stack([wide * turn.cos(), shear - high * turn.sin(), x], dim=1)
    y_row = torch.stack([wide * turn.sin(), high * turn.cos(), y], dim=1)
    grid = F.affine_grid(torch.stack([x_row, y_row], dim=1), list(flat.shape), align_corners=False)
    return (F.grid_sample(flat + 1, grid, align_corners=False) - 1).view_as(images)


def load_digits(split: str, root: str | Path | None = None) -> Digits:
    """Load the "train" or "test" digits: scikit-learn's 8x8, or MNIST's 28x28 if `root` is the folder of its files.

    Every fourth of scikit-learn's images is a test image. Raises ValueError for an unknown split or a folder without
    MNIST's files and all ten digits in them, MissingExtra or BrokenExtra when scikit-learn cannot be imported.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return _load_optical_digits(split) if root is None else _load_mnist(split, Path(root))


@cache
def _load_optical_digits(split: str) -> Digits:
    datasets = import_extra("sklearn.datasets", "scikit-learn", "digits", "the handwritten digits")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().reshape(-1, 8, 8) / 8 - 1
    is_test = torch.arange(len(images), device="cpu") % 4 == 3
    chosen = is_test if split == "test" else ~is_test
    return Digits(images[chosen], torch.from_numpy(labels).long()[chosen])


def _load_mnist(split: str, root: Path) -> Digits:
    stem = "train" if split == "train" else "t10k"
    images = _read_idx(root, f"{stem}-images-idx3-ubyte", rank=3)
    labels = _read_idx(root, f"{stem}-labels-idx1-ubyte", rank=1)
    if len(images) != len(labels) or images.shape[1] != images.shape[2]:
        raise ValueError(f"MNIST files in {root}: images {images.shape} and labels {labels.shape} do not fit")
    found = sorted(set(labels.tolist()))
    if found != list(range(10)):
        raise ValueError(f"MNIST files in {root}: {stem} labels must be 0 to 9, each at least once, got {found}")
    return Digits(torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(labels).long())


def _read_idx(root: Path, name: str, rank: int) -> np.ndarray:
    """Read a file in MNIST's IDX format: a magic number, the sizes as big-endian 32-bit numbers, then bytes."""
    path = next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(f"no MNIST file {name} or {name}.gz in {root}")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable gzip file ({error})") from error
    header = np.frombuffer(data[: 4 * (1 + rank)].ljust(4 * (1 + rank), b"\0"), dtype=">u4")
    if header[0] != 0x0800 + rank:
        raise ValueError(f"{path}: not an IDX file of {rank}-dimensional bytes")
    shape = tuple(int(n) for n in header[1:])
    if len(data) - 4 * (1 + rank) != math.prod(shape):
        raise ValueError(f"{path}: {len(data) - 4 * (1 + rank)} bytes of data, the header says {math.prod(shape)}")
    return np.frombuffer(data, dtype=np.uint8, offset=4 * (1 + rank)).reshape(shape).copy()


class DigitReader:
    """Classifies digits by kernel ridge regression on the training images (Gaussian kernel, one-hot targets).

    The solution is closed-form: equal on every machine up to rounding, with nothing to train or ship. It knows all ten
    digits, so a 7 on a 4x4 board is read as 7 and makes the board invalid.
    """

    MAX_IMAGES = 10_000  # training images; the solve's time grows with their cube
    BANDWIDTH = 0.3  # of the kernel, in RMS pixel difference; 0.15 to 0.4 read a held-out quarter of them equally well
    RIDGE = 1e-2

    def __init__(self, train: Digits) -> None:
        flat = train.images[: self.MAX_IMAGES].flatten(1).double()
        self._scale = 1 / (2 * self.BANDWIDTH**2 * flat.shape[1])
        kernel = torch.exp(-self._scale * torch.cdist(flat, flat).square())
        kernel.diagonal().add_(self.RIDGE)
        one_hot = F.one_hot(train.labels[: self.MAX_IMAGES], 10).double()
        self._weights = torch.linalg.solve(kernel, one_hot).float()
        self._images = flat.float()

    @property
    def size(self) -> int:
        """Side of the images that it reads, in pixels."""
        return math.isqrt(self._images.shape[1])

    def read(self, images: Tensor) -> Tensor:
        """Read images (..., size, size) as digits (...) int64 in 0..9. The reader moves to the images' device."""
        lead = images.shape[:-2]
        if images.device != self._images.device:
            self._images, self._weights = self._images.to(images.device), self._weights.to(images.device)
        flat = images.flatten(-2).reshape(-1, self._images.shape[1]).to(self._images)
        at_a_time = 256 if flat.device.type == "cpu" else 8192  # whose kernel stays in a cache: 2.6 times faster
        digits = [self._scores(chunk).argmax(1) for chunk in flat.split(at_a_time)]
        return torch.cat(digits).reshape(lead) if digits else images.new_zeros(lead, dtype=torch.long)

    def accuracy(self, digits: Digits) -> float:
        """Return the share of `digits` that are read as labelled."""
        return (self.read(digits.images) == digits.labels).float().mean().item()

    def _scores(self, flat: Tensor) -> Tensor:
        norms = flat.square().sum(1, keepdim=True) + self._images.square().sum(1)
        square = (norms - 2 * flat @ self._images.T).clamp_(min=0)
        return torch.exp(square.mul_(-self._scale)) @ self._weights
