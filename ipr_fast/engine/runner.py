"""Runs waves of chains on the lanes: replays CUDA graphs of `begin` and `tick`, or calls them eagerly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ipr_fast import checks
from ipr_fast.engine.fingerprint import Fingerprint, fingerprint
from ipr_fast.engine.graphs import Capture, Graphs
from ipr_fast.engine.lanes import Lanes
from ipr_fast.engine.scheduler import Phase, RoundedSizes, Wave, exact_size
from ipr_fast.trace import span


class Segment(NamedTuple):
    """Operations that one CUDA graph holds, and its key among the graphs.

    name: "begin", "tick", or "iteration" for both. chooses, initial, whole: arguments of `Lanes.begin`.
    """

    name: str
    num_slots: int
    phases: tuple[Phase, ...]
    chooses: bool = False
    initial: bool = False
    whole: bool = False

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


class Runner:
    """Runs the chains of one model on its lanes.

    capture: makes CUDA graphs; None runs eagerly. whole_iterations: one graph for an iteration, not one for a tick.
    """

    def __init__(self, lanes: Lanes, capture: Capture | None = None, whole_iterations: bool = False) -> None:
        self.lanes, self.whole_iterations = lanes, whole_iterations
        self.graphs = None if capture is None else Graphs(capture)
        lanes.precomputed.may_replace = lanes.eager = capture is None
        self.fingerprint: Fingerprint | None = None  # of the model when its graphs were captured
        self.mix_range: Tensor | None = None  # (2,), smallest and largest variance mix of the call's first step
        self._first_step = True

    def lanes_for(self, chains: int) -> int:
        """Return how many lanes to run for `chains` chains."""
        lanes = exact_size(chains) if self.graphs is None else RoundedSizes(self.lanes.num_lanes)(chains)
        return self.lanes.precomputed.lanes_called(lanes)

    def start_call(self, seed: int, schedule: object) -> None:
        """Set the seed and the schedule of a call."""
        if self.lanes.set_sampling(seed, schedule) and self.graphs is not None:
            self.graphs.clear()
        self._first_step, self.mix_range = True, None

    def notice_changes(self) -> None:
        """Drop the graphs if user code changed the model; recompute its table."""
        if self.graphs is not None:
            current = fingerprint(self.lanes.model)
            if self.fingerprint is None or not self.fingerprint.equals(current):
                self.graphs.clear()
                self.fingerprint = current
        self.lanes.tabulate()

    def segments(
        self, wave: Wave, num_slots: int, *, chooses: bool, initial: bool, whole: bool = False
    ) -> list[tuple[Segment, int]]:
        """Return the segments of a wave, most lanes first, with the number of times that each is run."""
        if self.whole_iterations:
            return [(Segment("iteration", num_slots, wave.phases, chooses, initial, whole), 1)]
        begin = Segment("begin", num_slots, (Phase(wave.lanes, 0),), chooses, initial, whole)
        ticks = [(Segment("tick", num_slots, (Phase(lanes, 1),)), steps) for lanes, steps in wave.phases]
        return [(begin, 1), *ticks]

    def capture(self, segments: Sequence[tuple[Segment, int]]) -> None:
        """Capture the graphs that are missing. This overwrites the lanes."""
        graphs = self.graphs
        missing = [] if graphs is None else graphs.missing(segment for segment, _ in segments)
        if graphs is None or not missing:
            return
        self.lanes.state.clear()
        with self.lanes.precision():
            for segment in missing:
                graphs.add(
                    segment, f"{segment.name} of {checks.name_of(self.lanes.model)}", partial(self._call, segment)
                )
        self.fingerprint = fingerprint(self.lanes.model)  # a forward may change attributes, such as a counter

    def run(
        self,
        segments: Sequence[tuple[Segment, int]],
        noise: Callable[[int], Tensor] | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> None:
        """Regenerate the chains in the lanes, eagerly in the first step of a call, which notes its variance mix.

        noise: noise(step) -> (chains, N, P) in place of random numbers, all steps eager; step -1 is that of `begin`.
        on_step: called after each step.
        """
        graphs, step = self.graphs if noise is None else None, -1
        with self.lanes.precision():
            for segment, times in segments:
                for _ in range(times):
                    with span(segment.name):
                        if graphs is not None and not (self._first_step and segment.steps):
                            graphs[segment]()
                        else:
                            self._note_mix(segment, self._call(segment, None if noise is None else noise(step)))
                    step += 1
                    if on_step is not None:
                        for _ in range(segment.steps):
                            on_step()

    def _call(self, segment: Segment, noise: Tensor | None = None) -> object:
        """Call the operations of a segment. Returns the prediction of its last step, None if there is no step."""
        prediction: object = None
        if segment.name != "tick":
            lanes = segment.phases[0].lanes
            options = {"chooses": segment.chooses, "initial": segment.initial, "whole": segment.whole}
            self.lanes.begin(lanes, segment.num_slots, noise=None if noise is None else noise[:lanes], **options)
        for lanes, steps in segment.phases:
            for _ in range(steps):
                prediction = self.lanes.tick(lanes, segment.num_slots, None if noise is None else noise[:lanes])
        return prediction

    def _note_mix(self, segment: Segment, prediction: object) -> None:
        if prediction is None or not self._first_step:
            return
        self._first_step, self.mix_range = False, self.lanes.mix_range(prediction, segment.num_slots)
        if self.graphs is not None:
            self.fingerprint = fingerprint(self.lanes.model)  # as after a capture
