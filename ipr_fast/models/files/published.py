"""Convert checkpoints of the published Spatial Reasoning Models to weights and configuration of an SRMUNet.

There are two layouts, each with or without a moving average beside the weights:

    SRM               denoiser. or ema_denoiser.module. + time_embedding.mlp, model.{encoder,bottleneck,decoder}
    spatialreasoners  the same after denoising_model.   + t_emb.mlp, {encoder,bottleneck,decoder}

Both repeat the shared level embedding in every block, as `...norm_with_embedding.t_emb.mlp`. They differ in the
variance mix: SRM's network puts out 2 v - 1, the UNet of spatialreasoners v. Much of spatialreasoners' configuration
changes what a network computes and leaves no trace in the file: it is asked for by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipr_fast.models.srm_unet_config import PRESETS, SRMUNetConfig

BASES = ("", "denoising_model.")
REPEATED = ".norm_with_embedding.t_emb."
SIZES = ("image_size", "patch_size", "num_head_channels")
# What else a checkpoint of spatialreasoners does not tell: fields of SRMUNetConfig, and what an SRMUNet always is.
EMBEDDING = ("level_scale", "level_shift")
FIXED = {
    "activation": "silu",
    "max_period": 10_000,
    "parameterization": "ut",
    "flow": "rectified",
    "variance": "learned_range",
}
ADAPTER = (
    "ipr_fast.models.SpatialReasonersDenoiser.load(path, denoising_model) takes any checkpoint of spatialreasoners, "
    "with the library and a model built from its configuration"
)


class Layout(NamedTuple):
    """A file's names of weights: their prefix, and whether they are in the layout of spatialreasoners."""

    prefix: str
    spatialreasoners: bool

    def key(self, name: str) -> str:
        """Return the file's name for an SRMUNet's weight."""
        if self.spatialreasoners:
            name = name.replace("time_embedding.", "t_emb.").removeprefix("model.")
        return self.prefix + name

    def name(self, key: str) -> str:
        """Return the SRMUNet's name for a file's weight, the inverse of `key`."""
        name = key.removeprefix(self.prefix)
        if not self.spatialreasoners:
            return name
        if name.startswith("t_emb."):
            return "time_embedding." + name.removeprefix("t_emb.")
        return "model." + name if name.startswith(("encoder.", "bottleneck.", "decoder.")) else name


class Published(NamedTuple):
    """Weights under SRMUNet's names, the SRMUNetConfig fields that follow from their shapes, and the file's layout."""

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    layout: Layout


def from_published(path: Path, state: dict[str, Tensor]) -> Published:
    """Convert a published state dict. Raises ValueError, naming file and weight, for another network."""
    layout = _layout(path, state)
    tensors: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    for key, tensor in state.items():
        if key.startswith(layout.prefix):
            name = layout.name(key)
            if name in tensors:
                raise ValueError(f"{path}: weights {keys[name]!r} and {key!r} are the same one of a network")
            tensors[name], keys[name] = tensor, key
    tensors = _without_repeats(path, tensors, layout)
    fields = _fields(path, tensors, layout)
    return Published(tensors, fields | {"mix": "raw"} if layout.spatialreasoners else fields, layout)


