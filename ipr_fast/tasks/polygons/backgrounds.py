"""Backgrounds of images: pictures from a folder of the user's; soft paintings, colours or grey without files."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.errors import import_extra
from ipr_fast.tasks.hues import of_hue

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Backgrounds = Callable[[int, torch.Generator], Tensor]  # batch size, generator -> (B, 3, side, side) in [0, 1]

PLAIN = "plain"  # in place of a folder
COLOURS = 4  # of a painting
SCALES = ((4, 1.0), (8, 0.5), (16, 0.22), (32, 0.1))  # cells a side of random values, and their weight; doubling
GRAIN = 0.012


def paintings(side: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Draw soft areas of a few colours with shading and grain: (B, 3, side, side) in [0, 1].

    Hues lie in half a turn at most, so that others are rare; saturation is at most 0.85.
    """
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch_size, *shape, generator=generator, device=device)

    base, spread = uniform(1), 0.05 + 0.45 * uniform(1)
    hue = (base + spread * (uniform(COLOURS) - 0.5)) % 1
    palette = of_hue(hue, 0.05 + 0.8 * uniform(COLOURS), 0.15 + 0.8 * uniform(COLOURS))  # (B, 3, COLOURS)
    fields = _fields(batch_size, COLOURS + 1, generator)
    sharpness = 2 + 10 * uniform(1, 1, 1)
    image = torch.einsum("bck,bkhw->bchw", palette, (sharpness * fields[:, :COLOURS]).softmax(1))
    image *= (1 + 0.25 * fields[:, COLOURS:]).clamp(0.3, 1.4)
    grain = torch.randn(batch_size, 3, side, side, generator=generator, device=device)
    return (_enlarged(image, side) + GRAIN * grain).clamp(0, 1)


def plain_colours(side: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Draw a colour for each image: (B, 3, side, side) in [0, 1], as dull and as dark as those of paintings."""
    hue, saturation, value = torch.rand(3, batch_size, generator=generator, device=generator.device)
    colour = of_hue(hue, 0.05 + 0.8 * saturation, 0.15 + 0.8 * value)  # (B, 3)
    return colour[:, :, None, None].expand(-1, -1, side, side)


def grey(side: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Return images of one grey, 0.5: (B, 3, side, side). Its hue is 0, so that the rarest one is cyan."""
    return torch.full((batch_size, 3, side, side), 0.5, device=generator.device)


def _fields(batch_size: int, count: int, generator: torch.Generator) -> Tensor:
    """Smooth random fields (B, count, 2 * cells, 2 * cells), finer structures weaker; cells: of the finest scale."""
    total = torch.zeros(batch_size, count, SCALES[0][0], SCALES[0][0], device=generator.device)
    for cells, weight in SCALES:
        noise = torch.randn(batch_size, count, cells, cells, generator=generator, device=generator.device)
        total = _enlarged(total + weight * noise, 2 * cells)
    return total


def _enlarged(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bicubic", align_corners=False)


def backgrounds_from(folder: str | Path | None, side: int) -> Backgrounds:
    """Return a source of backgrounds: pictures of a folder, held in memory; paintings for None, colours for PLAIN.

    Raises ValueError for a folder without pictures or with one that cannot be read, MissingExtra without pillow.
    """
    if folder is None:
        return partial(paintings, side)
    if folder == PLAIN:
        return partial(plain_colours, side)
    return _Pictures(load_pictures(Path(folder), side))


class _Pictures:
    """Draws uniformly from pictures (M, 3, side, side) uint8."""

    def __init__(self, pictures: Tensor) -> None:
        self._pictures = pictures

    def __call__(self, batch_size: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self._pictures), (batch_size,), generator=generator, device=generator.device)
        return self._pictures[chosen.to(self._pictures.device)].to(generator.device).float() / 255


def load_pictures(folder: Path, side: int) -> Tensor:
    """Load all pictures below a folder, in order of their paths: (M, 3, side, side) uint8.

    Each is scaled so that its shorter side fits, and its middle is cut out, as the benchmark does with FFHQ.
    """
    image_of = import_extra("PIL.Image", "pillow", "plots", "pictures as backgrounds")
    if not folder.is_dir():
        raise ValueError(f"backgrounds must be a folder of pictures or {PLAIN!r}: {folder} is no folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"backgrounds: no picture ({', '.join(SUFFIXES)}) in {folder}")
    with ThreadPoolExecutor() as threads:
        pictures = list(threads.map(partial(_load, image_of, side), paths))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _load(image_of: ModuleType, side: int, path: Path) -> np.ndarray:
    try:
        with image_of.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise ValueError(f"backgrounds: {path} cannot be read ({error})") from error
    scale = side / min(image.size)
    wide, high = (max(side, int(scale * each)) for each in image.size)
    image = image.resize((wide, high), image_of.Resampling.BICUBIC)
    left, top = (wide - side) // 2, (high - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))
