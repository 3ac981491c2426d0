"""Models of `spatialreasoners`, the library of Spatial Reasoning Models, as Denoisers.

`spatialreasoners` is not imported: a model is its live `DenoisingModel`, which has a variable mapper (samples to
patches), a tokenizer, a denoiser (UNet, DiT, LightningDiT, or a class registered by the user) and a flow. Its call
makes of states (B, 1, N, P) and times (B, 1, N) a mean, in the parameterisation that its sampler uses ("ut" is
dz/dtime), a variance mix as its tokenizer takes it, and a standard deviation, its uncertainty.

Source: spatialreasoners 1.0.5, `denoising_model.py` and `scheduled_inference_sampler.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ipr_fast import checks
from ipr_fast.models import flows
from ipr_fast.models.files.published import average_was_taken
from ipr_fast.models.files.weight_files import check_weights, read_weights
from ipr_fast.models.parameterisation import Parameterised
from ipr_fast.sampling.patches import ActivePatches, PatchGrid
from ipr_fast.sampling.prediction import Prediction

PREDICTIONS = {"ut": "velocity", "eps": "eps", "v": "v"}  # its parameterisations, by our names
FLOWS: dict[str, Callable[[Any], flows.Flow]] = {  # by the class of its flow, from its configuration
    "RectifiedFlow": lambda cfg: flows.RectifiedFlow(),
    "CosineFlow": lambda cfg: flows.CosineFlow(cfg.skew),
    "ContinuousCosineLogSNRFlow": lambda cfg: flows.CosineLogSNRFlow(cfg.logsnr_min, cfg.logsnr_max, cfg.shift_factor),
}
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class SpatialReasonersDenoiser(Parameterised):
    """A `DenoisingModel` of spatialreasoners as a Denoiser.

    model: in evaluation mode; its weights stay where they are. Samples are images, or the latents of its autoencoder,
        which stays out of this. A model of labels takes `condition=` int64 (B,); its number of classes is the label
        that means none, for `Guided`. One with `concat_mask` gets the active patches as its mask.
    use_ema: take the moving average of its weights, if it has one.
    max_level: see `Parameterised`; needed for a model that predicts noise at pure noise.

    Levels of a schedule are steps in rectified flow's time; the library's own sampler steps in its flow's time. For a
    rectified flow they are the same, and so are the samples. Of another flow each step is the same, at other levels.

    Raises ValueError, naming what of the model is not supported.
    """

    mix_bounds = (-1.0, 2.0)  # the networks do not bound it

    def __init__(self, model: nn.Module, *, use_ema: bool = True, max_level: float | None = None) -> None:
        if not all(hasattr(model, name) for name in ("cfg", "flow", "tokenizer", "variable_mapper", "denoiser")):
            raise ValueError(f"model must be a DenoisingModel of spatialreasoners, got {checks.name_of(model)}")
        network = _Network(model, checks.boolean("use_ema", use_ema))
        kind = network.cfg.parameterization
        if kind not in PREDICTIONS:
            raise ValueError(f"model: its parameterization must be one of {list(PREDICTIONS)}, got {kind!r}")
        flow, scale, shift = _flow_of(model)
        super().__init__(network, PREDICTIONS[kind], flow, time_scale=scale, time_shift=shift, max_level=max_level)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, **options: Any) -> SpatialReasonersDenoiser:
        """Load a checkpoint of the library into a `DenoisingModel` that was built from its configuration.

        path: a `.ckpt` of Lightning, or a `.pt`; no code in it is run. Of a moving average that was taken, the weights
        are loaded, into the model's own too. options: see the class. Raises ValueError, naming file and weight.
        """
        file, live = Path(path), cast(Any, model)
        state = read_weights(file).tensors
        base = "denoising_model." if any(key.startswith("denoising_model.") for key in state) else ""
        average = base + "ema_denoiser."
        prefix = average + "module." if average_was_taken(state, average) else base + "denoiser."
        found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        check_weights(file, found, live.denoiser.state_dict(), lambda name: prefix + name)
        live.denoiser.load_state_dict(found)
        if getattr(live, "ema_denoiser", None) is not None:
            live.ema_denoiser.module.load_state_dict(found)
        return cls(live.eval(), **options)


class _Network(nn.Module):
    """A DenoisingModel in its own convention: states and times of its flow in, its parameterisation out."""

    def __init__(self, model: nn.Module, use_ema: bool) -> None:
        super().__init__()
        live: Any = model
        cfg = live.cfg
        self.model, self.use_ema, self.cfg, self.grid = live, use_ema, cfg, _grid_of(live.variable_mapper)
        self.variance, learns = cfg.flow.variance, cfg.learn_variance
        if self.variance not in VARIANCES or (self.variance == "learned_range" and not learns):
            raise ValueError(
                f"model: the variance of its flow must be one of {VARIANCES}, learned_range with learn_variance; got "
                f"{self.variance!r} with learn_variance={learns}"
            )
        self.concat_mask = bool(getattr(live.tokenizer.cfg, "concat_mask", False))
        self.takes_label = bool(cfg.conditioning.label)
        if self.takes_label and type(live.tokenizer).__name__ == "UNetTokenizer":
            raise ValueError("model: its tokenizer of a UNet fails for labels (B,), in spatialreasoners 1.0.5")
        if getattr(live.variable_mapper, "autoencoder", None) is None:
            self.value_range = (-1.0, 1.0)  # of its data sets of images

    def forward(
        self, patches: Tensor, times: Tensor, active: ActivePatches | None = None, *, condition: Tensor | None = None
    ) -> Prediction:
        if self.takes_label != (condition is not None):
            wanted = "int64 labels (B,)" if self.takes_label else "None, as the model takes no labels"
            raise ValueError(f"condition must be {wanted}, got {checks.described(condition)}")
        num_patches = patches.shape[1]
        if active is None:
            unknown = torch.ones_like(times)
        else:
            unknown = active.scatter(active.occupied.to(times.dtype), num_patches)
            times = active.scatter(times, num_patches)
        options: dict[str, Any] = {"label": condition}
        if self.concat_mask:
            options |= {"mask": unknown, "x_masked": patches * (1 - unknown)[..., None]}
        out = self.model(z_t=patches[:, None], t=times[:, None], sample=True, use_ema=self.use_ema, **options)
        mean: Tensor = out.mean_theta[:, 0]
        mix, sigma = (None if each is None else each[:, 0] for each in (out.variance_theta, out.sigma_theta))
        if self.variance != "learned_range":
            mix = torch.ones_like(mean) if self.variance == "fixed_large" else None
        made = Prediction(mean, mix, None if sigma is None else 2 * sigma.log())
        return made if active is None else made.at(active)


def _grid_of(mapper: Any) -> PatchGrid:
    """Return the grid of a variable mapper of images; refuse one that divides samples otherwise."""
    size, sides = getattr(mapper.cfg, "variable_patch_size", None), getattr(mapper, "grid_shape", None)
    if size is None or sides is None or len(sides) != 2 or mapper.num_features % size**2:
        raise ValueError(f"model: its variable mapper must be one of images, got {type(mapper).__name__}")
    grid = PatchGrid(mapper.num_features // size**2, sides[0] * size, sides[1] * size, size)
    numbers = torch.arange(grid.num_patches * grid.patch_numel, dtype=torch.float32, device="cpu")
    x = numbers.view(1, *grid.sample_shape)
    if not torch.equal(mapper.unstructured_tensor_to_variables(x), grid.to_patches(x)):
        raise ValueError(f"model: its variable mapper must divide images row by row, got {type(mapper).__name__}")
    return grid


def _flow_of(model: Any) -> tuple[flows.Flow, float, float]:
    """Return the flow of a model, and the scale and the shift of the times that it is called with."""
    name = type(model.flow).__name__
    if name == "Diffusion":  # a time in [k, k + 1) / T has index k
        number = len(model.flow.alphas_bar)
        return flows.DiscreteFlow(model.flow.alphas_bar, whole=True), 1 / number, 0.5 / number
    if name not in FLOWS:
        raise ValueError(f"model: its flow must be one of Diffusion, {', '.join(FLOWS)}, got {name}")
    return FLOWS[name](model.flow.cfg), 1.0, 0.0
