"""renoise, advance and denoise."""

import pytest
import torch

from ipr_fast import Schedule
from ipr_fast.kernels import advance as advance_file
from ipr_fast.kernels import denoise as denoise_file
from ipr_fast.kernels import renoise as renoise_file
from ipr_fast.kernels.launch import runs_kernel
from ipr_fast.kernels.philox import STREAM_INITIAL, STREAM_POSTERIOR, STREAM_RENOISE, seed_tensor
from ipr_fast.kernels.renoise import PatchChoice, Slots
from ipr_fast.kernels.rows import patch_rows, read_rows

NAN = float("nan")
# A normal is sqrt(-2 ln u) < 5.7 times a cosine of an angle that the twin rounds to 2**-22; and a few roundings more.
NOISE = 5.7 * 2**-22 + 8 * 5.7 * 2**-24


def test_the_kernels_run_here(device):
    for kernel in (renoise_file.renoise_kernel, advance_file.advance_kernel, denoise_file.denoise_kernel):
        assert runs_kernel(kernel, torch.zeros(1, device=device))


def counters(batch, device, generator):
    ids = torch.randint(0, 2**32, (batch,), generator=generator)
    return {
        "seed": seed_tensor(2**63 + 11, device),
        "iteration": torch.tensor(2**31 + 5, device=device),
        "chain_ids": ids.to(device),
    }


def make_slots(batch, slots, device):
    """Poisoned, so that what is not written shows."""
    integers = [
        torch.full(s, -99, dtype=torch.int32, device=device) for s in ((batch, slots), (batch,), (batch, slots))
    ]
    level, step = torch.full((batch, slots), NAN, device=device), torch.full((batch,), -99, device=device)
    return Slots(integers[0], integers[1], level, integers[2], step)


SHAPES = [(1, 1, 1), (5, 4, 16), (3, 81, 5), (2, 16, 192), (1, 256, 12), (1, 1024, 4), (1, 2, 1030), (4, 9, 64)]


