"""refine_batch and generate_batch as their users know them."""

from functools import partial

import pytest
import torch
from small_token_models import Lookup

import ipr_fast
from ipr_fast import PatchGrid, Prediction, Schedule, TokenSchedule, all_patches, fixed_patches, random_patches
from ipr_fast.kernels import philox
from ipr_fast.models.contract import NotFiniteWarning


class Fading:
    """Predicts that every patch is 0."""

    def __init__(self, grid):
        self.grid = grid

    def __call__(self, patches, levels, active=None):
        z = patches if active is None else active.gather(patches)
        return Prediction(z / levels.clamp_min(0.01)[..., None])


def overwrite(theirs, iteration, x):
    theirs.fill_(1)


def refine(model, x, mask_fn=None, iters=3, **options):
    return ipr_fast.refine_batch(x, mask_fn or random_patches(), iters, model=model, **options)


def test_known_values_with_a_gradient_leave_none_in_the_result(model, finished, ragged_known):
    values = finished.clone().requires_grad_(True)
    x = ipr_fast.generate_batch(12, model=model, known=ragged_known, known_values=values)
    assert not x.requires_grad


def test_the_input_is_left_alone_and_the_output_is_like_it(model, finished):
    before = finished.clone()
    out = refine(model, finished)
    assert torch.equal(finished, before)
    assert (out.shape, out.dtype, out.device) == (finished.shape, finished.dtype, finished.device)
    assert not out.requires_grad
    assert not torch.equal(out, finished)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_callback_may_write_to_the_callers_samples(backend, finished):
    """Tokens, and patches that are views of the samples."""
    single = PatchGrid.of((1, 16), 1)
    tokens, numbers = finished[:, 0, 0].mul(20).long().remainder(5)[:, :11], finished[:, 0, :1].clone()
    for model, x, schedule in ((Lookup(), tokens, TokenSchedule(2)), (Fading(single), numbers, Schedule(2))):
        options = {"model": model, "schedule": schedule, "backend": backend}
        expected = ipr_fast.refine_batch(x, random_patches(), 3, **options)
        found = ipr_fast.refine_batch(x, random_patches(), 3, callback=partial(overwrite, x), **options)
        assert torch.equal(found, expected)
        known, values = torch.arange(x[0].numel()).expand(12, -1) % 2 == 0, expected.clone()
        options |= {"known": known, "known_values": values}
        expected = ipr_fast.generate_batch(12, **options)
        found = ipr_fast.generate_batch(12, callback=partial(overwrite, values), **options)
        assert torch.equal(found, expected)


def test_known_values_may_be_anything_in_patches_that_are_not_known(model, finished, ragged_known):
    values = torch.where(ragged_known[..., None], model.grid.to_patches(finished), torch.nan)
    runs = [
        ipr_fast.generate_batch(12, model=model, known=ragged_known, known_values=each, backend=backend)
        for each in (finished, model.grid.to_images(values))
        for backend in ("torch", "reference")
    ]
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[1], runs[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unselected_patches_keep_their_bits_in_every_dtype(model, finished, dtype):
    x = (finished.double() + 1e-9).to(dtype)  # in float64 not representable in float32
    out = refine(model, x, fixed_patches([1, 6, 9]))
    assert out.dtype == dtype
    kept = [n for n in range(16) if n not in (1, 6, 9)]
    was, now = model.grid.to_patches(x), model.grid.to_patches(out)
    assert torch.equal(now[:, kept], was[:, kept])
    assert (now[:, [1, 6, 9]] != was[:, [1, 6, 9]]).any(-1).all()


def test_known_patches_are_never_written_whatever_the_mask_says(model, finished, ragged_known):
    everything = torch.ones(12, 16, dtype=torch.bool)
    for mask_fn in (all_patches(), random_patches(0.9), lambda x, i: everything):
        out = refine(model, finished, mask_fn, known=ragged_known)
        was, now = model.grid.to_patches(finished), model.grid.to_patches(out)
        assert torch.equal(now[ragged_known], was[ragged_known])
        assert (now != was).any(-1)[~ragged_known].any()


def test_each_iteration_changes_the_chosen_patches_only(model, finished):
    seen, masks = [finished], []

    def mask_fn(x, iteration):
        generator = torch.Generator().manual_seed(iteration)
        masks.append(torch.rand(12, 4, 4, generator=generator) < 0.3)
        return masks[-1]

    refine(model, finished, mask_fn, iters=4, callback=lambda i, x: seen.append(x))
    for mask, before, after in zip(masks, seen[:-1], seen[1:], strict=True):
        changed = (model.grid.to_patches(before) != model.grid.to_patches(after)).any(-1)
        assert torch.equal(changed, mask.reshape(12, 16))


def test_generated_samples_hold_the_known_values(model, finished, ragged_known):
    x = ipr_fast.generate_batch(12, model=model, known=ragged_known.reshape(12, 4, 4), known_values=finished)
    assert x.shape == finished.shape
    assert x.dtype == torch.float32
    was, now = model.grid.to_patches(finished), model.grid.to_patches(x)
    assert torch.equal(now[ragged_known], was[ragged_known])
    assert (now[~ragged_known] != was[~ragged_known]).any(-1).all()


def test_a_chain_does_not_depend_on_its_batch(model, generator):
    """Whole, in halves, permuted: the same masks and noise to the last bit, the same samples to rounding."""
    x = torch.randn(64, 1, 16, 16, generator=generator).clamp(-1, 1)
    known = torch.rand(64, 16, generator=generator) < 0.3
    ids = torch.arange(64) * 7 + 3
    order = torch.randperm(64, generator=generator)

    def run(rows):
        masks = []
        policy = random_patches().bind(model.grid, len(rows), x.device)

        def recorded(images, iteration):  # the policy's choice, seen from outside
            mask = policy.choose(~known[rows], seed=11, iteration=torch.tensor(iteration), chain_ids=ids[rows])
            masks.append(mask)
            return mask

        options = {"known": known[rows], "chain_ids": ids[rows], "seed": 11}
        return refine(model, x[rows], **options), refine(model, x[rows], recorded, **options), masks

    whole, whole_recorded, masks = run(torch.arange(64))
    halves = [run(torch.arange(32)), run(torch.arange(32, 64))]
    permuted, _, permuted_masks = run(order)
    assert torch.equal(torch.stack(masks), torch.cat([torch.stack(h[2]) for h in halves], dim=1))
    assert torch.equal(torch.stack(masks)[:, order], torch.stack(permuted_masks))
    torch.testing.assert_close(whole, torch.cat([h[0] for h in halves]), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole[order], permuted, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, whole_recorded, atol=1e-5, rtol=0)  # in buckets of another size


def test_two_calls_equal_one(model, finished):
    once = refine(model, finished, iters=6)
    twice = refine(model, refine(model, finished, iters=3), iters=3, first_iteration=4)
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=0)


