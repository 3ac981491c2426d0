"""Signals: what the model told of each patch or token, for mask_fns and policies, the same for every backend."""

import pytest
import torch
from small_token_models import Lookup

from ipr_fast import (
    MaskPolicy,
    Metropolis,
    PatchGrid,
    Prediction,
    Schedule,
    Signals,
    TokenSchedule,
    random_patches,
    refine_batch,
    uncertain_patches,
    violating_patches,
)
from ipr_fast.sampling.policies import num_chosen
from ipr_fast.sampling.tokens import TokenPositions
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.token_sudoku import TokenSudoku

COLUMN = torch.eye(4, dtype=torch.bool)[:, None].expand(4, 4, 4)  # which patches are in column c of 4x4
CPU = torch.device("cpu")


@pytest.fixture(params=["torch", "graphs"])
def backend(request):
    """The engine without graphs, and with a tape in their place."""
    if request.param == "graphs":
        request.getfixturevalue("tape")
        return "auto"
    return "torch"


class Recording:
    """Records the levels and the log-variances (B, N) of each call."""

    def __init__(self, model):
        self.model, self.grid, self.calls = model, model.grid, []

    def __call__(self, patches, levels, active):
        prediction = self.model(patches, levels, active)
        self.calls.append([active.scatter(each, 16) for each in (levels, prediction.log_variance)])
        return prediction


def columns(seen):
    """Return a mask_fn that takes columns in turn and notes the signals."""

    def mask_fn(x, iteration, *, signals):
        seen.append(signals)
        return COLUMN[iteration % 4].expand(len(x), 4, 4)

    return mask_fn


def test_the_uncertainty_of_a_patch_is_its_mean_log_variance_when_it_was_last_denoised(model, finished):
    seen, recording, schedule = [], Recording(model), Schedule(3, 0.5)
    refine_batch(finished, columns(seen), 6, model=recording, schedule=schedule, backend="torch")
    assert seen[0].uncertainty.isnan().all()
    assert seen[0].entropy is None
    steps = schedule.steps(4)
    for iteration in range(1, 6):
        calls = recording.calls[(iteration - 1) * steps :][:steps]
        levels, told = (torch.stack(part) for part in zip(*calls, strict=True))
        moves = torch.cat([levels[1:], torch.zeros_like(levels[:1])]) < levels
        expected = torch.where(moves, told, 0).double().sum(0) / moves.sum(0)
        mask, now, before = (
            COLUMN[iteration % 4].flatten(),
            seen[iteration].uncertainty,
            seen[iteration - 1].uncertainty,
        )
        assert (moves.sum(0)[:, mask] >= 2).all()
        assert (now - expected)[:, mask].abs().max() < 1e-5
        assert torch.equal(now[:, ~mask].nan_to_num(9), before[:, ~mask].nan_to_num(9))


def test_the_engine_gives_the_signals_of_the_reference(backend, model, finished, ragged_known):
    for schedule, most in ((Schedule(2, 0.5), 5), (Schedule(4, 0.8, shift=3.0), "auto")):
        runs = []
        for each in (backend, "reference"):
            options = {"model": model, "known": ragged_known, "schedule": schedule, "max_chains": most}
            refine_batch(finished, columns(runs), 5, backend=each, **options)
        for found, expected in zip(runs[:5], runs[5:], strict=True):
            torch.testing.assert_close(found.uncertainty, expected.uncertainty, atol=2e-5, rtol=0, equal_nan=True)
        assert found.uncertainty.isfinite().any()


