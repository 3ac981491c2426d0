"""The host's plan of one iteration: which chains share a wave, and how many lanes and steps it takes.

A chain with n active patches takes T(n) steps. Chains run in waves, longest first, so running chains
occupy the first lanes, and a step computes only those. A chain with no active patch is in no wave.

4,096 boards of 9x9 cells with 0 to 26 clues leave 14 % of the lane-steps idle if every lane runs to the end, 1 % with
RoundedSizes and none with exact_size. So refilling a lane as soon as its chain is done could gain that 1 % at most, and
would need a step counter for each lane and a new context at each change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Phase(NamedTuple):
    """Consecutive steps on the first `lanes` lanes."""

    lanes: int
    steps: int


class Wave(NamedTuple):
    """Chains that run together: a slice of the plan's order, and phases on fewer and fewer lanes.

    most_active, least_active: active patches of the chains.
    """

    chains: slice
    most_active: int
    phases: tuple[Phase, ...]
    least_active: int = 0

    @property
    def lanes(self) -> int:
        """Lanes of the first phase."""
        return self.phases[0].lanes


class Plan(NamedTuple):
    """The waves of one iteration."""

    order: Tensor  # (chains,) int64, indices of the chains with active patches, longest first
    waves: tuple[Wave, ...]
    chain_steps: int  # steps of all chains together

    @property
    def steps(self) -> int:
        """Steps of all waves, one after another."""
        return sum(phase.steps for wave in self.waves for phase in wave.phases)

    @property
    def idle_share(self) -> float:
        """Share of the lane-steps (a step on a lane) that no chain needs."""
        lane_steps = sum(phase.lanes * phase.steps for wave in self.waves for phase in wave.phases)
        return 1 - self.chain_steps / lane_steps if self.waves else 0.0


def make_plan(
    counts: Tensor, num_steps: Callable[[int], int], most_lanes: int, lanes_for: Callable[[int], int]
) -> Plan:
    """Plan the waves of chains with `counts` (B,) active patches, at most `most_lanes` at a time; all on the CPU.

    num_steps(n): steps of a chain with n active patches, non-decreasing.
    lanes_for(chains): lanes to run for that many chains; >= chains, non-decreasing.
    """
    order = counts.argsort(descending=True, stable=True)
    active = [n for n in counts[order].tolist() if n > 0]
    order = order[: len(active)]
    steps_of = {n: num_steps(n) for n in set(active)}
    lengths = [steps_of[n] for n in active]
    waves = []
    for first in range(0, len(lengths), most_lanes):
        chains = slice(first, min(first + most_lanes, len(lengths)))
        waves.append(Wave(chains, active[first], _phases(lengths[chains], lanes_for), active[chains.stop - 1]))
    return Plan(order, tuple(waves), sum(lengths))


def stages(lengths: Sequence[int], lanes_for: Callable[[int], int]) -> list[tuple[int, Phase]]:
    """Return how many of the chains that take `lengths` steps, longest first, run until the next of them is done."""
    found = []
    done = 0
    for running in range(len(lengths), 0, -1):
        steps = lengths[running - 1] - done
        if steps:
            found.append((running, Phase(lanes_for(running), steps)))
        done = lengths[running - 1]
    return found


def _phases(lengths: Sequence[int], lanes_for: Callable[[int], int]) -> tuple[Phase, ...]:
    """Return the phases of chains that take `lengths` steps, longest first: stages on as many lanes are one."""
    phases: list[Phase] = []
    for _, (lanes, steps) in stages(lengths, lanes_for):
        if phases and phases[-1].lanes == lanes:
            steps += phases.pop().steps
        phases.append(Phase(lanes, steps))
    return tuple(phases)


def exact_size(chains: int) -> int:
    """Run chains on as many lanes: for eager runs, where a new number of lanes costs nothing."""
    return chains


class RoundedSizes(NamedTuple):
    """Round the number of lanes up to one of at most 24, each of which is a CUDA graph.

    These are multiples of a sixteenth of all lanes; above the half, of a thirty-second.
    """

    lanes: int

    def __call__(self, chains: int) -> int:
        fine = -(-self.lanes // 32)
        few, many = (-(-chains // grain) * grain for grain in (2 * fine, fine))
        return few if 2 * few <= self.lanes else min(self.lanes, many)


def lane_bucket(chains: int) -> int:
    """Round the number of lanes to allocate up to a power of two, so that calls of similar sizes share them."""
    return 1 << max(0, chains - 1).bit_length()


def slot_bucket(most_active: int, num_patches: int) -> int:
    """Round the number of slots up to one of at most nine, so that a varying mask needs few graphs and buffers."""
    width = -(-num_patches // 8)
    return min(num_patches, -(-most_active // width) * width)