def test_seeds_and_chain_ids_decide(model, finished):
    assert torch.equal(refine(model, finished, seed=4), refine(model, finished, seed=4))
    assert not torch.equal(refine(model, finished, seed=4), refine(model, finished, seed=5))
    twins = refine(model, finished[:1].repeat(2, 1, 1, 1), chain_ids=torch.tensor([9, 9]))
    torch.testing.assert_close(twins[0], twins[1], atol=1e-5, rtol=0)


def test_generation_and_refinement_share_no_counter(model, finished):
    """Iteration 0 is the generation; refining everything with the same seed must not repeat it."""
    x = ipr_fast.generate_batch(4, model=model, schedule=Schedule(10, 0.8))
    again = refine(model, x, all_patches(), iters=1, schedule=Schedule(10, 0.8))
    assert not torch.allclose(x, again, atol=0.1)


def test_nothing_to_do_is_legal(model, finished):
    assert torch.equal(refine(model, finished, iters=0), finished)
    assert refine(model, finished[:0]).shape == (0, 1, 16, 16)
    everything = torch.ones(12, 16, dtype=torch.bool)
    assert torch.equal(refine(model, finished, known=everything), finished)
    assert torch.equal(refine(model, finished, lambda x, i: ~everything), finished)
    assert ipr_fast.generate_batch(0, model=model).shape == (0, 1, 16, 16)
    kept = ipr_fast.generate_batch(12, model=model, known=everything, known_values=finished)
    assert torch.equal(kept, finished)


def test_a_chain_with_nothing_selected_keeps_its_values(model, finished):
    mask = torch.zeros(12, 16, dtype=torch.bool)
    mask[3, 5] = True
    out = refine(model, finished, lambda x, i: mask)
    changed = (out != finished).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [3]


def test_mask_fn_and_callback_get_numbers_images_and_their_own_copy(model, finished):
    calls = []

    def mask_fn(x, iteration):
        calls.append(("mask", iteration, x.shape))
        x.fill_(float("nan"))
        return torch.ones(12, 16, dtype=torch.bool)

    def callback(iteration, x):
        calls.append(("callback", iteration, x.shape))
        x.fill_(float("nan"))

    out = refine(model, finished, mask_fn, iters=2, first_iteration=25, callback=callback)
    shape = finished.shape
    assert calls == [(name, i, shape) for i in (25, 26) for name in ("mask", "callback")]
    assert out.isfinite().all()


def test_a_callback_freezes_chains_for_good(model, finished):
    seen = []

    def callback(iteration, x):
        seen.append(x.clone())
        frozen = torch.zeros(12, dtype=torch.bool)
        if iteration == 2:
            frozen[[0, 5]] = True
        return frozen

    out = refine(model, finished, iters=5, callback=callback)
    assert torch.equal(out[[0, 5]], seen[1][[0, 5]])
    assert (seen[4][1] != seen[1][1]).any()
    free = refine(model, finished, iters=5)
    rest = [b for b in range(12) if b not in (0, 5)]
    torch.testing.assert_close(out[rest], free[rest], atol=1e-5, rtol=0)  # the others do not notice