def complete_config(path: Path, published: Published, config: object | None) -> SRMUNetConfig:
    """Complete the fields that follow from the file by `config`: an SRMUNetConfig, a preset's name or a dict."""
    fields = published.fields
    if published.layout.spatialreasoners:
        config = _stated(path, fields, config)
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"config must be a preset ({', '.join(PRESETS)}), a config or a dict, got {config!r}")
        config = PRESETS[config]
    if isinstance(config, SRMUNetConfig):
        _check_agreement(path, {name: fields[name] for name in ("mix",) if name in fields}, config)
        return config
    others = {} if config is None else config
    if not isinstance(others, dict):
        raise ValueError(f"config must be an SRMUNetConfig, a preset's name or a dict, got {type(others).__name__}")
    known = set(SRMUNetConfig.__dataclass_fields__)
    unknown = [name for name in others if name not in known]
    if unknown:
        raise ValueError(f"config: {unknown} are not fields of SRMUNetConfig, {sorted(known)} are")
    missing = [name for name in SIZES if name not in others]
    if missing:
        alike = [name for name, preset in PRESETS.items() if fields.items() <= preset.to_dict().items()]
        match = f"its shapes match {alike[0]!r}" if alike else "its shapes match none"
        raise ValueError(
            f"{path}: cannot infer {', '.join(missing)}: pass config= a dict of them, an SRMUNetConfig, or a preset of "
            f"{', '.join(PRESETS)} ({match}). "
            "On the command line, run ipr-fast convert first, with --preset or with "
            f"{', '.join('--' + name.replace('_', '-') for name in missing)}"
        )
    try:
        completed = SRMUNetConfig(**{**fields, **others})
    except ValueError as error:
        raise ValueError(f"{path}: its shapes and config make no SRMUNet: {error}") from error
    _check_agreement(path, fields, completed)
    return completed


def _check_agreement(path: Path, fields: dict[str, Any], config: SRMUNetConfig) -> None:
    for name, value in fields.items():
        if getattr(config, name) != value:
            raise ValueError(f"{path}: its weights have {name} {value}, config says {getattr(config, name)}")


def _stated(path: Path, fields: dict[str, Any], config: object | None) -> object:
    """Check that a `config` states all that a file of spatialreasoners does not tell; return the SRMUNet's part."""
    if isinstance(config, SRMUNetConfig):
        return config
    given = {} if config is None else config
    if not isinstance(given, dict):
        raise ValueError(
            f"config must be an SRMUNetConfig or a dict for {path}, of spatialreasoners, got {config!r:.80}"
        )
    missing = [name for name in (*SIZES, *EMBEDDING, *FIXED) if name not in given]
    if missing:
        raise ValueError(
            f"{path}: a checkpoint of spatialreasoners' UNet does not tell {', '.join(missing)}: pass config= a dict "
            f"of them. It tells {', '.join(f'{name} {value}' for name, value in fields.items())}"
        )
    for name, value in FIXED.items():
        if given[name] != value:
            raise ValueError(f"{path}: {name} is {value!r} in an SRMUNet, config says {given[name]!r}; {ADAPTER}")
    return {name: value for name, value in given.items() if name not in FIXED}


def _layout(path: Path, state: dict[str, Tensor]) -> Layout:
    """Return the layout of the network's weights: of their moving average, if there is one."""
    for base in BASES:
        average = base + "ema_denoiser."
        if average_was_taken(state, average):
            found = _network(state, average + "module.") or _network(state, average)
            if found is None:
                raise ValueError(f"{path}: its moving average ({average}*) holds no encoder of a published SRM UNet")
            return found
    for base in BASES:
        found = _network(state, base + "denoiser.") or _network(state, base + "denoiser.module.")
        if found is not None:
            return found
    found = _network(state, "")
    if found is not None:
        return found
    if any(".adaLN_modulation." in key or ".attn.qkv." in key for key in state):
        raise ValueError(f"{path}: weights of a transformer (DiT), which is not an SRMUNet; {ADAPTER}")
    raise ValueError(
        f"{path}: neither a file with the configuration of an SRMUNet in its metadata, nor a published SRM UNet: no "
        f"weights named denoiser.model.encoder... or denoising_model.denoiser.encoder..., but {_examples(state)}"
    )


def average_was_taken(state: dict[str, Tensor], average: str) -> bool:
    """Return whether there is a moving average over at least one step; over none it holds the initial weights."""
    count = state.get(average + "n_averaged")
    if count is not None and count.numel() == 1 and not count.item():
        return False
    return any(key.startswith(average) for key in state)


def _network(state: dict[str, Tensor], prefix: str) -> Layout | None:
    for spatialreasoners in (False, True):
        layout = Layout(prefix, spatialreasoners)
        if any(key.startswith(layout.key("model.encoder.blocks.")) for key in state):
            return layout
    return None