@pytest.mark.parametrize(("batch", "num_patches", "numel"), [*SHAPES, (1, 4096, 1)])
@pytest.mark.parametrize("stream", [STREAM_INITIAL, STREAM_RENOISE])
@pytest.mark.parametrize("how", ["mask", "choice", "given"])
def test_renoise(batch, num_patches, numel, stream, how, device, generator):
    free = (torch.rand(batch, num_patches, generator=generator) < 0.6).to(device)
    free[0] = True
    free[-1:] = batch == 1  # a chain with nothing to do, beside others
    size = (free.sum(1) * 0.5).ceil().long()
    choice = PatchChoice(free, size, torch.tensor(7, device=device)) if how == "choice" else None
    noise = torch.randn(batch, num_patches, numel, generator=generator).to(device) if how == "given" else None
    patches = torch.randn(batch, num_patches, numel, generator=generator).to(device)
    options = counters(batch, device, generator)
    runs = []
    for operation in (renoise_file.renoise, twin_of_renoise):
        z, slots = patches.clone(), make_slots(batch, num_patches, device)
        mask = torch.zeros_like(free) if how == "choice" else free.clone()
        operation(z, mask, slots, stream=stream, choice=choice, noise=noise, **options)
        runs.append((z, mask, slots))
    (z, mask, slots), (expected, expected_mask, expected_slots) = runs
    assert torch.equal(mask, expected_mask)
    for found, wanted in zip(vars(slots).values(), vars(expected_slots).values(), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(z[~mask], patches[~mask])
    torch.testing.assert_close(z, expected, atol=0 if how == "given" else NOISE, rtol=0)


def twin_of_renoise(patches, mask, slots, *, seed, stream, iteration, chain_ids, choice, noise):
    renoise_file._renoise(patches, mask, slots, seed, stream, iteration, chain_ids, choice, noise)


@pytest.mark.parametrize(
    "schedule",
    [Schedule(3, 0.0), Schedule(10, 0.8), Schedule(4, 0.97), Schedule(5, 1.0), Schedule(7, 0.6, 3.0, 4)],
    ids=str,
)
@pytest.mark.parametrize("slots", [1, 5, 81, 256])
@pytest.mark.parametrize("uncertainty", ["float32", "bfloat16", "odd", None])
def test_advance(schedule, slots, uncertainty, device, generator):
    if uncertainty == "bfloat16" and device.type == "cpu":
        pytest.skip("Triton's interpreter reads bfloat16 as something else")
    counts = torch.tensor([slots, 0, 1, (slots + 1) // 2], dtype=torch.int32, device=device)
    tables, table = schedule.tables(slots).to(device)._asdict(), schedule.levels(slots).to(device)
    last = schedule.steps(slots)
    starts = [torch.full((4, slots), -1, dtype=torch.int32, device=device) for _ in range(2)]
    levels = [torch.ones(4, slots, device=device) for _ in range(2)]
    means = [torch.full((4, slots), 7.0, device=device) for _ in range(2)]
    for step in sorted({*range(min(last, 12)), last // 2, last - 2, last - 1} & set(range(last))):
        log_variance = torch.randn(4, slots, 3, generator=generator).to(device)[..., 1]  # a slice of an output
        if uncertainty == "odd":
            log_variance[:, ::3], log_variance[:, 1::3] = NAN, 0.25
            log_variance[2:] = float("inf")
        elif uncertainty is not None:
            log_variance = log_variance.to(getattr(torch, uncertainty))
        given, before = None if uncertainty is None else log_variance, levels[0].clone()
        previous = [torch.full((4, slots), NAN, device=device) for _ in range(2)]
        done = [torch.full((4,), step - 1, device=device) for _ in range(2)]
        rows = [torch.full((4, slots), -99, device=device) for _ in range(2)]
        at, mean = (
            {"count": counts, "step": done[0], "log_variance": given},
            means if given is not None else (None, None),
        )
        advance_file.advance(starts[0], levels[0], previous[0], **at, **tables, row=rows[0], levels=table, mean=mean[0])
        advance_file._advance(
            starts[1], levels[1], previous[1], counts, done[1], given, **tables, row=rows[1], levels=table, mean=mean[1]
        )
        torch.testing.assert_close(*means, rtol=2**-22, atol=2**-22, equal_nan=True)
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(starts[0], starts[1])
        assert torch.equal(levels[0], levels[1])
        assert torch.equal(previous[0], before)
        assert torch.equal(previous[1], before)
        assert (torch.stack(done) == step).all()


def test_advance_of_a_thousand_slots(device, generator):
    test_advance(Schedule(10, 0.8), 1024, "float32", device, generator)


@pytest.mark.parametrize(("batch", "num_patches", "numel"), SHAPES)
@pytest.mark.parametrize("mix", [True, False])
@pytest.mark.parametrize(("eta", "tau", "given"), [(0.5, 1.0, False), (1.0, 0.5, True), (0.0, 1.0, False)])
@pytest.mark.parametrize("of_slots", [True, False])
def test_denoise(batch, num_patches, numel, mix, eta, tau, given, of_slots, device, generator):
    """of_slots: with the logit of the mix, and the values of the slots."""
    slots = max(1, num_patches // 2)
    index = torch.rand(batch, num_patches, generator=generator).argsort(1)[:, :slots].sort(1).values.int().to(device)
    index[-1, slots // 2 :] = -1
    occupied = index >= 0
    level = (torch.randint(0, 11, (batch, slots), generator=generator) / 10).to(device) * occupied
    next_level = (level - torch.randint(0, 3, (batch, slots), generator=generator).to(device) / 10).clamp(min=0)
    # Slices of one output, as a model gives them.
    output = torch.randn(batch, slots, 2 * numel + 1, generator=generator).to(device)
    velocity, mixes, _ = output.split((numel, numel, 1), dim=-1)
    idle = level == next_level
    velocity[idle] = NAN
    patches = torch.randn(batch, num_patches, numel, generator=generator).to(device)
    noise = torch.randn(batch, num_patches, numel, generator=generator).to(device) if given else None
    options = counters(batch, device, generator)
    step = torch.full((batch,), 65_000, device=device)
    found, expected = patches.clone(), patches.clone()
    mixes, given_mixes = (mixes.sigmoid(), mixes if of_slots else mixes.sigmoid()) if mix else (None, None)
    values = read_rows(patches, patch_rows(index, num_patches)) if of_slots else None
    denoise_file.denoise(
        found,
        index=index,
        level=level,
        next_level=next_level,
        velocity=velocity,
        variance_mix=given_mixes,
        stochasticity=eta,
        temperature=tau,
        step=step,
        noise=noise,
        mix_is_logit=of_slots,
        slot_values=values,
        preserving=not of_slots,
        **options,
    )
    order = (options["seed"], STREAM_POSTERIOR, step[:, None], options["iteration"], options["chain_ids"])
    denoise_file._denoise(
        expected, index, level, next_level, velocity, mixes, eta, tau, order, noise, preserving=not of_slots
    )
    # Values below 8 and some thirty roundings, beside the noise.
    torch.testing.assert_close(found, expected, atol=30 * 8 * 2**-24 + NOISE, rtol=0)
    moving = torch.zeros(batch, num_patches, dtype=torch.bool, device=device)
    for b in range(batch):
        moving[b, index[b][~idle[b] & occupied[b]].long()] = True
    assert torch.equal(found[~moving], patches[~moving])
    if values is not None:
        assert torch.equal(values[occupied], read_rows(found, patch_rows(index, num_patches))[occupied])


@pytest.mark.parametrize(("batch", "slots"), [(0, 3), (2, 0)])
def test_nothing_to_do(batch, slots, device, generator):
    patches = torch.ones(batch, 4, 8, device=device)
    mask, state = torch.zeros(batch, 4, dtype=torch.bool, device=device), make_slots(batch, slots, device)
    options = counters(batch, device, generator)
    renoise_file.renoise(patches, mask, state, stream=1, **options)
    levels = torch.zeros(batch, slots, device=device)
    tables = Schedule(3).tables(4).to(device)._asdict()
    at = {"count": state.count.clamp(min=0), "step": state.step, "log_variance": None}
    advance_file.advance(state.start, levels, levels, **at, **tables)
    denoise_file.denoise(
        patches,
        index=state.index,
        level=levels,
        next_level=levels,
        velocity=torch.zeros(batch, slots, 8, device=device),
        variance_mix=None,
        stochasticity=0.5,
        temperature=1.0,
        step=state.step,
        **options,
    )
    assert (patches == 1).all()


def test_what_is_not_contiguous_is_refused(device, generator):
    patches = torch.ones(2, 8, 4, device=device).transpose(1, 2)
    mask, options = torch.ones(2, 4, dtype=torch.bool, device=device), counters(2, device, generator)
    with pytest.raises(ValueError, match=r"patches must be contiguous, got strides \(32, 1, 4\) of shape \(2, 4, 8\)"):
        renoise_file.renoise(patches, mask, make_slots(2, 4, device), stream=1, **options)