def test_a_call_ends_when_every_chain_is_frozen(model, finished):
    calls = []
    refine(model, finished, iters=50, callback=lambda i, x: (calls.append(i), torch.ones(12, dtype=torch.bool))[1])
    assert calls == [1]


def test_50_iterations_by_default(model, finished):
    seen = []
    options = {"model": model, "schedule": Schedule(1, 1.0), "callback": lambda i, x: seen.append(i)}
    ipr_fast.refine_batch(finished[:1], random_patches(), **options)
    assert seen == list(range(1, 51))


def test_non_contiguous_and_gradient_carrying_input(model, finished):
    strided = finished.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    out = refine(model, strided)
    assert not out.requires_grad
    assert torch.equal(out, refine(model, finished))


def test_the_bundled_model_is_found_by_its_sample_shape():
    x = ipr_fast.generate_batch(2, schedule=Schedule(1, 1.0))
    assert x.shape == (2, 1, 32, 32)
    assert ipr_fast.refine_batch(x, random_patches(), 1, schedule=Schedule(1, 1.0)).shape == x.shape
    with pytest.raises(ValueError, match=r"digit-sudoku-4x4 \(1, 32, 32\)"):
        ipr_fast.refine_batch(torch.zeros(1, 3, 16, 16), random_patches())


def test_a_model_that_gives_nan_is_told(model, finished):
    class Broken:
        grid = model.grid

        def __call__(self, patches, levels, active=None):
            return ipr_fast.Prediction(torch.full((*levels.shape, 16), torch.nan))

    with pytest.warns(NotFiniteWarning, match="12 of 12 samples have NaN or inf"):
        refine(Broken(), finished, iters=1)
    with pytest.warns(RuntimeWarning, match="2 of 2 samples have NaN or inf"):
        ipr_fast.generate_batch(2, model=Broken())


def test_half_precision_models_run(finished):
    for dtype in (torch.bfloat16, torch.float16):
        half = ipr_fast.load_model("digit-sudoku-4x4", dtype=dtype)
        x = ipr_fast.generate_batch(2, model=half, schedule=Schedule(2, 0.9))
        assert x.dtype == torch.float32
        assert refine(half, x, iters=1).isfinite().all()


def test_progress_bars_go_to_stderr(model, finished, capsys):
    refine(model, finished, iters=2, progress=True)
    ipr_fast.generate_batch(2, model=model, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "refine" in captured.err
    assert "2.0/2" in captured.err
    assert "48/48" in captured.err


def test_the_bar_moves_within_an_iteration(model, finished, monkeypatch):
    seen = []
    monkeypatch.setattr("ipr_fast.engine.progress.tqdm.update", lambda bar, share: seen.append(share))
    refine(model, finished, iters=2, progress=True, max_chains=5)
    steps = 3 * Schedule(10, 0.8).steps(4)  # three waves, of four patches a chain
    assert len(seen) == 2 * steps
    assert sum(seen) == pytest.approx(2)


def test_no_counter_is_used_twice_in_a_run(model, monkeypatch):
    """Generation, refinement, and the same refinement's continuation: every number of a run is drawn once."""
    drawn, philox_4x32 = [], philox.philox_4x32

    def record(c0, c1, c2, c3, seed):
        words = torch.broadcast_tensors(*(torch.as_tensor(c) & 0xFFFFFFFF for c in (c0, c1, c2, c3)))
        drawn.append(torch.stack([word.flatten() for word in words], dim=1))
        return philox_4x32(c0, c1, c2, c3, seed)

    monkeypatch.setattr(philox, "philox_4x32", record)
    options = {"model": model, "schedule": Schedule(3, 0.5), "seed": 4}
    x = ipr_fast.generate_batch(5, **options)
    x = ipr_fast.refine_batch(x, random_patches(0.25), 3, **options)
    ipr_fast.refine_batch(x, random_patches(0.5), 2, first_iteration=4, **options)
    counters = torch.cat(drawn)
    assert len(counters.unique(dim=0)) == len(counters) > 5 * 16 * 4 * 20


def test_a_models_own_schedule_may_be_none_and_is_named_if_it_is_no_schedule(model, finished, monkeypatch):
    refined = ipr_fast.refine_batch(finished, random_patches(), 1, model=model, schedule=Schedule(10, 0.8))
    monkeypatch.setattr(model, "refine_schedule", None)
    assert torch.equal(ipr_fast.refine_batch(finished, random_patches(), 1, model=model), refined)
    monkeypatch.setattr(model, "refine_schedule", (3, 0.0))
    with pytest.raises(ValueError, match=r"^model: refine_schedule must be an ipr_fast\.Schedule, got tuple"):
        ipr_fast.refine_batch(finished, random_patches(), 1, model=model)


def test_progress_is_a_bool(model, finished):
    with pytest.raises(ValueError, match=r"^progress must be a bool, got 'no'"):
        ipr_fast.refine_batch(finished, random_patches(), 1, model=model, progress="no")
