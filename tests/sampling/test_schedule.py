from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ipr_fast import Schedule

DATA = Path(__file__).parent.parent / "data"
RECORDED = [
    ("tiny_gray.clued", "init", Schedule(3, 0.0)),
    ("tiny_gray.clued", "iter0", Schedule(10, 0.8)),
    ("tiny_gray.clued", "iter1", Schedule(10, 0.8)),
    ("tiny_rgb.free", "init", Schedule(10, 0.9)),
    ("tiny_rgb.free", "iter0", Schedule(10, 0.9)),
]


def levels_over_time(schedule: Schedule, n: int) -> torch.Tensor:
    """Return the levels (T + 1, n) of n patches that start in the order of their ids."""
    steps, block, starts = schedule.steps(n), schedule.block(n), torch.tensor(schedule.starts(n))
    after = torch.arange(1, steps + 1)[:, None]  # s + 1
    levels = ((block - (after - starts)).float() / block).clamp(0, 1)
    levels = torch.where(after > starts, levels, 1.0)
    levels[-1] = 0.0
    return torch.cat([torch.ones(1, n), levels])


@pytest.mark.parametrize(("file", "run", "schedule"), RECORDED)
def test_levels_equal_the_published_implementations(file, run, schedule):
    with safe_open(DATA / f"{file}.safetensors", framework="pt") as recording:
        recorded = recording.get_tensor(f"{run}.schedule")
    active = recorded[0] == 1
    expected = recorded[:, active].sort(dim=1).values  # the recorded patches start in the model's order
    assert torch.equal(levels_over_time(schedule, int(active.sum())).sort(dim=1).values, expected)


def as_published(steps_per_patch: int, overlap: float, n: int) -> tuple[int, int, list[int]]:
    """Return T, L and the S_k of n patches, by the tensor operations of the published code."""
    m = torch.tensor([n], dtype=torch.int32)
    steps = int((steps_per_patch + (m - 1) * (1 - overlap) * steps_per_patch).ceil())
    ideal = steps / ((m - 1) * (1 - overlap) + 1)
    return steps, int(ideal.ceil()), [int((k * ideal * (1 - overlap)).floor()) for k in range(n)]


@pytest.mark.parametrize(
    ("steps_per_patch", "overlap", "counts"),
    [(3, 0.0, range(1, 82)), (10, 0.8, range(1, 82)), (30, 0.9, range(1, 65)), (10, 0.9, range(1, 257))],
)
def test_integers_equal_the_published_expression_in_the_papers_settings(steps_per_patch, overlap, counts):
    schedule = Schedule(steps_per_patch, overlap)
    for n in counts:
        found = schedule.steps(n), schedule.block(n), schedule.starts(n)
        assert found == as_published(steps_per_patch, overlap, n), n


@pytest.mark.parametrize("overlap", [0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.8, 0.9, 0.95, 1])
def test_tables_equal_the_published_expression_at_all_counts(overlap):
    """For every n to 256 and p to 50: the same float32 operations, vectorised with one count per row."""
    counts = torch.arange(1, 257, dtype=torch.int32)
    k = torch.arange(256)
    for steps_per_patch in range(1, 51):
        steps = (steps_per_patch + (counts - 1) * (1 - overlap) * steps_per_patch).ceil()
        ideal = ((counts - 1) * (1 - overlap) + 1).reciprocal() * steps
        starts = (k * ideal[:, None] * (1 - overlap)).floor()
        tables = Schedule(steps_per_patch, overlap).tables(256)
        assert torch.equal(tables.steps[1:], steps.int())
        assert torch.equal(tables.block[1:], ideal.ceil().int())
        reached = k < counts[:, None]
        assert torch.equal(tables.starts[1:][reached], starts[reached].int())


def test_counts_that_float64_would_get_wrong():
    assert Schedule(10, 0.8).steps(22) == 53  # 10 + 21 * 0.2 * 10 is 52 on paper
    for steps_per_patch, overlap, n in [(10, 0.8, n) for n in (13, 14, 17, 19)] + [(3, 0.0, n) for n in (56, 60, 61)]:
        ideal = Schedule(steps_per_patch, overlap).block(n)
        assert ideal == as_published(steps_per_patch, overlap, n)[1]


def test_integers_do_not_depend_on_torchs_default_type():
    expected = Schedule(10, 0.8).tables(81)
    torch.set_default_dtype(torch.float64)
    try:
        found = Schedule(10, 0.8).tables(81)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("steps_per_patch", [1, 2, 3, 10, 30])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.8, 0.9, 1.0])
def test_every_patch_starts_and_ends_in_time(steps_per_patch, overlap):
    schedule = Schedule(steps_per_patch, overlap)
    for n in (*range(1, 26), 50, 81):
        starts = schedule.starts(n)
        assert starts[0] == 0
        assert starts == sorted(starts)
        assert starts[-1] < schedule.steps(n)
        assert 1 <= schedule.block(n) <= schedule.steps(n)
        levels = levels_over_time(schedule, n)
        assert (levels.diff(dim=0) <= 0).all()


