"""Models of spatialreasoners on the engine, against the library's own sampler with the same noise."""

import pytest
import torch

from ipr_fast import ActivePatches, Schedule, check_model, generate_batch, load_model, random_patches, refine_batch
from ipr_fast.kernels import philox
from ipr_fast.models import Guided
from ipr_fast.models.adapters.spatialreasoners import SpatialReasonersDenoiser
from ipr_fast.sampling import flow as rectified

library = pytest.importorskip("baselines.spatialreasoners_models")

BATCH = 3
# Both take the same steps in another order of operations: some ten roundings a step of values below 32, as a random
# network's samples are, which ten steps of a smooth network carry on.
CLOSE = {"atol": 10 * 10 * 32 * 2**-24 * 2, "rtol": 1e-5}


def normals(grid, stream, step):
    """The engine's random numbers of an initial generation with seed 5, (BATCH, N, P)."""
    patches = torch.arange(grid.num_patches).repeat(BATCH, 1)
    return philox.patch_normals(5, stream, step, 0, torch.arange(BATCH), patches, grid.patch_numel)


def both(model, schedule, eta, *, known=None, label=None, **options):
    """Samples (B, N, P) of the engine and of the library."""
    denoiser = SpatialReasonersDenoiser(model, **options)
    grid, generator = denoiser.grid, torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, *grid.sample_shape, generator=generator)
    given = {} if known is None else {"known": known, "known_values": x}
    ours = generate_batch(BATCH, model=denoiser, schedule=schedule, stochasticity=eta, seed=5, condition=label, **given)
    unknown = grid.num_patches if known is None else int((~known[0]).sum())
    theirs = library.sample(
        model,
        normals(grid, philox.STREAM_INITIAL, 0),
        lambda step: normals(grid, philox.STREAM_POSTERIOR, step),
        steps=schedule.steps(unknown),
        overlap=schedule.overlap,
        group=schedule.group,
        eta=eta,
        mask=None if known is None else (~known).float(),
        x=grid.to_patches(x),
        label=label,
    )
    return grid.to_patches(ours), theirs


