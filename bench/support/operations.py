"""The operations of a step on buffers of their own: the call, its twin, its definition, its cost.

FLOPs are those of the formula, a function such as exp counting as one, and Philox's integers as none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast import Schedule
from ipr_fast.kernels import accept, advance, denoise, renoise, slot_inputs
from ipr_fast.kernels.philox import STREAM_INITIAL, STREAM_POSTERIOR, STREAM_RENOISE, seed_tensor
from support import definitions

SEED, ITERATION, ETA = 5, 3, 0.5
NORMAL_FLOPS = 5  # per normal: half of two conversions, log, sqrt, cos, sin and five products


class Operation(NamedTuple):
    """One call: `run`, `twin` and `definition`, each after `reset`, return tensors that must agree.

    bytes: that must move. dtype: of the arithmetic, or of the logits that it reads. plain: the yardstick, the same work
    in plain torch, but for partial attention that of all tokens.
    """

    run: Callable[[], Iterable[Tensor]]
    twin: Callable[[], Iterable[Tensor]]
    definition: Callable[[], Iterable[Tensor]]
    bytes: int
    flops: int
    reset: Callable[[], object] = lambda: None
    dtype: torch.dtype = torch.float32
    plain: Callable[[], Tensor] | None = None


class Board(NamedTuple):
    """Chains of N patches of P numbers, A of them active, with their refinement schedule."""

    num_patches: int
    slots: int
    numel: int
    schedule: Schedule


BOARDS = {
    "4x4": Board(16, 4, 64, Schedule(10, 0.8)),
    "9x9": Board(81, 20, 784, Schedule(10, 0.8)),
    "Even Pixels": Board(64, 16, 48, Schedule(30, 0.9)),
}


class Inputs:
    """Seeded random tensors on a device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normals(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator, device=self.device)

    def subset(self, batch: int, number: int, size: int) -> Tensor:
        """(batch, size) int64: `size` of 0..number-1, ascending."""
        keys = torch.rand(batch, number, generator=self.generator, device=self.device)
        return keys.argsort(1)[:, :size].sort(1).values

    def counters(self, batch: int) -> dict[str, Tensor]:
        """Arguments of kernels that draw random numbers; chain ids in random order."""
        ids = torch.randperm(batch, generator=self.generator, device=self.device)
        number = torch.tensor(ITERATION, device=self.device)
        return {"seed": seed_tensor(SEED, self.device), "iteration": number, "chain_ids": ids}


