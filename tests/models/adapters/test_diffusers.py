"""A Diffusion Forcing transformer of diffusers as a Denoiser: the same samples as the library's own pipeline makes."""

import pytest
import torch

import ipr_fast
from ipr_fast import Schedule, check_model, generate_batch
from ipr_fast.models import DiffusersDenoiser, Guided

pytest.importorskip("diffusers", reason="needs the extra diffusers", exc_type=ImportError)

import baselines.diffusers_pipeline as library
from baselines.diffusers_pipeline import Euler
from diffusers_sampler import initial_noise

FRAMES, SIDE, TEXT = 6, 4, (3, 16)  # latent frames, their height and width; tokens of a prompt and their width
STEPS = 4  # 1000 t is then an integer, to which the pipeline rounds


def network(**options):
    return library.network(2, 2, 4, TEXT[1], width=12, **options)


def pipeline_samples(model, noise, prompts, negative, scale):
    return library.pipeline_samples(model, noise, prompts, negative, scale, STEPS)


def denoiser(**options):
    return DiffusersDenoiser(network(**options), FRAMES, SIDE, SIDE)


@pytest.fixture
def prompts(generator):
    return torch.randn(4, *TEXT, generator=generator)


@pytest.mark.parametrize("told", [False, True])
def test_it_keeps_the_contract(told, prompts):
    check_model(denoiser(inject_sample_info=told), condition=prompts)
    check_model(
        DiffusersDenoiser(network(), 6, SIDE, SIDE, frames_per_patch=3), condition={"encoder_hidden_states": prompts}
    )


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("causal", [1, 3])
def test_samples_are_those_of_the_librarys_pipeline(scale, causal, prompts):
    model, negative = denoiser(num_frame_per_block=causal), torch.zeros(TEXT)
    expected = pipeline_samples(model.model, initial_noise(model, 4, seed=3), prompts, negative.expand(4, *TEXT), scale)
    guided = model if scale == 1 else Guided(model, scale, negative)
    options = {"model": guided, "condition": prompts, "schedule": Schedule(STEPS, 1.0), "stochasticity": 0.0, "seed": 3}
    for more in ({}, {"max_chains": 3}, {"backend": "reference"}):
        found = generate_batch(4, **options, **more)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (expected - initial_noise(model, 4, seed=3)).abs().max() > 0.1


def test_staggered_frames_and_a_given_beginning_are_those_of_the_librarys_scheduler(prompts, generator):
    """Two given frames and four that start one step after another, as the library's asynchronous mode has them."""
    model, given = denoiser(), torch.randn(4, 4, FRAMES, SIDE, SIDE, generator=generator)
    known = torch.arange(FRAMES) < 2
    z = torch.where(known[:, None, None], given, initial_noise(model, 4, seed=3))
    started = torch.full((FRAMES,), 0).masked_fill(known, STEPS)  # steps that a frame has taken
    for step in range(STEPS + 3):
        times = 1000 * (1 - started / STEPS)
        with torch.no_grad():
            velocity = model.model(z, times.expand(4, -1), prompts, enable_diffusion_forcing=True, return_dict=False)[0]
        for frame in range(2, FRAMES):
            if frame - 2 <= step < frame - 2 + STEPS:
                scheduler = Euler()
                scheduler.set_timesteps(STEPS)
                z[:, :, frame] = scheduler.step(velocity[:, :, frame], times[frame], z[:, :, frame], return_dict=False)[
                    0
                ]
                started[frame] += 1
    options = {"condition": prompts, "schedule": Schedule(STEPS, 1 - 1 / STEPS), "stochasticity": 0.0, "seed": 3}
    found = generate_batch(4, model=model, known=known.expand(4, -1), known_values=given, **options)
    assert torch.equal(found[:, :, :2], given[:, :, :2])
    assert (found - z).abs().max() < 1e-4 * z.abs().max()


def test_each_video_keeps_its_prompt(prompts):
    options = {"model": denoiser(), "schedule": Schedule(2, 0.5), "seed": 1}
    x = generate_batch(4, condition=prompts, **options)
    policy = ipr_fast.random_patches(0.5)
    found = ipr_fast.refine_batch(x, policy, 2, condition=prompts, max_chains=3, **options)
    for chain in range(4):
        rows = {"condition": prompts[chain : chain + 1], "chain_ids": torch.tensor([chain])}
        alone = ipr_fast.refine_batch(x[chain : chain + 1], policy, 2, **rows, **options)
        assert (alone - found[chain]).abs().max() < 1e-4 * found.abs().max()


def test_half_precision_computes_in_its_own_type(prompts):
    model = DiffusersDenoiser(network().bfloat16(), FRAMES, SIDE, SIDE)
    x = generate_batch(4, model=model, condition=prompts, schedule=Schedule(STEPS, 1.0))
    assert x.dtype == torch.float32
    assert not torch.equal(x, x.bfloat16().float())


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"model must be an nn.Module whose `config` has"):
        DiffusersDenoiser(torch.nn.Linear(1, 1), 4, 4, 4)
    with pytest.raises(ValueError, match="model must predict as many channels as it takes, got 8 and 4"):
        DiffusersDenoiser(network(in_channels=8), FRAMES, SIDE, SIDE)
    with pytest.raises(ValueError, match="width must be a multiple of the model's patch size 2, got 5"):
        DiffusersDenoiser(network(), FRAMES, 4, 5)
    with pytest.raises(ValueError, match=r"frames_per_patch must divide the 6 frames .* the model's 1, got 4"):
        DiffusersDenoiser(network(), FRAMES, 4, 4, frames_per_patch=4)
    with pytest.raises(ValueError, match="condition must be given: DiffusersDenoiser needs one"):
        generate_batch(1, model=denoiser())
    with pytest.raises(ValueError, match="condition must be a tensor, or a dict of the model's inputs with"):
        generate_batch(1, model=denoiser(), condition={"timestep": torch.zeros(1, FRAMES)})
