"""Denoisers, and how their weights are stored."""

from ipr_fast.models.denoiser import Denoiser, Prediction
from ipr_fast.models.patch_transformer import PatchTransformer, PatchTransformerConfig
from ipr_fast.models.srm_unet import PRESETS, SRMUNet, SRMUNetConfig

__all__ = [
    "PRESETS",
    "Denoiser",
    "PatchTransformer",
    "PatchTransformerConfig",
    "Prediction",
    "SRMUNet",
    "SRMUNetConfig",
]
