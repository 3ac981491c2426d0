"""Diffusion Forcing transformers of Hugging Face's `diffusers` as Denoisers of video, whose patches are latent frames.

`diffusers` is not imported: a model is an nn.Module with a `config`, called as SkyReelsV2Transformer3DModel is, as
model(hidden_states, timestep, encoder_hidden_states, enable_diffusion_forcing=True), with latents (B, C, T, H, W) and a
timestep for each frame. It predicts the velocity eps - x of rectified flow.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ipr_fast import checks
from ipr_fast.sampling.patches import ActivePatches, PatchGrid
from ipr_fast.sampling.prediction import Prediction

TEXT = "encoder_hidden_states"
OWN = ("hidden_states", "timestep", "enable_diffusion_forcing", "fps", "return_dict")


class DiffusersDenoiser(nn.Module):
    """A Denoiser of latents (C, T, H, W) by a transformer with a timestep for each frame (SkyReels-V2 DF).

    model: in evaluation mode; its weights stay where they are. frames, height, width: T, H, W of the latents.
    frames_per_patch: consecutive frames that share a level and are regenerated together, such as a causal block.
    time_scale: the timestep of pure noise.
    fps: of the video, for a model that is told (`inject_sample_info`): 16 or another one.

    Its calls take `condition=`: embeddings of the text (B, S, D), or a dict of the model's inputs, such as
    `encoder_hidden_states` and `encoder_hidden_states_image`. For guidance: `Guided(model, scale, unconditional)` with
    the embeddings (S, D) of the negative prompt. The model predicts no log-variance, so frames start in their order.
    Raises ValueError, naming the argument.
    """

    patch_dtype = torch.float32  # cast to the model's type

    def __init__(
        self,
        model: nn.Module,
        frames: int,
        height: int,
        width: int,
        *,
        frames_per_patch: int = 1,
        time_scale: float = 1000.0,
        fps: int = 24,
    ) -> None:
        super().__init__()
        config: Any = getattr(model, "config", None)
        if not isinstance(model, nn.Module) or not hasattr(config, "in_channels") or not hasattr(config, "patch_size"):
            raise ValueError(
                "model must be an nn.Module whose `config` has `in_channels` and `patch_size`, got "
                f"{checks.described(model)}"
            )
        if config.in_channels != (config.out_channels or config.in_channels):
            raise ValueError(
                f"model must predict as many channels as it takes, got {config.in_channels} and {config.out_channels}: "
                "one whose input holds other latents as well needs an adapter of your own"
            )
        in_time, *sides = config.patch_size
        for name, value, side in zip(("height", "width"), (height, width), sides, strict=True):
            if checks.integer(name, value, 1) % side:
                raise ValueError(f"{name} must be a multiple of the model's patch size {side}, got {value}")
        per_patch = checks.integer("frames_per_patch", frames_per_patch, 1)
        if checks.integer("frames", frames, 1) % per_patch or per_patch % in_time:
            raise ValueError(
                f"frames_per_patch must divide the {frames} frames and be a multiple of the model's {in_time}, got "
                f"{per_patch}"
            )
        self.model, self.training = model, model.training
        self.grid = PatchGrid.of((config.in_channels, frames, height, width), (per_patch, height, width))
        self.times_per_patch = per_patch // in_time  # timesteps of a patch
        self.time_scale = checks.number("time_scale", time_scale, 1e-6)
        self.is_told_fps = bool(getattr(config, "inject_sample_info", False))
        index = 0 if checks.integer("fps", fps, 1) == 16 else 1
        self.register_buffer("fps", torch.tensor([index], device=_first_weight(model).device), persistent=False)

    def forward(
        self,
        patches: Tensor,
        levels: Tensor,
        active: ActivePatches | None = None,
        *,
        condition: Tensor | dict[str, Tensor],
    ) -> Prediction:
        """Predict the velocity of the active frames; the model computes all of them."""
        dtype = self._dtype
        given = {TEXT: condition} if isinstance(condition, Tensor) else condition
        if not isinstance(given, dict) or TEXT not in given or not given.keys().isdisjoint(OWN):
            raise ValueError(
                f"condition must be a tensor, or a dict of the model's inputs with {TEXT} and without {', '.join(OWN)}"
            )
        inputs = {name: each.to(dtype) if each.is_floating_point() else each for name, each in given.items()}
        every = levels if active is None else active.scatter(levels, self.grid.num_patches)
        times = (self.time_scale * every).repeat_interleave(self.times_per_patch, dim=1)
        video = self.grid.to_images(patches).to(dtype)
        options: dict[str, Any] = {"fps": self.fps} if self.is_told_fps else {}
        with warnings.catch_warnings() if self.is_told_fps else nullcontext():
            if self.is_told_fps:  # the model copies it by torch.tensor(fps)
                warnings.filterwarnings("ignore", message="To copy construct from a tensor")
            made = self.model(video, times, enable_diffusion_forcing=True, return_dict=False, **options, **inputs)[0]
        prediction = Prediction(self.grid.to_patches(made))
        return prediction if active is None else prediction.at(active)

    @property
    def _dtype(self) -> torch.dtype:
        """The type in which the model computes: its `dtype`, which leaves out layers that are kept in float32."""
        own = getattr(self.model, "dtype", None)
        return own if isinstance(own, torch.dtype) else _first_weight(self.model).dtype


def _first_weight(model: nn.Module) -> Tensor:
    found = next((weight for weight in model.parameters() if weight.is_floating_point()), None)
    if found is None:
        raise ValueError(f"model must have weights, got {checks.described(model)}")
    return found