@pytest.mark.parametrize(
    "schedule",
    [TokenSchedule(4), TokenSchedule(5, "independent"), TokenSchedule(6, remask="conf"), TokenSchedule(3, top_p=0.8)],
    ids=["count", "independent", "remasked", "top_p"],
)
def test_signals_of_tokens_are_those_of_the_step_that_revealed_them(backend, schedule):
    tokens = torch.randint(0, 2, (6, 11), generator=torch.Generator().manual_seed(0))
    runs = []

    def mask_fn(x, iteration, *, signals):
        runs.append(signals)
        return (torch.arange(11) % 3 == iteration % 3).expand(len(x), -1)

    for each in (backend, "reference"):
        refine_batch(tokens, mask_fn, 3, model=Lookup(), schedule=schedule, backend=each, max_chains=4)
    for found, expected in zip(runs[:3], runs[3:], strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert (found.uncertainty.isnan() == (torch.arange(11) % 3 == 0)).all()
    assert (found.entropy.nan_to_num(1) > 0).all()


def test_where_a_sample_is_rejected_the_signals_stay(model, finished):
    runs = []
    reward = lambda x: -torch.arange(len(x)) * (x - finished).flatten(1).abs().amax(1)  # noqa: E731
    for accept in (Metropolis(reward), None):
        refine_batch(finished, columns(runs), 2, model=model, schedule=Schedule(2, 0.5), accept=accept)
    kept, plain = runs[1].uncertainty, runs[3].uncertainty
    assert torch.equal(kept[0].nan_to_num(9), plain[0].nan_to_num(9))
    assert kept[1:].isnan().all()  # every other chain would be changed by the first proposal
    assert plain[1:].isfinite().any()


class Without:
    """A model that predicts no log-variance."""

    grid = PatchGrid(1, 16, 16, 4)

    def __call__(self, patches, levels, active=None):
        return Prediction(active.gather(patches))


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_model_without_log_variances_is_named(name, finished):
    with pytest.raises(ValueError, match=r"mask_fn: .* log-variances .* Without predicts none"):
        refine_batch(finished, uncertain_patches(), 2, model=Without(), backend=name)


def test_what_a_mask_fn_writes_to_signals_changes_nothing(model, finished):
    def mask_fn(x, iteration, signals):
        signals.uncertainty.zero_()
        return COLUMN[iteration % 4].expand(len(x), 4, 4)

    options = {"model": model, "schedule": Schedule(2, 0.5)}
    found = refine_batch(finished, mask_fn, 3, **options)
    assert torch.equal(found, refine_batch(finished, columns([]), 3, **options))


# ---------------------------------------------------------------------------------------------------------- policies


def choose(policy, free, **asked):
    policy = policy.bind(PatchGrid(1, 16, 16, 4), len(free), CPU)
    counters = {"seed": 0, "iteration": torch.tensor(2), "chain_ids": torch.arange(len(free))}
    return policy.choose(free, **counters, **asked), policy.sizes(free)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 1.0])
def test_uncertain_patches_are_the_most_uncertain_free_ones(ratio, ragged_known, generator):
    free, uncertainty = ~ragged_known, torch.randn(12, 16, generator=generator)
    mask, sizes = choose(uncertain_patches(ratio), free, signals=Signals(uncertainty))
    assert mask.sum(1).tolist() == sizes.tolist() == [num_chosen(ratio, n) for n in free.sum(1).tolist()]
    assert not (mask & ~free).any()
    least = torch.where(mask, uncertainty, torch.inf).amin(1)
    assert (torch.where(free & ~mask, uncertainty, -torch.inf).amax(1) < least).all()


def test_patches_of_unknown_uncertainty_come_first_and_are_random(ragged_known):
    free = ~ragged_known
    unknown = Signals(torch.full((12, 16), torch.nan))
    assert torch.equal(choose(uncertain_patches(0.3), free, signals=unknown)[0], choose(random_patches(0.3), free)[0])
    some = Signals(torch.where(COLUMN[1].flatten(), torch.nan, 5.0).expand(12, 16))
    mask, sizes = choose(uncertain_patches(0.25), torch.ones(12, 16, dtype=torch.bool), signals=some)
    assert torch.equal(mask, COLUMN[1].flatten().expand(12, 16))
    assert (sizes == 4).all()


def test_uncertain_patches_of_the_engine_are_those_of_the_reference(backend, model, finished, ragged_known):
    options = {"model": model, "known": ragged_known, "schedule": Schedule(2, 0.5)}
    runs = [
        refine_batch(finished, uncertain_patches(0.3), 5, backend=each, **options) for each in (backend, "reference")
    ]
    assert (runs[0] - runs[1]).abs().max() < 2e-5
    assert (runs[0] - refine_batch(finished, random_patches(0.3), 5, **options)).abs().max() > 0.1
    tokens = torch.randint(0, 2, (6, 11), generator=torch.Generator().manual_seed(0))
    options = {"model": Lookup(), "schedule": TokenSchedule(3)}
    runs = [refine_batch(tokens, uncertain_patches(0.3), 5, backend=each, **options) for each in (backend, "reference")]
    assert torch.equal(*runs)


def dark(x):
    """The patches of images whose mean is negative."""
    return PatchGrid(1, 16, 16, 4).to_patches(x).mean(-1) < 0


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_violating_patches_are_among_those_that_the_judge_names(ratio, finished, ragged_known):
    free = ~ragged_known
    mask, sizes = choose(violating_patches(dark, ratio), free, x=finished)
    violating = dark(finished) & free
    assert not (mask & ~violating).any()
    assert torch.equal(mask.sum(1), violating.sum(1).minimum(sizes))


