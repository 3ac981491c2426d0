"""Images of handwritten digits, and a reader that tells which digit an image shows.

Two sources: scikit-learn's bundled copy of the UCI optical digits (Alpaydin & Kaynak 1998; 1,797 images of 8x8 pixels,
no download), and MNIST's original files (28x28) where the user has them. Training and test images are kept apart:
models and the reader see the former only, clues and held-out accuracy use the latter.
"""

from __future__ import annotations

import gzip
import math
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
        """A random image of each label: labels (...) int64 to images (..., size, size)."""
        by_label, first, count = self._sorted
        pick = torch.rand(labels.shape, generator=generator, device=labels.device)
        offset = (pick * count[labels]).long().clamp(max=count[labels] - 1)
        return by_label[first[labels] + offset]

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """The images sorted by label, and where each label's begin and how many they are."""
        count = self.labels.bincount(minlength=10)
        return self.images[self.labels.argsort(stable=True)], count.cumsum(0) - count, count


# How far an image may be jittered. Of a hundred thousand jittered training digits the reader misreads one or two; of
# those jittered twice as far one in a hundred.
TURN, SHEAR, STRETCH, SHIFT = math.radians(3), 0.04, 0.035, 0.025  # SHIFT in widths of the image


def jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (..., size, size) in [-1, 1], each a little turned, sheared, stretched and shifted, at random.

    On the device of images and generator; resampled bilinearly, and -1, the paper, where nothing was.
    """
    if not images.numel():
        return images
    flat = images.reshape(-1, 1, *images.shape[-2:])
    u = 2 * torch.rand(len(flat), 6, generator=generator, device=generator.device) - 1
    turn, shear, (wide, high) = TURN * u[:, 0], SHEAR * u[:, 1], (1 + STRETCH * u[:, 2:4]).unbind(1)
    x, y = (2 * SHIFT * u[:, 4:]).unbind(1)
    first = torch.stack([wide * turn.cos(), shear - high * turn.sin(), x], dim=1)
    second = torch.stack([wide * turn.sin(), high * turn.cos(), y], dim=1)
    where = F.affine_grid(torch.stack([first, second], dim=1), list(flat.shape), align_corners=False)
    return (F.grid_sample(flat + 1, where, align_corners=False) - 1).view_as(images)


def load_digits(split: str, root: str | Path | None = None) -> Digits:
    """The "train" or "test" digits: scikit-learn's 8x8, or MNIST's 28x28 when `root` is the folder of its files.

    Of scikit-learn's images every fourth is a test image. Raises ValueError for an unknown split or a folder without
    MNIST's files, MissingExtra or BrokenExtra when scikit-learn cannot be imported.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return _load_optical_digits(split) if root is None else _load_mnist(split, Path(root))


@cache
def _load_optical_digits(split: str) -> Digits:
    datasets = import_extra("sklearn.datasets", "scikit-learn", "digits", "the handwritten digits")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().reshape(-1, 8, 8) / 8 - 1
    is_test = torch.arange(len(images)) % 4 == 3
    chosen = is_test if split == "test" else ~is_test
    return Digits(images[chosen], torch.from_numpy(labels).long()[chosen])


def _load_mnist(split: str, root: Path) -> Digits:
    stem = "train" if split == "train" else "t10k"
    images = _read_idx(root, f"{stem}-images-idx3-ubyte", rank=3)
    labels = _read_idx(root, f"{stem}-labels-idx1-ubyte", rank=1)
    if len(images) != len(labels) or images.shape[1] != images.shape[2]:
        raise ValueError(f"MNIST files in {root}: images {images.shape} and labels {labels.shape} do not fit")
    return Digits(torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(labels).long())


def _read_idx(root: Path, name: str, rank: int) -> np.ndarray:
    """One file of MNIST's IDX format: a magic number, the sizes as big-endian 32-bit numbers, then bytes."""
    path = next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(f"no MNIST file {name} or {name}.gz in {root}")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: not a readable gzip file ({error})") from error
    header = np.frombuffer(data[: 4 * (1 + rank)].ljust(4 * (1 + rank), b"\0"), dtype=">u4")
    if header[0] != 0x0800 + rank:
        raise ValueError(f"{path}: not an IDX file of {rank}-dimensional bytes")
    shape = tuple(int(n) for n in header[1:])
    if len(data) - 4 * (1 + rank) != math.prod(shape):
        raise ValueError(f"{path}: {len(data) - 4 * (1 + rank)} bytes of data, the header says {math.prod(shape)}")
    return np.frombuffer(data, dtype=np.uint8, offset=4 * (1 + rank)).reshape(shape).copy()


class DigitReader:
    """Reads digits by kernel ridge regression on the training images (a Gaussian kernel, one-hot targets).

    Closed form, so the same on every machine to rounding, with nothing to train or ship. It knows all ten digits, so a
    cell that shows a 7 on a 4x4 board is read as 7 and makes the board invalid.
    """

    MAX_IMAGES = 10_000  # the solve grows with their cube
    BANDWIDTH = 0.3  # root mean square distance of two pixels; 0.15 to 0.4 read a quarter of the training images alike
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
        """Pixels of a side of the images that it reads."""
        return math.isqrt(self._images.shape[1])

    def read(self, images: Tensor) -> Tensor:
        """Images (..., size, size) as digits (...) int64 in 0..9, on the images' device, to which the reader moves."""
        lead = images.shape[:-2]
        if images.device != self._images.device:
            self._images, self._weights = self._images.to(images.device), self._weights.to(images.device)
        flat = images.flatten(-2).reshape(-1, self._images.shape[1]).to(self._images)
        read = [self._scores(chunk).argmax(1) for chunk in flat.split(8192)]
        return torch.cat(read).reshape(lead) if read else images.new_zeros(lead, dtype=torch.long)

    def accuracy(self, digits: Digits) -> float:
        """The share of `digits` read as labelled."""
        return (self.read(digits.images) == digits.labels).float().mean().item()

    def _scores(self, flat: Tensor) -> Tensor:
        norms = flat.square().sum(1, keepdim=True) + self._images.square().sum(1)
        square = (norms - 2 * flat @ self._images.T).clamp_(min=0)
        return torch.exp(square.mul_(-self._scale)) @ self._weights
