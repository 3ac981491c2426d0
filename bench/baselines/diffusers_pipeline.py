"""The sampler of diffusers for Diffusion Forcing transformers, at the levels of an `ipr_fast.Schedule(n, 1.0)`."""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor, nn


class Euler(diffusers.FlowMatchEulerDiscreteScheduler):
    """The library's scheduler at the levels 1, 1 - 1/n, ..., with the integer timesteps that its pipeline passes."""

    def set_timesteps(self, num_inference_steps: int, device: object = None, **more: object) -> None:
        super().set_timesteps(sigmas=[1 - k / num_inference_steps for k in range(num_inference_steps)], device=device)

    def step(self, prediction: Tensor, timestep: Tensor, sample: Tensor, **more: object) -> tuple:
        return super().step(prediction, timestep.float(), sample, **more)


def network(layers: int, heads: int, channels: int, text_width: int, width: int = 24, **options: object) -> nn.Module:
    """Return a SkyReels-V2 transformer with random weights, which its own initialisation leaves nearly zero."""
    torch.manual_seed(0)
    model = diffusers.SkyReelsV2Transformer3DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=options.pop("in_channels", channels),
        out_channels=channels,
        text_dim=text_width,
        freq_dim=32,
        ffn_dim=2 * heads * width,
        rope_max_seq_len=32,
        patch_size=(1, 2, 2),
        **options,
    )
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=1.5 * (heads * width) ** -0.5 if weight.ndim > 1 else 0.1)
    return model.eval().requires_grad_(False)


def pipeline_samples(
    model: nn.Module, noise: Tensor, prompts: Tensor, negative: Tensor, scale: float, steps: int
) -> Tensor:
    """Return the latents that the library's pipeline makes of noise (B, C, T, H, W), all frames in step."""

    class Pipeline(diffusers.SkyReelsV2DiffusionForcingPipeline):
        def prepare_latents(self, *arguments: object, **more: object) -> tuple:
            return noise.clone(), noise.shape[2], None, 0

    pipeline = Pipeline(None, None, model, None, Euler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        None,
        prompt_embeds=prompts,
        negative_prompt_embeds=negative,
        height=8 * noise.shape[3],
        width=8 * noise.shape[4],
        num_frames=4 * (noise.shape[2] - 1) + 1,
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="latent",
        return_dict=False,
        overlap_history=None,
        ar_step=0,
    )[0]