@pytest.mark.parametrize("kind", ["unet", "dit", "lightningdit"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("schedule", [Schedule(3, 0.5), Schedule(2, 0.0, group=4)], ids=str)
def test_samples_are_those_of_the_librarys_sampler(kind, eta, schedule):
    ours, theirs = both(library.denoising_model(kind), schedule, eta)
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_with_known_patches(kind):
    known = torch.zeros(BATCH, 16, dtype=torch.bool)
    known[0, :6], known[1, 4:10], known[2, ::3] = True, True, True  # six each, so that all have as many steps
    ours, theirs = both(library.denoising_model(kind), Schedule(3, 0.5), 0.5, known=known)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_each_variance(variance):
    model = library.denoising_model("dit", flow=library.flows.RectifiedFlowCfg(variance=variance))
    torch.testing.assert_close(*both(model, Schedule(3, 0.5), 0.5), **CLOSE)


def test_masks_and_scaled_embeddings():
    of_embedding = {"scale": 200, "shift": 3, "act": "gelu"}
    model = library.denoising_model("unet", concat_mask=True, embedding_of=of_embedding)
    known = torch.zeros(BATCH, 16, dtype=torch.bool)
    known[:, 5:9] = True
    torch.testing.assert_close(*both(model, Schedule(2, 0.5), 0.5, known=known), **CLOSE)


def test_labels():
    model, label = library.denoising_model("dit", num_classes=4), torch.tensor([0, 3, 1])
    torch.testing.assert_close(*both(model, Schedule(2, 0.5), 0.5, label=label), **CLOSE)
    denoiser = Guided(SpatialReasonersDenoiser(model), 2.0, torch.tensor(4))
    generate_batch(BATCH, model=denoiser, schedule=Schedule(1, 1.0), condition=label)
    with pytest.raises(ValueError, match=r"condition must be int64 labels \(B,\), got None"):
        generate_batch(BATCH, model=SpatialReasonersDenoiser(model), schedule=Schedule(1, 1.0))


FLOWS = {
    "cosine": (library.flows.CosineFlowCfg, "ut", 1.0),
    "cosine, v": (library.flows.CosineFlowCfg, "v", 0.95),  # its sampler divides by a
    "cosine, eps": (library.flows.CosineFlowCfg, "eps", 0.9),
    "log-SNR": (library.flows.ContinuousCosineLogSNRFlowCfg, "eps", 0.9),
    "diffusion": (library.flows.DiffusionCfg, "v", 0.9),
}


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_one_step_is_that_of_the_librarys_flow(name, eta, variance):
    """From its times to earlier ones, all patches at other ones, in its own units: a + b times the engine's."""
    make, parameterization, last = FLOWS[name]
    if name == "diffusion" and (eta < 1 or variance != "fixed_large"):
        pytest.skip("its small bound is never below that of its first step, whatever eta: the library's own to do")
    slow = {"scale": 10, "shift": 0}  # times are those of levels, to a rounding, which 1000 would make visible
    model = library.denoising_model(
        "dit", flow=make(variance=variance), parameterization=parameterization, embedding_of=slow
    )
    generator = torch.Generator().manual_seed(2)
    z, xi = torch.randn(2, BATCH, 16, 12, generator=generator)
    now = torch.linspace(0.1, last, 16).repeat(BATCH, 1)
    then = now * torch.rand(BATCH, 16, generator=generator)
    if name == "diffusion":
        now, then = (((1000 * each).floor() + 0.5) / 1000 for each in (now, then))
    made = model(z_t=z[:, None], t=now[:, None], sample=True)
    adjusted = [model.flow.adjust_time(each)[:, None, :, None].expand(-1, 1, -1, 12).clone() for each in (now, then)]
    law = model.flow.conditional_p(made.mean_theta, z[:, None], *adjusted, eta, v_theta=made.variance_theta)
    theirs = law.sample(xi[:, None])[:, 0]

    denoiser = SpatialReasonersDenoiser(model, max_level=0.9999 if parameterization == "eps" else None)
    (a, b), (a_then, b_then) = ((model.flow.a(each)[:, 0, :, :1], model.flow.b(each)[:, 0, :, :1]) for each in adjusted)
    t, s = b / (a + b), b_then / (a_then + b_then)
    prediction = denoiser(z / (a + b), t.squeeze(-1))
    ours = rectified.posterior_step(
        z / (a + b),
        prediction.velocity,
        prediction.variance_mix,
        t,
        s,
        xi,
        eta=eta,
        preserving=denoiser.preserves_variance,
    )
    # Near noise the factors 1 / a of both are up to 1 / cos(0.9 pi / 2) = 6.4, or 13 for the others, in ten roundings.
    torch.testing.assert_close((a_then + b_then) * ours, theirs, atol=2e-4, rtol=1e-4)


def test_the_engine_asks_for_what_it_needs_and_prediction_order_is_the_librarys():
    denoiser = SpatialReasonersDenoiser(library.denoising_model("unet"))
    check_model(denoiser)
    mask = torch.rand(BATCH, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    active = ActivePatches.from_mask(mask, int(mask.sum(1).max()))
    z, levels = torch.randn(BATCH, 16, 12), torch.rand(active.index.shape) * active.occupied
    found, whole = denoiser(z, levels, active), denoiser(z, active.scatter(levels, 16)).at(active)
    for one, other in zip(found, whole, strict=True):
        assert torch.equal(one[active.occupied], other[active.occupied])


def test_refinement_and_reference():
    denoiser = SpatialReasonersDenoiser(library.denoising_model("dit", uncertainty=False, variance=False))
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"model": denoiser, "schedule": Schedule(2, 0.5)}
    runs = [refine_batch(x, random_patches(0.25), 2, backend=backend, **options) for backend in ("torch", "reference")]
    torch.testing.assert_close(*runs, **CLOSE)


@pytest.mark.parametrize("prefix", ["", "denoising_model."])
@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("taken", [0, 3, None])
def test_checkpoints(kind, prefix, taken, tmp_path):
    """The moving average, where one was taken; into a model with one and into one without."""
    weights, average = library.denoising_model(kind, seed=1), library.denoising_model(kind, seed=2)
    state = {f"{prefix}denoiser.{name}": tensor for name, tensor in weights.denoiser.state_dict().items()}
    if taken is not None:
        state[f"{prefix}ema_denoiser.n_averaged"] = torch.tensor(taken)
        named = average.denoiser.state_dict().items()
        state |= {f"{prefix}ema_denoiser.module.{name}": tensor for name, tensor in named}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    z, levels = torch.randn(2, 16, 12), torch.rand(2, 16)
    expected = SpatialReasonersDenoiser(average if taken else weights)(z, levels)
    for ema in (False, True):
        found = SpatialReasonersDenoiser.load(tmp_path / "last.ckpt", library.denoising_model(kind, ema=ema))
        assert torch.equal(found(z, levels).velocity, expected.velocity)


def test_a_checkpoint_of_another_network_names_the_weight(tmp_path):
    state = library.denoising_model("dit").denoiser.state_dict()
    torch.save({f"denoiser.{name}": tensor for name, tensor in state.items()}, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=r"dit\.pt: (no|unexpected) weight 'denoiser\."):
        SpatialReasonersDenoiser.load(tmp_path / "dit.pt", library.denoising_model("lightningdit"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameterization": "eps", "flow": library.flows.CosineFlowCfg()}, "max_level must be given"),
        ({"kind": "unet", "num_classes": 4}, "its tokenizer of a UNet fails for labels"),
        ({"variance": False, "flow": library.flows.RectifiedFlowCfg(variance="learned_range")}, "learned_range with"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        SpatialReasonersDenoiser(library.denoising_model(**{"kind": "dit"} | settings))


def test_another_model_is_named():
    with pytest.raises(ValueError, match="model must be a DenoisingModel of spatialreasoners, got Linear"):
        SpatialReasonersDenoiser(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("scale", [1000, 10])
def test_a_checkpoint_of_its_unet_as_an_srm_unet(scale, tmp_path):
    """Without the library: samples at eta 0.5 are those of the library's sampler."""
    model = library.denoising_model("unet", embedding_of={"scale": scale})
    torch.save({f"denoiser.{name}": tensor for name, tensor in model.denoiser.state_dict().items()}, tmp_path / "x.pt")
    sizes = {"image_size": 8, "patch_size": 2, "num_head_channels": 16, "level_scale": scale, "level_shift": -1}
    facts = {"activation": "silu", "max_period": 10_000, "parameterization": "ut", "flow": "rectified"}
    loaded = load_model(tmp_path / "x.pt", config=sizes | facts | {"variance": "learned_range"})
    _, theirs = both(model, Schedule(3, 0.5), 0.5)
    ours = generate_batch(BATCH, model=loaded, schedule=Schedule(3, 0.5), stochasticity=0.5, seed=5)
    torch.testing.assert_close(loaded.grid.to_patches(ours), theirs, **CLOSE)


def test_load_model_names_the_adapter_for_a_transformer(tmp_path):
    state = library.denoising_model("dit").denoiser.state_dict()
    torch.save({f"denoising_model.denoiser.{name}": tensor for name, tensor in state.items()}, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=r"weights of a transformer \(DiT\).*SpatialReasonersDenoiser\.load"):
        load_model(tmp_path / "dit.pt")
