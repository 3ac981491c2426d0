"""Small models of spatialreasoners with random weights, and its own sampler with noise that is given.

Of the package, the models, flows and the sampler are imported: not its `__init__`, which needs a training framework,
and not its video models and autoencoders, whose libraries are stood in for where they are not installed.
"""

import dataclasses
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import torch

ABSENT = (
    "diffusers.models.autoencoders.vae",
    "diffusers.models.embeddings",
    "timm.models.vision_transformer",
    "rotary_embedding_torch.rotary_embedding_torch",
    "omegaconf",
)


class StandIn(types.ModuleType):
    """A module whose names are empty classes."""

    __path__ = ()

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)  # libraries that are installed look for it

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _import():
    """Return (denoising_model, inference_sampler, variable_mapper)."""
    for needed in ("spatialreasoners", "einops", "jaxtyping", "dacite"):
        if importlib.util.find_spec(needed) is None:
            raise ModuleNotFoundError(f"{needed} is not installed", name=needed)
    root = Path(importlib.util.find_spec("spatialreasoners").submodule_search_locations[0])
    added = []
    for name in ("spatialreasoners", "spatialreasoners.benchmark", "spatialreasoners.benchmark.evaluation"):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
    for name in [name for name in ABSENT if importlib.util.find_spec(name.partition(".")[0]) is None]:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            added.append(".".join(parts[:depth]))
            sys.modules.setdefault(added[-1], StandIn(added[-1]))
    try:
        paths = ("denoising_model", "benchmark.evaluation.inference_sampler", "variable_mapper")
        return [importlib.import_module(f"spatialreasoners.{path}") for path in paths]
    finally:
        for name in added:
            sys.modules.pop(name, None)


models, samplers, mappers = _import()


def _module(path):
    return importlib.import_module(f"spatialreasoners.{path}")


conditioning, gaussians = _module("type_extensions").ConditioningCfg, _module("denoising_model.flow.diagonal_gaussian")
denoisers, flows, tokenizers = (_module(f"denoising_model.{name}") for name in ("denoiser", "flow", "tokenizer"))
unets, dit_blocks, embedding, attention, feed_forward, norms, positions = (
    _module(f"denoising_model.denoiser.{name}")
    for name in (
        "unet.modules",
        "dit.modules",
        "embedding",
        "modules.attention",
        "modules.feed_forward",
        "modules.norm_1d",
        "modules.pos_embedding",
    )
)


def denoiser_cfg(kind, embedding_of):
    """The configuration of a small "unet", "dit" or "lightningdit"."""
    if kind == "unet":
        return denoisers.UNetCfg(
            time_embedding=embedding.EmbeddingSinusodialCfg(**embedding_of),
            hid_dims=[32, 32],
            attention=[False, True],
            num_blocks=1,
            attention_cfg=unets.MultiHeadAttentionCfg(num_head_channels=16),
            time_embedding_dim=32,
        )
    block = dit_blocks.DiTBlockCfg(attention=attention.AttentionCfg(num_heads=2))
    more = {}
    if kind == "lightningdit":
        rms = norms.RMSNormCfg(eps=1e-6)
        block = dit_blocks.DiTBlockCfg(
            attention=attention.AttentionCfg(num_heads=2, qk_norm=rms),
            feed_forward=feed_forward.LightningDiTSwiGLUCfg(),
            norm_layer=rms,
        )
        more = {"rel_pos_embedding": positions.RotaryPosEmbeddingCfg()}
    return denoisers.DiTCfg(
        time_embedding=embedding.EmbeddingSinusodialCfg(**embedding_of), block=block, d_hid=32, depth=2, **more
    )


def denoising_model(
    kind="unet",
    *,
    shape=(3, 8, 8),
    patch_size=2,
    flow=None,
    parameterization="ut",
    predicts=None,
    variance=True,
    uncertainty=True,
    concat_mask=False,
    num_classes=None,
    ema=False,
    embedding_of=None,
    network=None,
    seed=0,
    **more,
):
    """A DenoisingModel with random weights, in evaluation mode. network: fields of its denoiser's configuration."""
    flow = flows.RectifiedFlowCfg(variance="learned_range" if variance else "fixed_small") if flow is None else flow
    if kind == "unet":
        tokenizer = tokenizers.UNetTokenizerCfg(concat_mask=concat_mask)
    else:
        tokenizer = tokenizers.ImageDiTTokenizerCfg(num_tokens_per_spatial_dim=1)
    cfg = models.DenoisingModelCfg(
        denoiser=dataclasses.replace(denoiser_cfg(kind, {"d_emb": 16} | (embedding_of or {})), **(network or {})),
        flow=flow,
        tokenizer=tokenizer,
        conditioning=conditioning(label=num_classes is not None, mask=concat_mask),
        learn_uncertainty=uncertainty,
        learn_variance=variance,
        parameterization=parameterization,
        denoiser_parameterization=predicts or parameterization,
        has_ema=ema,
        **more,
    )
    mapper = mappers.ImageVariableMapper(mappers.ImageVariableMapperCfg(variable_patch_size=patch_size), shape)
    model = models.DenoisingModel(cfg, mapper, num_classes, None)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 1 + 0.1 * noise
    last = model.denoiser.decoder.out[-1] if kind == "unet" else model.denoiser.out_layer.linear
    last.weight.data *= 0.3  # keeps the variance mix, which nothing bounds, near its range
    return model.eval().requires_grad_(False)


def sample(model, z, noise=None, *, steps, overlap, eta, mask=None, x=None, label=None, group=1):
    """Run the library's sampler on states (B, N, P). noise(step) -> (B, N, P), else its own; mask: 1 where unknown."""
    schedule = samplers.sampling_schedule.AdaptiveSequentialCfg(max_steps=steps, overlap=overlap, num_parallel=group)
    cfg = samplers.ScheduledInferenceSamplerCfg(sampling_schedule=schedule, alpha=eta)
    sampler = samplers.get_inference_sampler(cfg, model.variable_mapper)
    step = iter(range(steps))

    def drawn(self, eps=None):
        return self.mean + self.std * noise(next(step))[:, None]

    known = {} if mask is None else {"mask": mask, "x_masked": x * (1 - mask)[..., None]}
    t = torch.ones(z.shape[:2]) if mask is None else mask.clone()
    z = z if mask is None else known["x_masked"] + mask[..., None] * z
    own = gaussians.DiagonalGaussian.sample
    gaussians.DiagonalGaussian.sample = own if noise is None else drawn
    try:
        *_, last = sampler(model, z, t, label=label, return_sigma=True, **known)
    finally:
        gaussians.DiagonalGaussian.sample = own
    return last.z_t