def _without_repeats(path: Path, tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if REPEATED not in name or name.split(REPEATED)[0] + ".norm_with_embedding.norm.weight" not in tensors
    }
    for name in tensors.keys() - kept.keys():
        shared = "time_embedding." + name.split(REPEATED)[1]
        if shared not in kept or not _equal(tensors[name], kept[shared]):
            raise ValueError(
                f"{path}: weight {layout.key(name)!r} is not equal to {layout.key(shared)!r}; a network with an "
                "embedding for each block is not an SRMUNet"
            )
    return kept


def _fields(path: Path, tensors: dict[str, Tensor], layout: Layout) -> dict[str, Any]:
    """Return the SRMUNetConfig fields that follow from the shapes."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors:
            raise ValueError(f"{path}: no weight {layout.key(name)!r}")
        if tensors[name].ndim != rank:
            found = tuple(tensors[name].shape)
            raise ValueError(f"{path}: weight {layout.key(name)!r} has shape {found}, expected {rank} dimensions")
        return tuple(tensors[name].shape)

    channels = shape("model.encoder.blocks.0.0.weight", 4)[1]
    out_channels = shape("model.decoder.out.2.weight", 4)[0]
    t_emb_dim, d_emb = shape("time_embedding.mlp.0.weight", 2)
    resolutions: list[list[tuple[int, bool]]] = [[]]  # the channels of each ResBlock, and whether attention follows
    for i in range(1, len(tensors)):
        block = f"model.encoder.blocks.{i}"
        if f"{block}.0.downsample.weight" in tensors:
            resolutions.append([])
        elif f"{block}.0.conv_1.2.weight" in tensors:
            attention = f"{block}.1.qkv.weight" in tensors
            resolutions[-1].append((shape(f"{block}.0.conv_1.2.weight", 4)[0], attention))
        else:
            break
    _refuse_variants(path, tensors, channels, out_channels)
    if any(len(blocks) != len(resolutions[0]) or len(set(blocks)) != 1 for blocks in resolutions):
        raise ValueError(
            f"{path}: the ResBlocks of its encoder, as (channels, attention) by resolution, are {resolutions}; an "
            "SRMUNet has equal ResBlocks, the same number per resolution"
        )
    return {
        "channels": channels,
        "hid_dims": tuple(blocks[0][0] for blocks in resolutions),
        "attention": tuple(blocks[0][1] for blocks in resolutions),
        "num_blocks": len(resolutions[0]),
        "t_emb_dim": t_emb_dim,
        "d_emb": d_emb,
    }


def _refuse_variants(path: Path, tensors: dict[str, Tensor], channels: int, out_channels: int) -> None:
    """Raise ValueError for options of spatialreasoners' UNet that SRMUNet does not have, naming the option."""
    reason = None
    if any(name.startswith("class_embedding.") for name in tensors):
        reason = "is conditioned on labels (class_embedding)"
    elif not any(name.startswith("model.bottleneck.") for name in tensors):
        reason = "has no bottleneck"
    elif out_channels == channels and channels % 2:
        reason = (
            f"has {channels} channels in and {out_channels} out: either it takes the mask and the masked image as "
            "inputs (concat_mask), or it predicts no variance and no uncertainty"
        )
    elif out_channels != 2 * channels + 1:
        reason = (
            f"puts out {out_channels} channels for {channels} of image; an SRMUNet puts out velocity, variance and "
            f"log-variance, {2 * channels + 1}"
        )
    else:
        layer = "model.bottleneck.blocks.0.norm_with_embedding"
        projection, norm = tensors.get(f"{layer}.embedding_layer.1.weight"), tensors.get(f"{layer}.norm.weight")
        if projection is not None and norm is not None and projection.shape[:1] == (2 * norm.numel(),):
            reason = "scales and shifts by its level embedding (use_scale_shift_norm)"
    if reason is not None:
        raise ValueError(f"{path}: not the network of an SRMUNet: it {reason}; {ADAPTER}")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _examples(state: dict[str, Tensor]) -> str:
    names = [repr(name) for name in sorted(state)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
