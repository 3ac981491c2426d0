"""The specification on a chain small enough to compute by hand. Recorded runs: `tests/test_recorded_runs.py`."""

import pytest
import torch

import ipr_fast
from ipr_fast import PatchGrid, Prediction, Schedule, reference

GRID = PatchGrid(1, 4, 4, 2)  # four patches of four numbers


class Exact:
    """Knows the clean sample, 0.5 everywhere, and is most certain of the last patch."""

    grid = GRID

    def __call__(self, patches, levels, active):
        slots, level = active.gather(patches), levels[..., None].clamp(min=1e-6)
        return Prediction((slots - 0.5) / level, None, -active.index.float())


def regenerate(unknown, schedule, patches=None):
    patches = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) if patches is None else patches
    none = torch.zeros(4, 4)
    unknown = torch.tensor(unknown)
    return patches, *reference.regenerate(Exact(), patches, unknown, schedule, stochasticity=0.0, noise=lambda _: none)


def test_unknown_patches_reach_the_clean_sample_and_the_others_stay():
    before, after, levels = regenerate([True, False, True, True], Schedule(3, 0.5))
    torch.testing.assert_close(after[[0, 2, 3]], torch.full((3, 4), 0.5))
    assert torch.equal(after[1], before[1])
    assert levels[0].tolist() == [1, 0, 1, 1]
    assert not levels[-1].any()
    assert not levels[:, 1].any()


def test_the_most_certain_patch_starts_first():
    _, _, levels = regenerate([True] * 4, Schedule(2, 0.0))
    assert levels.tolist()[:5] == [[1, 1, 1, 1], [1, 1, 1, 0.5], [1, 1, 1, 0], [1, 1, 0.5, 0], [1, 1, 0, 0]]
    assert len(levels) == 9


def test_nothing_unknown_takes_no_step():
    before, after, levels = regenerate([False] * 4, Schedule(3, 0.5))
    assert torch.equal(after, before)
    assert levels.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("unknown", [[True] * 3, [1, 0, 0, 0]])
def test_an_unknown_of_another_shape_or_dtype_is_refused(unknown):
    with pytest.raises(ValueError, match=r"patches must be \(N, P\) and unknown a bool \(N,\), got \(4, 4\) and"):
        regenerate(unknown, Schedule(3, 0.5))


def test_given_values_are_not_written_to():
    """Where a grid's patches are views of the samples, too."""

    class Halved:
        grid = PatchGrid.of((1, 12), (3,))

        def __call__(self, patches, levels, active=None):
            return Prediction(0.5 * (patches if active is None else active.gather(patches)))

    values = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(0))
    known, before = torch.tensor([[True, False, False, True]] * 2), values.clone()
    options = {"known": known, "known_values": values, "callback": lambda step, x: None, "backend": "reference"}
    ipr_fast.generate_batch(2, model=Halved(), **options)
    assert torch.equal(values, before)
