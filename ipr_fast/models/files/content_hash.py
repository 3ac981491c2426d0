"""Hashes of tensors and of models, by which a stored run is recognised."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.token_denoiser import TokenDenoiser


def content_hash(*contents: Tensor | str) -> str:
    """Hash tensors (dtype, shape and bytes) and strings to sixteen hexadecimal digits of SHA-256."""
    digest = hashlib.sha256()
    for content in contents:
        if isinstance(content, Tensor):
            digest.update(f"{content.dtype} {tuple(content.shape)} ".encode())
            digest.update(content.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(f"{len(content)} {content}".encode())
    return digest.hexdigest()[:16]


def model_hash(model: Denoiser | TokenDenoiser, source: str) -> str:
    """Hash a model's configuration and weights; without a dataclass `config`, its source and weights."""
    config = getattr(model, "config", None)
    weights = model.state_dict() if isinstance(model, torch.nn.Module) else {}
    tensors = [part for pair in weights.items() if isinstance(pair[1], Tensor) for part in pair]
    return content_hash(str(config) if dataclasses.is_dataclass(config) else source, *tensors)
