"""Which chains run together, and for how many steps: the host's plan of one iteration.

A chain with n active patches takes T(n) steps. Chains pass through the engine's lanes in waves, longest first. So those
of a wave that still run are always the first ones, and each step computes only the lanes that are needed for them. A
chain with nothing to do, known or frozen as a whole, is in no wave.

With 4,096 chains of 0 to 26 clues on 9x9 boards, 1 % of what is computed is idle where lanes come in few sizes, and
nothing where they come one by one; 14 % if all ran to the end. So filling a lane as soon as its chain is done could
gain no more than that 1 %, and would need a step counter for each lane and the context prepared again at each change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ipr_fast.sampling.schedule import Schedule


class Run(NamedTuple):
    """Consecutive steps on the first `lanes` lanes."""

    lanes: int
    steps: int


class Wave(NamedTuple):
    """Chains that run together: a slice of the plan's order, and their steps, on fewer and fewer lanes."""

    chains: slice
    most_active: int
    runs: tuple[Run, ...]

    @property
    def lanes(self) -> int:
        """Lanes at the start."""
        return self.runs[0].lanes

    @property
    def steps(self) -> int:
        return sum(run.steps for run in self.runs)


class Plan(NamedTuple):
    """One iteration: the chains that have something to do, longest first, and their waves."""

    order: Tensor  # (chains,) int64, on the CPU
    waves: tuple[Wave, ...]
    chain_steps: int  # that the chains need

    @property
    def steps(self) -> int:
        return sum(wave.steps for wave in self.waves)

    @property
    def lane_steps(self) -> int:
        """What is computed: lanes times steps."""
        return sum(run.lanes * run.steps for wave in self.waves for run in wave.runs)

    @property
    def idle_share(self) -> float:
        """The share of what is computed that no chain needs."""
        return 1 - self.chain_steps / self.lane_steps if self.waves else 0.0


def make_plan(counts: Tensor, schedule: Schedule, most_lanes: int, lanes_for: Callable[[int], int]) -> Plan:
    """The waves of chains with `counts` (B,) active patches, on the CPU, at most `most_lanes` at a time.

    lanes_for: the number of lanes on which so many chains run; at least as many, and never fewer for more.
    """
    order = counts.argsort(descending=True, stable=True)
    active = [n for n in counts[order].tolist() if n > 0]
    order = order[: len(active)]
    steps_of = {n: schedule.steps(n) for n in set(active)}
    lengths = [steps_of[n] for n in active]
    waves = []
    for first in range(0, len(lengths), most_lanes):
        chains = slice(first, min(first + most_lanes, len(lengths)))
        waves.append(Wave(chains, active[first], _runs(lengths[chains], lanes_for)))
    return Plan(order, tuple(waves), sum(lengths))


def _runs(lengths: Sequence[int], lanes_for: Callable[[int], int]) -> tuple[Run, ...]:
    """The steps of chains of these lengths, longest first."""
    runs: list[Run] = []
    done = 0
    for running in range(len(lengths), 0, -1):
        steps = lengths[running - 1] - done  # until the shortest of them is done
        if steps == 0:
            continue
        done, lanes = lengths[running - 1], lanes_for(running)
        if runs and runs[-1].lanes == lanes:
            steps += runs.pop().steps
        runs.append(Run(lanes, steps))
    return tuple(runs)


def one_by_one(chains: int) -> int:
    """As many lanes as chains: where another number of lanes costs nothing."""
    return chains


class FewSizes(NamedTuple):
    """At most 24 numbers of lanes, each being a graph of its own: sixteenths of all, above the half thirty-seconds."""

    lanes: int

    def __call__(self, chains: int) -> int:
        fine = -(-self.lanes // 32)
        few, many = (-(-chains // grain) * grain for grain in (2 * fine, fine))
        return few if 2 * few <= self.lanes else min(self.lanes, many)


def lane_bucket(chains: int) -> int:
    """The lanes to make for so many chains: a power of two, so that calls of similar sizes share theirs."""
    return 1 << max(0, chains - 1).bit_length()


def slot_bucket(most_active: int, num_patches: int) -> int:
    """A number of slots that holds `most_active`, out of at most nine: a varying mask must not vary the buffers."""
    width = -(-num_patches // 8)
    return min(num_patches, -(-most_active // width) * width)