def renoise_chosen(board: Board, batch: int, device: torch.device, seed: int) -> Operation:
    """The beginning of an iteration: choose A of each chain's free patches, three quarters of all, and renoise them."""
    inputs = Inputs(device, seed)
    free = torch.ones(batch, board.num_patches, dtype=torch.bool, device=device)
    free.scatter_(1, inputs.subset(batch, board.num_patches, board.num_patches // 4), False)
    size = torch.full((batch,), board.slots, device=device)
    choice = renoise.PatchChoice(free, size, torch.tensor(ITERATION, device=device))
    return _renoise(board, inputs, torch.zeros_like(free), board.slots, STREAM_RENOISE, choice)


def renoise_all(board: Board, batch: int, device: torch.device, seed: int) -> Operation:
    """The beginning of a generation: all patches become noise, so nearly all time goes to normals."""
    every = torch.ones(batch, board.num_patches, dtype=torch.bool, device=device)
    return _renoise(board, Inputs(device, seed), every, board.num_patches, STREAM_INITIAL, None)


def _renoise(
    board: Board, inputs: Inputs, mask: Tensor, slots: int, stream: int, choice: renoise.PatchChoice | None
) -> Operation:
    (batch, num_patches), device = mask.shape, mask.device
    original, counters = inputs.normals(batch, num_patches, board.numel), inputs.counters(batch)
    z, ids = original.clone(), counters["chain_ids"]
    index, start = (torch.zeros(batch, slots, dtype=torch.int32, device=device) for _ in range(2))
    count, level = torch.zeros(batch, dtype=torch.int32, device=device), torch.zeros(batch, slots, device=device)
    slots_out = renoise.Slots(index, count, level, start, torch.zeros_like(ids))

    def run() -> Iterable[Tensor]:
        renoise.renoise(z, mask, slots_out, stream=stream, choice=choice, **counters)
        return z, mask, index, count, level, start

    def twin() -> Iterable[Tensor]:
        renoise._renoise(z, mask, slots_out, counters["seed"], stream, counters["iteration"], ids, choice, None)
        return z, mask, index, count, level, start

    def definition() -> Iterable[Tensor]:
        if choice is None:
            patches = torch.arange(num_patches, device=device).repeat(batch, 1)
        else:
            patches = definitions.choose(choice.free, slots, SEED, ITERATION, ids)
        noise = definitions.normals(SEED, stream, 0, ITERATION, ids, patches, board.numel)
        return definitions.renoise(original, patches, noise)

    moved = renoise.bytes_moved(batch, num_patches, slots, board.numel)
    return Operation(
        run, twin, definition, moved, NORMAL_FLOPS * batch * slots * board.numel, lambda: z.copy_(original)
    )


def gather_slots(board: Board, batch: int, device: torch.device, seed: int) -> Operation:
    """The inputs of a network of the active slots, a tenth of them padding, with levels of a table of sixteen."""
    inputs, (num_patches, slots, numel, _) = Inputs(device, seed), board
    z, index = inputs.normals(batch, num_patches, numel), inputs.subset(batch, num_patches, slots).int()
    index[:, slots - slots // 10 :] = -1
    levels = torch.arange(16, device=device) / 15
    level = levels[inputs.integers(16, batch, slots)]
    return Operation(
        lambda: slot_inputs.slot_inputs(z, index, level, levels, z.dtype),
        lambda: slot_inputs._slot_inputs(z, index, level, levels, z.dtype),
        lambda: definitions.slot_inputs(z, index, level, levels),
        slot_inputs.bytes_moved(batch, slots, numel, z.element_size()),
        5 * batch * slots,  # comparisons of the search
    )


def advance_half_way(board: Board, batch: int, device: torch.device, seed: int) -> Operation:
    """A step at which the first slot of the second half starts."""
    inputs, slots = Inputs(device, seed), board.slots
    starts, half = board.schedule.starts(slots), slots // 2
    original = torch.full((batch, slots), -1, dtype=torch.int32, device=device)
    for k in range(half):
        original[:, k] = starts[k]
    original = original.gather(1, inputs.normals(batch, slots).argsort(1))
    start, order = original.clone(), inputs.normals(batch, slots)
    level, previous = torch.zeros(2, batch, slots, device=device)
    tables = board.schedule.tables(board.num_patches).to(device)
    step, count = torch.zeros(batch, dtype=torch.int64, device=device), torch.full((batch,), slots, device=device).int()

    def reset() -> None:
        start.copy_(original)
        step.fill_(starts[half] - 1)

    def run() -> Iterable[Tensor]:
        at = {"count": count, "step": step, "log_variance": order}
        advance.advance(start, level, previous, **at, **tables._asdict())
        return start, level

    def twin() -> Iterable[Tensor]:
        advance._advance(start, level, previous, count, step, order, *tables)
        return start, level

    def definition() -> Iterable[Tensor]:
        return definitions.advance(original, starts[half], order, board.schedule)

    moved = advance.bytes_moved(batch, slots)
    return Operation(run, twin, definition, moved, 3 * batch * slots, reset)


def denoise_all(board: Board, batch: int, device: torch.device, seed: int) -> Operation:
    """A step at which every slot moves, from a level of 0.1 to 1 to a tenth less."""
    inputs, (num_patches, slots, numel, _) = Inputs(device, seed), board
    original, counters = inputs.normals(batch, num_patches, numel), inputs.counters(batch)
    z, index = original.clone(), inputs.subset(batch, num_patches, slots).int()
    tenths = inputs.integers(10, batch, slots)
    level, next_level = (tenths + 1) / 10, tenths / 10
    u, v = inputs.normals(batch, slots, numel), inputs.normals(batch, slots, numel).sigmoid()
    arguments = {"index": index, "level": level, "next_level": next_level, "velocity": u, "variance_mix": v}
    at = 7
    step, ids = torch.full((batch,), at, device=device), counters["chain_ids"]

    def run() -> Iterable[Tensor]:
        denoise.denoise(z, **arguments, step=step, stochasticity=ETA, temperature=1.0, **counters)
        return (z,)

    def twin() -> Iterable[Tensor]:
        random = counters["seed"], STREAM_POSTERIOR, step[:, None], counters["iteration"], ids
        denoise._denoise(z, *arguments.values(), ETA, 1.0, random, None)
        return (z,)

    def definition() -> Iterable[Tensor]:
        xi = definitions.normals(SEED, STREAM_POSTERIOR, at, ITERATION, ids, index, numel)
        return (definitions.denoise(original, index, (level, next_level), u, v, xi, ETA),)

    moved, numbers = denoise.bytes_moved(batch * slots, numel, 4, True), batch * slots * numel
    return Operation(run, twin, definition, moved, (NORMAL_FLOPS + 8) * numbers, lambda: z.copy_(original))


def accept_half(board: Board, batch: int, device: torch.device, seed: int) -> Operation:
    """The end of an iteration with a reward, where half of the chains keep their old samples."""
    inputs, numel = Inputs(device, seed), board.num_patches * board.numel
    proposed, old = inputs.normals(2, batch, numel)
    gain = torch.where(torch.arange(batch, device=device) % 2 == 0, 1.0, -1e3).double()
    values, kept = proposed.clone(), accept.Kept(old.clone(), torch.zeros_like(gain))
    accepted, temperature = torch.zeros(batch, dtype=torch.bool, device=device), torch.ones_like(gain[0])
    given = {"kept": kept, "accepted": accepted, "temperature": temperature, **inputs.counters(batch)}

    def run(function: Callable[..., None]) -> Iterable[Tensor]:
        function(values, gain, **given)
        return values, *kept, accepted

    def reset() -> None:
        values.copy_(proposed)
        kept.values.copy_(old)
        kept.reward.zero_()

    return Operation(
        lambda: run(accept.accept),
        lambda: run(accept._accept),
        lambda: definitions.accept(proposed, old, gain),
        accept.bytes_moved(batch, numel, 4),
        3 * batch,
        reset,
    )
