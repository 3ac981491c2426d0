"""Denoisers, and how their weights are stored."""

from ipr_fast.models.denoiser import Denoiser, Prediction
from ipr_fast.models.patch_transformer import PatchTransformer, PatchTransformerConfig

__all__ = ["Denoiser", "PatchTransformer", "PatchTransformerConfig", "Prediction"]
