"""Read and write weights: safetensors, and torch's own files, whose code is never run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ipr_fast.checks import FLOAT_DTYPES, dtype_names
from ipr_fast.errors import load_reason

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
HEADER = 8  # bytes of the header-length field; headers are padded to multiples of it


class Weights(NamedTuple):
    """A file's tensors by name, and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_weights(path: Path) -> Weights:
    """Read a file's tensors, which may be memory-mapped, and metadata.

    Raises ValueError, naming the file, if it is truncated, of another format, or holds more than plain data.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEADER + 1)
        # A safetensors file is recognised by its JSON header, under any name.
        if path.suffix == ".safetensors" or head[HEADER:] == b"{":
            return _read_safetensors(path)
        return _read_torch(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise ValueError(f"{path}: damaged, or larger than the memory") from error


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a .safetensors file of tensors and metadata. Equal input gives equal bytes.

    safetensors writes metadata in a random order; here it is sorted.
    """
    data = save(tensors, metadata)
    end = HEADER + int.from_bytes(data[:HEADER], "little")
    header = json.loads(data[HEADER:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER)  # keeps the tensors after it aligned
    return b"".join((len(text).to_bytes(HEADER, "little"), text, memoryview(data)[end:]))


def check_weights(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], key: Callable[[str], str] = str
) -> None:
    """Raise ValueError unless the tensors have the expected names and shapes, and floating-point types.

    key: returns the file's name for a weight.
    """
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{path}: no weight {key(name)!r}, expected shape {tuple(expected[name].shape)}")
        found = tensors[name]
        if name not in expected:
            raise ValueError(f"{path}: unexpected weight {key(name)!r} of shape {tuple(found.shape)}")
        if found.dtype not in FLOAT_DTYPES:
            expected_dtypes = dtype_names(FLOAT_DTYPES)
            raise ValueError(f"{path}: weight {key(name)!r} is of {found.dtype}, expected one of {expected_dtypes}")
        if found.shape != expected[name].shape:
            shape, wanted = tuple(found.shape), tuple(expected[name].shape)
            raise ValueError(f"{path}: weight {key(name)!r} has shape {shape}, expected {wanted}")


def plain_name(name: str) -> str:
    """Return a weight's name without the prefix that torch.compile adds."""
    return name.replace("_orig_mod.", "")


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            return Weights({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _read_torch(path: Path) -> Weights:
    """Read a state dict, bare or in a Lightning checkpoint."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a foreign file makes the loader raise almost anything
        raise ValueError(f"{path}: {_reason(error)}") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: holds no state dict, but an object of type {type(loaded).__name__}")
    # Detached: plain tensors, without attributes or gradients from the file.
    tensors = {
        plain_name(name): torch.Tensor.detach(value)
        for name, value in loaded.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise ValueError(f"{path}: holds no state dict; its keys are {sorted(map(str, loaded))[:10]}")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type != "cpu":
            kind = f"{tensor.layout}, {tensor.dtype}, {tensor.device.type}"
            raise ValueError(f"{path}: weight {name!r} is not a dense tensor ({kind})")
        held = tensor.untyped_storage().nbytes() // tensor.element_size()
        if held < tensor.numel():
            raise ValueError(f"{path}: weight {name!r} claims {tensor.numel()} numbers, the file holds {held} of them")
    return Weights(tensors, {})


def _reason(error: Exception) -> str:
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign is None:
        return f"not a readable checkpoint of torch ({load_reason(error)})"
    return (
        f"holds an object of {foreign[1]} beside its weights, and loading it would run code from the file. If you "
        'trust it, keep the weights alone: loaded = torch.load(path, map_location="cpu", weights_only=False); '
        'parts = loaded if isinstance(loaded, dict) else {"model": loaded}; '
        'modules = [part for part in parts.values() if hasattr(part, "parameters")]; '
        'model = parts.get("state_dict", parts.get("model", modules[0] if modules else parts)); '
        'weights = model.state_dict() if hasattr(model, "state_dict") else model; '
        "torch.save({name: w for name, w in weights.items() if isinstance(w, torch.Tensor)}, new_path)"
    )