def test_overlap_one_is_parallel_diffusion():
    schedule = Schedule(10, 1.0)
    assert (schedule.steps(50), schedule.block(50), schedule.starts(50)) == (10, 10, [0] * 50)


def test_paper_settings_make_the_known_number_of_steps():
    assert Schedule(3, 0.0).steps(81) == 243
    assert Schedule(10, 0.8).steps(20) == 48
    assert Schedule(10, 0.8).steps(0) == 0


def test_tables_hold_the_same_numbers():
    schedule, n = Schedule(7, 0.65), 20
    tables = schedule.tables(n)
    assert all(table.dtype == torch.int32 for table in tables[:3])
    for k in range(n + 1):
        assert tables.steps[k] == schedule.steps(k)
        assert tables.block[k] == schedule.block(k)
        assert tables.starts[k, :k].tolist() == schedule.starts(k)
        assert (tables.starts[k, k:] == 2**31 - 1).all()


@pytest.mark.parametrize("bad", [(0, 0.0), (-1, 0.0), (1.5, 0.0), (True, 0.0), ("3", 0.0), (2**16 + 1, 0.0)])
def test_steps_per_patch_out_of_range(bad):
    with pytest.raises(ValueError, match=r"steps_per_patch must be an int in 1..65536"):
        Schedule(*bad)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), "0.5", None])
def test_overlap_out_of_range(bad):
    with pytest.raises(ValueError, match=r"overlap must be a finite number in \[0, 1\]"):
        Schedule(3, bad)


@pytest.mark.parametrize(
    "schedule", [Schedule(10, 0.8), Schedule(3, 0.0), Schedule(7, 0.55), Schedule(5, 1.0)], ids=str
)
def test_levels_are_all_that_a_patch_can_have(schedule):
    """Bit for bit as the engine computes them, for every number of patches."""
    levels = schedule.levels(20)
    assert (levels.diff() > 0).all()
    assert (levels[0], levels[-1]) == (0, 1)
    known = set(levels.tolist())
    for block in {schedule.block(n) for n in range(1, 21)}:
        assert {(torch.tensor(block - done).float() / block).item() for done in range(block + 1)} <= known


@pytest.mark.parametrize("schedule", [Schedule(3, 0.0, group=2), Schedule(10, 0.8, group=3), Schedule(4, 1.0, group=2)])
def test_groups_have_the_schedule_of_single_patches(schedule):
    """Of m = ceil(n / group) patches: each start is that of its group."""
    single = Schedule(schedule.steps_per_patch, schedule.overlap)
    for n in range(1, 23):
        groups = -(-n // schedule.group)
        assert (schedule.steps(n), schedule.block(n)) == (single.steps(groups), single.block(groups))
        assert schedule.starts(n) == [single.starts(groups)[k // schedule.group] for k in range(n)]
    tables = schedule.tables(22)
    assert [int(n) for n in tables.steps] == [schedule.steps(n) for n in range(23)]
    assert tables.starts[22].tolist() == schedule.starts(22)


def test_a_group_of_all_patches_is_parallel_diffusion():
    schedule = Schedule(10, 0.3, group=64)
    assert (schedule.steps(50), schedule.block(50), schedule.starts(50)) == (10, 10, [0] * 50)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.25, 1e3, 1e-3])
def test_shift_warps_levels(shift):
    schedule, plain = Schedule(10, 0.8, shift), Schedule(10, 0.8)
    t = plain.levels(20).double()
    expected = shift * t / (1 + (shift - 1) * t)
    # Four roundings; one of a product near 1 in a sum as small as the shift counts for 1 / shift.
    torch.testing.assert_close(schedule.warp(t.float()).double(), expected, rtol=4 * 2**-24 * max(1, 1 / shift), atol=0)
    levels = schedule.levels(20)
    assert (levels[0], levels[-1]) == (0, 1)
    assert (levels.diff() > 0).all()


def test_no_shift_keeps_the_bits_of_levels():
    t = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Schedule(1).warp(t), t)


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), "2", True])
def test_shift_out_of_range(bad):
    with pytest.raises(ValueError, match=r"shift must be a finite number in \[0\.001, 1000\]"):
        Schedule(3, 0.0, shift=bad)


@pytest.mark.parametrize("bad", [0, 1.5, True, 65537, 2**63])
def test_group_out_of_range(bad):
    with pytest.raises(ValueError, match=r"group must be an int in 1\.\.65536, got"):
        Schedule(3, 0.0, group=bad)


def test_values_leave_out_what_is_not_set():
    assert Schedule(3, 0.5).values == (3, 0.5)
    assert Schedule(*Schedule(3, 0.5, group=2).values) == Schedule(3, 0.5, 1.0, 2)