def test_random_others_are_chosen_beside_the_violating_patches(finished, ragged_known):
    free = ~ragged_known
    finished[3] = finished[3].abs()  # nothing violates
    mask, sizes = choose(violating_patches(dark, 1.0, others=0.3), free, x=finished)
    violating, number = dark(finished) & free, (0.3 * free.sum(1)).long()
    assert torch.equal(mask & dark(finished), violating)
    beside = (mask & ~violating).sum(1)
    assert torch.equal(beside, torch.where(violating.any(1), number.minimum((free & ~violating).sum(1)), 0))
    assert (mask.sum(1) <= sizes).all()
    assert (sizes <= free.sum(1)).all()
    assert beside.max() > 1
    with pytest.raises(ValueError, match=r"others must be a finite number in \[0, 1\], got 1.5"):
        violating_patches(dark, others=1.5)


def test_violating_patches_leave_chains_without_violations(backend, model, finished, ragged_known):
    options = {"model": model, "known": ragged_known, "schedule": Schedule(2, 0.5)}
    finished[3] = finished[3].abs()
    runs = [
        refine_batch(finished, violating_patches(dark, 1.0), 3, backend=each, **options)
        for each in (backend, "reference")
    ]
    assert (runs[0] - runs[1]).abs().max() < 2e-5
    assert torch.equal(runs[0][3], finished[3])
    assert not torch.equal(runs[0][0], finished[0])


def test_chains_take_the_steps_for_the_patches_that_violate(model, finished):
    """Two patches, where the share of 0.5 would be eight."""

    def few(x):
        return dark(x) & (torch.arange(16) < 2)

    finished[:] = -finished.abs()
    calls = Recording(model)
    refine_batch(finished, violating_patches(few, 0.5), 1, model=calls, schedule=Schedule(3))
    assert len(calls.calls) == 6


@pytest.mark.parametrize("grid", [PatchGrid(1, 16, 16, 4), TokenPositions(16)])
def test_the_task_of_boards_names_the_cells(grid):
    tokens = torch.randint(1, 5, (6, 16), generator=torch.Generator().manual_seed(0))
    policy = violating_patches(TokenSudoku(4), 1.0).bind(grid, 6, CPU)
    counters = {"seed": 0, "iteration": torch.tensor(1), "chain_ids": torch.arange(6)}
    mask = policy.choose(torch.ones(6, 16, dtype=torch.bool), x=tokens, **counters)
    assert torch.equal(mask, TokenSudoku(4).judge()(tokens).violating_cells.flatten(1))
    assert mask.any()
    assert not mask.all()


def test_judges_that_do_not_fit_are_named(model, finished):
    with pytest.raises(ValueError, match="judge must be a task or a function of samples, got int"):
        violating_patches(3)
    with pytest.raises(ValueError, match="judge must be a task or a function of samples, got the class EvenPixels"):
        violating_patches(EvenPixels)
    with pytest.raises(ValueError, match="ratio must be a number"):
        violating_patches(dark, 0.0)
    with pytest.raises(ValueError, match="violating_patches: HueJudge: its EvenPixelsReport has no violating_cells"):
        choose(violating_patches(EvenPixels()), torch.ones(2, 16, dtype=torch.bool), x=torch.zeros(2, 3, 32, 32))

    def bad(x):
        raise KeyError("no")

    with pytest.raises(RuntimeError, match=r"violating_patches: bad raised KeyError in iteration 1: 'no'"):
        refine_batch(finished, violating_patches(bad), 1, model=model)


def test_a_policy_of_the_users_may_ask_for_samples_and_signals(run, model):
    class Asking(MaskPolicy):
        def sizes(self, free):
            return free.sum(1).clamp(max=2)

        def choose(self, free, *, seed, iteration, chain_ids, x, signals):
            assert x.shape == (12, 1, 16, 16)
            assert signals.uncertainty.isnan().all() == (int(iteration) == 1)
            return (torch.arange(16) < 2).expand(len(free), -1)

    run(model, Asking())

    class Rude(Asking):
        def choose(self, free, *, signals, **more):
            signals.uncertainty.zero_()
            return (torch.arange(16) < 2).expand(len(free), -1)

    with pytest.raises(ValueError, match=r"Rude writes into its input `signals\[0\]`"):
        run(model, Rude())
