"""The engine equals the reference, whatever the model, schedule, clues, masks, waves, frozen chains and dtypes are."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import randomise
from torch import nn

import ipr_fast
from ipr_fast import PatchGrid, Prediction, Schedule, all_patches, fixed_patches, random_patches
from ipr_fast.models import PatchTransformer, PatchTransformerConfig, SRMUNet, SRMUNetConfig

EXAMPLES = 400
GRID = PatchGrid(1, 6, 6, 2)  # 9 patches of 4 numbers
TRANSFORMER = PatchTransformerConfig(1, 6, 2, width=8, depth=1, num_heads=2, box_size=3, level_features=8)
UNET = SRMUNetConfig(1, 6, 2, (32,), (False,), 1, 32, 32, 16)


class Plain(nn.Module):
    """A denoiser of two layers, without `prepare` and `tabulate`; with a variance mix or without."""

    def __init__(self, has_mix: bool) -> None:
        super().__init__()
        self.grid = GRID
        self.layer, self.out = nn.Linear(5, 16), nn.Linear(16, 8 if has_mix else 4)

    def forward(self, patches, levels, active=None):
        levels = levels if active is None else active.scatter(levels, GRID.num_patches)
        hidden = self.layer(torch.cat([patches, levels[..., None]], dim=-1)).tanh()
        hidden = hidden + hidden.mean(1, keepdim=True)
        velocity, *mix = self.out(hidden).split(4, dim=-1)
        prediction = Prediction(velocity, mix[0].sigmoid() if mix else None)
        return prediction if active is None else prediction.at(active)


class Ordered(nn.Module):
    """A model with log-variances from a table by patch, with ties.

    A learned log-variance differs by rounding from one batch to another. Two patches that differ by less would start in
    another order, and samples would part there, as they may.
    """

    table = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, float("nan"), 9.0, 2.0, 3.0])
    mix_bounds = (-10.0, 10.0)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.grid = model, model.grid
        for name in ("prepare", "tabulate"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))

    def forward(self, patches, levels, active=None, **prepared):
        prediction = self.model(patches, levels, active, **prepared)
        of_all = self.table.expand(len(patches), -1)
        return prediction._replace(log_variance=of_all if active is None else active.gather(of_all))


def make_models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    transformer = randomise(PatchTransformer(TRANSFORMER), seed=1)
    pixels = randomise(PatchTransformer(dataclasses.replace(TRANSFORMER, pixel_width=3)), seed=2)
    clean = randomise(PatchTransformer(dataclasses.replace(TRANSFORMER, output="clean")), seed=3)
    unet = SRMUNet(UNET).eval().requires_grad_(False)
    plain, without_mix = Plain(True).eval(), Plain(False).eval()
    models = {"transformer": transformer, "pixels": pixels, "clean": clean, "unet": unet, "plain": plain}
    return (
        models
        | {"without mix": without_mix}
        | {
            f"{name}, ordered": Ordered(model)
            for name, model in (("transformer", transformer), ("pixels", pixels), ("plain", plain))
        }
    )


MODELS = make_models()
# The networks whose log-variance is their own have no order to choose: every patch starts at once.
PARALLEL = ("transformer", "pixels", "clean", "unet")


@dataclasses.dataclass
class Case:
    """One random setting; everything random in it comes from `seed`."""

    model: str
    steps_per_patch: int
    overlap: float
    shift: float
    group: int
    batch: int
    iters: int
    first_iteration: int
    seed: int
    clues: str
    mask: str
    ratio: float
    max_chains: int | str
    freezes: bool
    dtype: torch.dtype
    stochasticity: float
    temperature: float
    noise: str

    def schedule(self) -> Schedule:
        return Schedule(self.steps_per_patch, 1.0 if self.model in PARALLEL else self.overlap, self.shift, self.group)

    def generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + stream)

    def x(self) -> torch.Tensor:
        x = torch.randn(self.batch, *GRID.sample_shape, generator=self.generator(0))
        return x.clamp(-1, 1).to(self.dtype)

    def known(self) -> torch.Tensor | None:
        if self.clues == "none":
            return None
        share = {"few": 0.2, "many": 0.8, "all of one": 0.4}[self.clues]
        known = torch.rand(self.batch, GRID.num_patches, generator=self.generator(1)) < share
        if self.clues == "all of one":
            known[0] = True
        return known

    def policy(self):
        generator = self.generator(2)
        if self.mask == "function":
            masks = torch.rand(self.iters, self.batch, GRID.num_patches, generator=generator) < self.ratio
            masks[:, 0] &= torch.rand(self.iters, 1, generator=generator) < 0.5  # sometimes nothing at all
            return lambda x, iteration: masks[iteration - self.first_iteration]
        if self.mask == "fixed":
            return fixed_patches(torch.rand(self.batch, GRID.num_patches, generator=generator) < self.ratio)
        return all_patches() if self.mask == "all" else random_patches(self.ratio, fixed=self.mask == "random, fixed")

    def frozen(self):
        if not self.freezes:
            return None
        frozen = torch.rand(self.iters, self.batch, generator=self.generator(3)) < 0.3
        return lambda iteration, x: frozen[iteration - self.first_iteration]

    def chain_ids(self) -> torch.Tensor:
        return torch.randint(0, 2**32, (self.batch,), generator=self.generator(4))


cases = st.builds(
    Case,
    model=st.sampled_from(sorted(MODELS)),
    steps_per_patch=st.integers(1, 3),
    overlap=st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.9, 1.0]),
    shift=st.sampled_from([1.0, 3.0, 0.4]),
    group=st.sampled_from([1, 1, 2, 5]),
    batch=st.integers(1, 3),
    iters=st.integers(1, 2),
    first_iteration=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    clues=st.sampled_from(["none", "few", "many", "all of one"]),
    mask=st.sampled_from(["random", "random, fixed", "function", "fixed", "all"]),
    ratio=st.sampled_from([0.1, 0.25, 0.5]),
    max_chains=st.sampled_from([1, 2, "auto"]),
    freezes=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    stochasticity=st.sampled_from([0.0, 0.5, 1.0]),
    temperature=st.sampled_from([0.0, 1.0]),
    noise=st.sampled_from(["random", "fixed"]),
)


def refine(case: Case, backend: str) -> torch.Tensor:
    return ipr_fast.refine_batch(
        case.x(),
        case.policy(),
        case.iters,
        model=MODELS[case.model],
        known=case.known(),
        schedule=case.schedule(),
        stochasticity=case.stochasticity,
        temperature=case.temperature,
        seed=case.seed,
        chain_ids=case.chain_ids(),
        first_iteration=case.first_iteration,
        callback=case.frozen(),
        noise=case.noise,
        max_chains=case.max_chains,
        backend=backend,
    )


@pytest.mark.filterwarnings("ignore:model. the variance mix:RuntimeWarning")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases)
def test_refinement(case):
    found, expected = refine(case, "torch"), refine(case, "reference")
    # Some hundred steps of float32 arithmetic, then one rounding to the dtype of x.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=max(1e-5, torch.finfo(case.dtype).eps))
    known = case.known()
    if known is not None:
        kept, given_patches = GRID.to_patches(found)[known], GRID.to_patches(case.x())[known]
        assert torch.equal(kept, given_patches)


@pytest.mark.filterwarnings("ignore:model. the variance mix:RuntimeWarning")
@settings(max_examples=EXAMPLES // 8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases)
def test_generation(case):
    known = case.known()
    options = {"known": known, "known_values": None if known is None else case.x().float()}
    found, expected = (
        ipr_fast.generate_batch(
            case.batch,
            model=MODELS[case.model],
            schedule=case.schedule(),
            stochasticity=case.stochasticity,
            temperature=case.temperature,
            seed=case.seed,
            chain_ids=case.chain_ids(),
            max_chains=case.max_chains,
            backend=backend,
            **options,
        )
        for backend in ("torch", "reference")
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


class ViewsOfItsInputs(torch.nn.Module):
    """A denoiser whose output shares the memory of what it was given."""

    grid = PatchGrid(1, 8, 8, 2)

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, patches, levels, active=None):
        slots = patches if active is None else active.gather(patches)
        view = levels[..., None].expand_as(slots)
        fields = {"velocity": 0.8 * slots, "variance_mix": 0.3 * view, "log_variance": slots.mean(2)}
        views = {"velocity": patches, "variance_mix": view, "log_variance": levels}
        return Prediction(**fields | {self.field: views[self.field]})


@pytest.mark.parametrize("field", Prediction._fields)
def test_a_prediction_may_be_a_view_of_the_inputs(field):
    """Of levels and patches, which the engine's step writes."""
    model, told = ViewsOfItsInputs(field), []

    def mask_fn(x, iteration, signals):
        told[-1].append(signals.uncertainty.clone())
        return torch.ones(len(x), 16, dtype=torch.bool)

    found = []
    for backend in ("torch", "reference"):
        told.append([])
        options = {"model": model, "schedule": Schedule(4, 0.5), "backend": backend}
        x = ipr_fast.generate_batch(3, **options)
        found.append(ipr_fast.refine_batch(x, mask_fn, 2, **options))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    torch.testing.assert_close(*(each[-1] for each in told), atol=1e-5, rtol=0)
