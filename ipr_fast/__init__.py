"""Iterative Partial Refinement of sequential diffusion samples, for many chains at once."""

import sys
from pathlib import Path

# In a clone, `kernels` stands beside this folder instead of in it: `import ipr_fast` must find it there as well.
if (Path(__file__).parent.parent / "kernels" / "philox.py").is_file():
    __path__.append(str(Path(__file__).parent.parent))

from ipr_fast import models
from ipr_fast.golden import GoldenStep
from ipr_fast.model_check import check_model
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.files.checkpoints import load_model, save_model
from ipr_fast.models.files.sources import bundled_models
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling import reference
from ipr_fast.sampling.acceptance import Acceptance, Metropolis
from ipr_fast.sampling.corrupt import swap_patches
from ipr_fast.sampling.guidance.iterref import IterRef
from ipr_fast.sampling.patches import ActivePatches, PatchGrid
from ipr_fast.sampling.policies import (
    MaskPolicy,
    all_patches,
    fixed_patches,
    random_patches,
    sweep_patches,
    uncertain_patches,
    violating_patches,
)
from ipr_fast.sampling.prediction import Prediction
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.sampling.signals import Signals
from ipr_fast.sampling.tokens import TokenPrediction, TokenSchedule, Vocabulary

sys.modules[f"{__name__}.reference"] = reference  # so that `from ipr_fast.reference import ...` works too

__version__ = "0.1.0"

__all__ = [
    "Acceptance",
    "ActivePatches",
    "Denoiser",
    "GoldenStep",
    "IterRef",
    "MaskPolicy",
    "Metropolis",
    "PatchGrid",
    "Prediction",
    "Schedule",
    "Signals",
    "TokenDenoiser",
    "TokenPrediction",
    "TokenSchedule",
    "Vocabulary",
    "all_patches",
    "bundled_models",
    "check_model",
    "fixed_patches",
    "generate_batch",
    "load_model",
    "models",
    "random_patches",
    "reference",
    "refine_batch",
    "save_model",
    "swap_patches",
    "sweep_patches",
    "uncertain_patches",
    "violating_patches",
]
