"""Samples on disk: .npy, .npz, .pt, or a folder of PNG files, of which those of images can be read again."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ipr_fast import checks, pictures
from ipr_fast.errors import load_reason
from ipr_fast.outputs import check_no_folders, check_room, replacing

if TYPE_CHECKING:
    import PIL.Image

SUFFIXES = (".npy", ".npz", ".pt")


@dataclass(frozen=True)
class Samples:
    """Samples (B, C, ...), or tokens (B, N); from a folder, also its PNG files' names and depth, 8 or 16 bits.

    shown: the numbers that are black and white in PNG files. stored: the shape of a file's array, as it was read.
    """

    images: Tensor
    names: tuple[str, ...] | None = None
    depth: int = 8
    shown: tuple[float, float] = pictures.PIXELS
    stored: tuple[int, ...] | None = None

    def fitting(self, name: str, sample_shape: tuple[int, ...]) -> Samples:
        """Return samples of a model's shape (C, ...), also where an array lacks the one channel, or was given one.

        Raises ValueError for other shapes, and for PNG files where samples are not images.
        """
        own, shape = tuple(self.images.shape[1:]), tuple(sample_shape)
        if self.names is not None and len(shape) != 3:
            raise ValueError(
                f"{name} must be one of {', '.join(SUFFIXES)}: PNG files of sequences and video are pictures only"
            )
        if own == (1, *shape):  # (B, C, L) was taken for images (B, H, W)
            return replace(self, images=self.images.squeeze(1))
        if (1, *own) == shape:
            return replace(self, images=self.images.unsqueeze(1))
        if own != shape:
            expected, found = ", ".join(map(str, shape)), self.stored or tuple(self.images.shape)
            raise ValueError(f"{name} must have shape (B, {expected}) to fit the model, got {found}")
        return self


def read_samples(path: str | os.PathLike) -> Samples:
    """Read samples (B, C, ...) as floats, images in [-1, 1], or tokens, whole numbers (B, N), as int64.

    An array may be of images (B, C, H, W), or (B, H, W) for one channel, of sequences (B, C, L) or video
    (B, C, T, H, W): `Samples.fitting` tells by a model's shape. Bytes 0..255 become [-1, 1], floats stay as they are. A
    folder holds images. An .npz file must hold an array `x` or a single one. Raises ValueError that names the file and
    what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    array = read_array(path, "x")
    is_tokens = array.ndim == 2 and not array.is_floating_point() and array.dtype != torch.bool
    return Samples(array.long() if is_tokens else _as_images(path, array), stored=tuple(array.shape))


def read_array(path: str | os.PathLike, key: str) -> Tensor:
    """Read one tensor from an .npy, .npz (under `key`, or the only one) or .pt file."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: must end in one of {', '.join(SUFFIXES)}, or be a folder of PNG files")
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    try:
        loaded = torch.load(path, weights_only=True) if path.suffix == ".pt" else _load_array(path, key)
        if isinstance(loaded, Tensor):
            return loaded
        return torch.from_numpy(np.ascontiguousarray(loaded, dtype=loaded.dtype.newbyteorder("=")))
    except Exception as error:  # a foreign file makes these loaders raise almost anything
        raise ValueError(f"{path}: not a readable {path.suffix} file of numbers ({load_reason(error)})") from error


def _load_array(path: Path, key: str) -> np.ndarray:
    """Load the array of an .npy file, or of an .npz file the one under `key`, or its only one."""
    with path.open("rb") as file:  # np.load would leave a broken .npz file open
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            return loaded
        with loaded:
            names = loaded.files
            if key not in names and len(names) != 1:
                raise ValueError(f"holds the arrays {names}, none of them {key!r}")
            return loaded[key if key in names else names[0]]


def write_samples(path: str | os.PathLike, samples: Samples) -> None:
    """Write samples or tokens in the format of the path's suffix; a path without a suffix is a folder of PNG files.

    A suffix begins with a letter, so that a folder may be called name_0.25. PNG files hold `shown`, by default [-1, 1],
    as 0..255, or grey of 16 bits as 0..65535; numbers outside are clamped. Those of sequences and video are pictures to
    look at, which cannot be read again. They cannot hold NaN: an image with NaN or inf is left out, and
    an earlier file of its name removed. Raises ValueError as `check_writable` does, and OSError when a
    file cannot be written; the file that it would have replaced stays whole.
    """
    path, images = Path(path), samples.images.detach().cpu()
    check_writable(path, tuple(images.shape), samples.names, images.dtype)
    if path.suffix not in SUFFIXES:
        _write_folder(path, replace(samples, images=images))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        if path.suffix == ".pt":
            torch.save(images, file)
        elif path.suffix == ".npz":
            np.savez(file, x=_as_array(images))
        else:
            np.save(file, _as_array(images))


def check_writable(
    path: str | os.PathLike,
    shape: tuple[int, ...],
    names: tuple[str, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise ValueError, before any work, if `write_samples` could not write samples of this shape (B, ...) there.

    An array needs room for its numbers, of `dtype`, beside the file that it replaces. A folder may hold PNG files only
    if all of them will be overwritten: none of another run may stay among them.
    """
    path = Path(path)
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{path}: no permission to write in {existing}")
    if existing.is_file() and existing != path.absolute():
        raise ValueError(f"{path}: {existing} is a file, not a folder")
    if path.suffix in SUFFIXES:
        check_no_folders([path])
        check_room(path, existing, math.prod(shape) * dtype.itemsize)
        return
    if not path.is_dir() and (path.exists() or path.suffix[1:2].isalpha()):
        raise ValueError(f"{path}: must end in one of {', '.join(SUFFIXES)}, or be a folder for PNG files")
    if len(shape) == 2:
        raise ValueError(f"{path}: PNG files hold images, not tokens; choose {', '.join(SUFFIXES)}")
    pictures.pillow()
    if not pictures.can_be_drawn(shape[1:]):
        raise ValueError(f"{path}: PNG files hold 1 or 3 channels, not {shape[1]}; choose {', '.join(SUFFIXES)}")
    check_no_folders(_png_files(path))
    others = {p.name for p in _png_files(path)} - set(names or _png_names(shape[0]))
    if others:
        raise ValueError(f"{path}: holds other PNG files ({min(others)}); choose an empty folder")


