"""Plans: every chain runs as long as it must, few lanes idle."""

import pytest
import torch

from ipr_fast import Schedule
from ipr_fast.engine.scheduler import RoundedSizes, exact_size, lane_bucket, make_plan, slot_bucket

REFINE, GENERATE = Schedule(10, 0.8), Schedule(3, 0.0)


def check(plan, counts, schedule, most_lanes):
    """Each chain with something to do is in one wave, and in the lanes at each of its steps."""
    order = plan.order.tolist()
    assert sorted(order) == [i for i, n in enumerate(counts.tolist()) if n > 0]
    seen = []
    for wave in plan.waves:
        chains = order[wave.chains]
        seen += chains
        assert 0 < len(chains) <= wave.lanes <= most_lanes
        assert max(counts[chains]) == wave.most_active
        lanes = [phase.lanes for phase in wave.phases for _ in range(phase.steps)]
        assert lanes == sorted(lanes, reverse=True)
        assert len(lanes) == schedule.steps(wave.most_active)
        for place, chain in enumerate(chains):
            assert all(place < lanes[step] for step in range(schedule.steps(int(counts[chain]))))
    assert seen == order
    assert plan.chain_steps == sum(schedule.steps(n) for n in counts.tolist())


@pytest.mark.parametrize("schedule", [REFINE, GENERATE, Schedule(5, 1.0), Schedule(1, 0.3)], ids=str)
@pytest.mark.parametrize("most_lanes", [1, 5, 16, 33, 200])
@pytest.mark.parametrize("grain", [exact_size, None])
def test_every_chain_runs_as_long_as_it_must(schedule, most_lanes, grain, generator):
    for high in (1, 2, 82):
        counts = torch.randint(0, high, (100,), generator=generator)
        check(
            make_plan(counts, schedule.steps, most_lanes, grain or RoundedSizes(most_lanes)),
            counts,
            schedule,
            most_lanes,
        )


def test_chains_of_one_length_keep_their_order_and_one_number_of_lanes():
    plan = make_plan(torch.full((10,), 4), REFINE.steps, 16, exact_size)
    assert plan.order.tolist() == list(range(10))
    assert plan.waves[0].phases == ((10, REFINE.steps(4)),)
    assert plan.idle_share == 0


def test_nothing_to_do_is_no_wave():
    for counts in (torch.zeros(7, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)):
        plan = make_plan(counts, REFINE.steps, 4, exact_size)
        assert plan.waves == ()
        assert plan.steps == plan.idle_share == 0


@pytest.mark.parametrize("lanes", [64, 256, 1024, 4096])
@pytest.mark.parametrize(("schedule", "share"), [(REFINE, 0.25), (GENERATE, 1)], ids=["refine", "generate"])
def test_idle_share_of_4096_boards_with_0_to_26_clues(lanes, schedule, share, generator):
    """The figures of ipr_fast/engine/scheduler.py."""
    free = 81 - torch.randint(0, 27, (4096,), generator=generator)
    counts = (share * free).long()
    assert make_plan(counts, schedule.steps, lanes, exact_size).idle_share == 0
    assert make_plan(counts, schedule.steps, lanes, RoundedSizes(lanes)).idle_share < 0.015
    lengths = torch.tensor([schedule.steps(n) for n in counts.tolist()]).double()
    assert 1 - lengths.mean() / lengths.max() > 0.12  # all at once, and none leaves before the last


@pytest.mark.parametrize("lanes", [1, 3, 16, 17, 100, 256])
def test_lanes_come_in_few_numbers(lanes):
    numbers = [RoundedSizes(lanes)(chains) for chains in range(1, lanes + 1)]
    assert all(chains <= number <= lanes for chains, number in enumerate(numbers, 1))
    assert numbers == sorted(numbers)
    assert len(set(numbers)) <= 24
    idle = [number - chains for chains, number in enumerate(numbers, 1) if 2 * chains > lanes]
    assert max(idle) <= max(1, lanes / 32)


def test_buckets():
    assert [lane_bucket(n) for n in (1, 2, 3, 64, 65, 4096)] == [1, 2, 4, 64, 128, 4096]
    for num_patches in (1, 2, 7, 16, 64, 81, 256):
        buckets = {slot_bucket(n, num_patches) for n in range(num_patches + 1)}
        assert len(buckets) <= 9
        assert all(n <= slot_bucket(n, num_patches) <= num_patches for n in range(num_patches + 1))
