import pytest
import torch

from ipr_fast import Schedule
from ipr_fast.kernels.advance import advance

SCHEDULES = [Schedule(3, 0.0), Schedule(10, 0.8), Schedule(4, 0.9), Schedule(6, 1.0), Schedule(5, 0.5, 3.0, 2)]


def run_schedule(schedule, counts, log_variance, slots):
    """All steps of chains with `counts` active slots; returns starts (B, A) and levels (T + 1, B, A)."""
    count = torch.tensor(counts, dtype=torch.int32)
    occupied = torch.arange(slots) < count[:, None]
    start = torch.full((len(counts), slots), -1, dtype=torch.int32)
    levels, level, previous = [occupied.float()], occupied.float(), torch.full((len(counts), slots), float("nan"))
    done = torch.full((len(counts),), -1)
    for step in range(schedule.steps(max(counts))):
        advance(
            start,
            level,
            previous,
            count=count,
            step=done,
            log_variance=None if log_variance is None else log_variance[step],
            **schedule.tables(slots)._asdict(),
        )
        assert torch.equal(previous, levels[-1])
        assert (done == step).all()
        levels.append(level.clone())
    return start, torch.stack(levels)


def expected_levels(schedule, starts, slots):
    """The levels of one chain whose slots started at `starts`, by the definition."""
    n, block, steps = len(starts), schedule.block(len(starts)), schedule.steps(len(starts))
    rows = [torch.tensor([1.0] * n + [0.0] * (slots - n))]
    for step in range(steps):
        left = torch.tensor(
            [float(block - (step + 1 - s)) if step >= s else block for s in starts] + [0.0] * (slots - n)
        )
        level = schedule.warp((left / max(block, 1)).clamp(0, 1))
        rows.append(level if step + 1 < steps else torch.zeros(slots))
    return torch.stack(rows)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("slots", [1, 4, 9])
def test_ragged_chains_follow_their_own_schedule(schedule, slots):
    counts = list(range(slots + 1))
    generator = torch.Generator().manual_seed(0)
    log_variance = torch.randn(schedule.steps(slots), len(counts), slots, generator=generator)
    start, levels = run_schedule(schedule, counts, log_variance, slots)
    assert not levels.isnan().any()
    for b, n in enumerate(counts):
        waiting, starts = set(range(n)), [None] * n
        for k, step in enumerate(schedule.starts(n)):
            chosen = min(waiting, key=lambda slot: float(log_variance[step, b, slot]))
            waiting.remove(chosen)
            starts[chosen] = step
            assert k < n
        assert start[b, :n].tolist() == starts
        expected = expected_levels(schedule, starts, slots)
        assert torch.equal(levels[: len(expected), b], expected)
        assert (levels[len(expected) :, b] == 0).all()  # chains that are done wait at level 0


def test_means_are_those_of_the_steps_that_denoised_a_slot():
    schedule, slots = Schedule(4, 0.6, shift=2.0), 5
    tables, count = schedule.tables(slots)._asdict(), torch.tensor([5, 2, 0], dtype=torch.int32)
    start, done, mean = torch.full((3, 5), -1, dtype=torch.int32), torch.full((3,), -1), torch.full((3, 5), 9.0)
    level, previous = (torch.arange(slots) < count[:, None]).float(), torch.zeros(3, 5)
    told = torch.randn(schedule.steps(slots), 3, 5, generator=torch.Generator().manual_seed(0))
    levels = [level.clone()]
    for log_variance in told:
        advance(start, level, previous, count=count, step=done, log_variance=log_variance, mean=mean, **tables)
        levels.append(level.clone())
    before = torch.stack(levels[:-1])
    moves = torch.stack(levels[1:]) < before
    expected = torch.where(moves, told, 0).double().sum(0) / moves.sum(0)
    occupied = torch.arange(slots) < count[:, None]
    assert (mean - expected)[occupied].abs().max() < 1e-6
    assert (mean[~occupied] == 9).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_mean_of_infinite_log_variances_is_the_largest_number(value):
    schedule = Schedule(3)
    start, done, mean = torch.full((1, 1), -1, dtype=torch.int32), torch.tensor([-1]), torch.zeros(1, 1)
    level, previous, told = torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), value)
    for _ in range(3):
        tables = schedule.tables(1)._asdict()
        advance(start, level, previous, count=torch.ones(1).int(), step=done, log_variance=told, mean=mean, **tables)
    assert torch.equal(mean.nan_to_num(nan=7.0), told.nan_to_num(nan=7.0))


def test_equal_log_variances_start_in_the_order_of_slots():
    schedule = Schedule(2, 0.0)
    start, _ = run_schedule(schedule, [4], torch.zeros(8, 1, 4), 4)
    assert start.tolist() == [[0, 2, 4, 6]]
    assert run_schedule(schedule, [4], None, 4)[0].tolist() == [[0, 2, 4, 6]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_undefined_uncertainty_keeps_nobody_waiting(value):
    schedule = Schedule(2, 0.0)
    start, _ = run_schedule(schedule, [2, 4], torch.full((8, 2, 4), value), 4)
    assert start.tolist() == [[0, 2, -1, -1], [0, 2, 4, 6]]


def test_an_undefined_uncertainty_counts_as_the_highest():
    log_variance = torch.tensor([float("nan"), 3.0, float("nan"), -1.0]).repeat(8, 1, 1)
    start, _ = run_schedule(Schedule(2, 0.0), [4], log_variance, 4)
    assert start.tolist() == [[4, 2, 6, 0]]


def test_ties_of_a_large_overlap_start_together_lowest_uncertainty_first():
    schedule = Schedule(2, 0.9)
    starts = schedule.starts(6)
    assert len(set(starts)) < 6
    log_variance = torch.tensor([5.0, 3.0, 4.0, 0.0, 1.0, 2.0]).repeat(schedule.steps(6), 1, 1)
    start, _ = run_schedule(schedule, [6], log_variance, 6)
    order = [3, 4, 5, 1, 2, 0]
    assert start[0, order].tolist() == starts


def test_a_group_starts_together_lowest_uncertainty_first():
    log_variance = torch.tensor([5.0, 3.0, 4.0, 0.0, 1.0]).repeat(6, 1, 1)
    start, _ = run_schedule(Schedule(2, 0.0, group=2), [5], log_variance, 5)
    assert start[0].tolist() == [4, 2, 2, 0, 0]


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.3])
def test_rows_are_those_of_the_levels_in_a_table(generator, shift):
    schedule, slots = Schedule(4, 0.5, shift), 6
    levels, count = schedule.levels(slots), torch.tensor([6, 2, 0], dtype=torch.int32)
    start, row = torch.full((3, slots), -1, dtype=torch.int32), torch.full((3, slots), -7)
    level = (torch.arange(slots) < count[:, None]).float()
    for step in range(schedule.steps(slots)):
        advance(
            start,
            level,
            torch.empty_like(level),
            count=count,
            step=torch.full((3,), step - 1),
            log_variance=torch.randn(3, slots, generator=generator),
            row=row,
            levels=levels,
            **schedule.tables(slots)._asdict(),
        )
        assert torch.equal(levels[row], level)