def _as_images(path: Path, array: Tensor) -> Tensor:
    if array.ndim == 3:
        array = array[:, None]
    if not (array.ndim in (4, 5) or (array.ndim == 2 and array.is_floating_point())):
        raise ValueError(
            f"{path}: must hold images (B, C, H, W) or (B, H, W), sequences (B, C, L), video (B, C, T, H, W), or whole "
            f"numbers (B, N), got shape {tuple(array.shape)}"
        )
    if array.layout != torch.strided or array.device.type == "meta":
        raise ValueError(f"{path}: must hold a dense tensor with data, got {array.layout} on {array.device.type}")
    if array.dtype == torch.uint8:
        return array.float() / 127.5 - 1
    if not array.is_floating_point():
        raise ValueError(f"{path}: must hold floats in [-1, 1] or bytes, got {array.dtype}")
    return array


def _as_array(images: Tensor) -> np.ndarray:
    return (images.float() if images.dtype == torch.bfloat16 else images).numpy()


def _read_folder(path: Path) -> Samples:
    image_module = pictures.pillow()
    files = _png_files(path)
    if not files:
        raise ValueError(f"{path}: no PNG files in this folder")
    images, depth = [], 8
    for file in files:
        try:
            _refuse_deep_colours(file)
            with image_module.open(file) as image:
                pixels, bits = _pixels(image)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{file}: not a readable PNG file ({error})") from error
        depth = max(depth, bits)
        images.append(torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1) * 2 - 1)
        if images[-1].shape != images[0].shape:
            found, first = tuple(images[-1].shape), tuple(images[0].shape)
            raise ValueError(f"{file}: has the shape {found}, the folder's first image {first}")
    return Samples(torch.stack(images), tuple(file.name for file in files), depth)


def _write_folder(path: Path, samples: Samples) -> None:
    path.mkdir(parents=True, exist_ok=True)
    names = samples.names or _png_names(len(samples.images))
    bad = checks.not_finite(samples.images).tolist()
    for name, sample, left_out in zip(names, samples.images, bad, strict=True):
        if left_out:
            (path / name).unlink(missing_ok=True)
            continue
        picture = pictures.draw(sample, samples.shown, samples.depth)
        with replacing(path / name) as file:
            picture.save(file, format="PNG")


def _refuse_deep_colours(file: Path) -> None:
    """Raise ValueError for colours of 16 bits per channel, of which pillow would drop eight."""
    with file.open("rb") as opened:
        header = opened.read(26)
    depth, colour = header[24:25], header[25:26]  # in IHDR, the first chunk of a PNG
    if header.startswith(b"\x89PNG") and depth == b"\x10" and colour != b"\x00":
        raise ValueError(
            f"{file}: has 16 bits a channel, which only grey pictures may have; save it with 8 bits a channel, or the "
            "samples as .npy"
        )


def _pixels(image: PIL.Image.Image) -> tuple[np.ndarray, int]:
    """Return a picture's pixels in [0, 1], float32, (H, W) if it is grey, else (H, W, 3); and their bits, 8 or 16."""
    if image.mode.startswith("I"):  # 16 bits of grey
        return np.array(image).astype(np.float32) / 65535, 16
    return np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")).astype(np.float32) / 255, 8


def _png_files(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.suffix.lower() == ".png") if path.is_dir() else []


def _png_names(count: int) -> tuple[str, ...]:
    digits = max(4, len(str(count)))
    return tuple(f"{i:0{digits}d}.png" for i in range(count))
