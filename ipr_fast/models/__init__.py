"""Denoisers and their weights files."""

from ipr_fast.models.adapters.diffusers import DiffusersDenoiser
from ipr_fast.models.adapters.huggingface import HuggingFaceDenoiser
from ipr_fast.models.adapters.likelihood import Likelihood
from ipr_fast.models.adapters.mar import MARDenoiser
from ipr_fast.models.adapters.spatialreasoners import SpatialReasonersDenoiser
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.guided import Guided
from ipr_fast.models.parameterisation import Parameterised
from ipr_fast.models.patch_transformer import PatchTransformer
from ipr_fast.models.patch_transformer_config import PatchTransformerConfig
from ipr_fast.models.srm_unet import SRMUNet
from ipr_fast.models.srm_unet_config import PRESETS, SRMUNetConfig
from ipr_fast.models.token_transformer import TokenTransformer
from ipr_fast.models.token_transformer_config import TokenTransformerConfig
from ipr_fast.sampling.prediction import Prediction

__all__ = [
    "PRESETS",
    "Denoiser",
    "DiffusersDenoiser",
    "Guided",
    "HuggingFaceDenoiser",
    "Likelihood",
    "MARDenoiser",
    "Parameterised",
    "PatchTransformer",
    "PatchTransformerConfig",
    "Prediction",
    "SRMUNet",
    "SRMUNetConfig",
    "SpatialReasonersDenoiser",
    "TokenTransformer",
    "TokenTransformerConfig",
]
