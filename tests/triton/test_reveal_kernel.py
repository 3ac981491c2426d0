"""The kernel of `reveal` against its torch twin."""

import pytest
import torch

pytest.importorskip("triton")

from ipr_fast.kernels import reveal as module
from ipr_fast.kernels.philox import seed_tensor
from ipr_fast.kernels.reveal import reveal
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.tokens import TokenSchedule

MASK = 9


def state(batch, positions, slots, generator):
    """Chains with 0 to `slots` active positions, half of them masked."""
    size = torch.randint(0, slots + 1, (batch, 1), generator=generator)
    size[0], size[-1] = 0, slots
    unknown = torch.rand(batch, positions, generator=generator).argsort(1).argsort(1) < size
    tokens = torch.randint(0, MASK, (batch, positions), generator=generator)
    hidden = unknown & (torch.rand(batch, positions, generator=generator) < 0.5)
    return tokens.masked_fill(hidden, MASK), ActivePatches.from_mask(unknown, slots)


@pytest.mark.parametrize(
    ("batch", "positions", "slots"), [(1, 1, 1), (3, 2, 1), (5, 33, 17), (2, 700, 600), (4, 20, 20)]
)
@pytest.mark.parametrize(
    "schedule",
    [
        TokenSchedule(None, "count", "random"),
        TokenSchedule(5, "count", "confidence"),
        TokenSchedule(7, "count", "entropy", "rescale"),
        TokenSchedule(7, "count", "margin", "conf"),
        TokenSchedule(6, "independent"),
        TokenSchedule(6, "independent", remask="conf"),
        TokenSchedule(20, "independent", remask="loop"),
        TokenSchedule(7, "count", "confidence", "quality"),
    ],
    ids=lambda s: f"{s.reveal}-{s.order}-{type(s.remask).__name__}",
)
def test_kernel_and_twin_reveal_and_mask_the_same_positions(
    batch, positions, slots, schedule, device, generator, monkeypatch
):
    tokens, active = state(batch, positions, slots, generator)
    tables, strategy = schedule.tables(positions), schedule.remask
    by_confidence = strategy is not None and strategy.by_confidence
    keeps = by_confidence and not strategy.by_quality
    score = torch.randint(0, 4, active.index.shape, generator=generator).float()
    special = torch.tensor([torch.inf, torch.nan, 1e-40, -0.0])[torch.randint(0, 4, score.shape, generator=generator)]
    score = torch.where(score == 3, special, score)
    psi, confidence = torch.rand(2, *active.index.shape, generator=generator)
    drawn = torch.randint(-1, MASK, active.index.shape, generator=generator)
    for step in (0, 2, int(tables.steps.max()) - 1, int(tables.steps.max()) + 1):
        found = []
        for limit in (module.MAX_PROGRAM_SLOTS, 0):
            monkeypatch.setattr(module, "MAX_PROGRAM_SLOTS", limit)
            out, kept = tokens.clone().to(device), psi.clone().to(device)
            hidden = torch.full_like(active.index, -7).to(device)
            last = torch.full((batch,), step - 1, device=device)
            reveal(
                out,
                drawn.to(device),
                score=None if schedule.order == "random" else score.to(device),
                confidence=confidence.to(device) if keeps else None,
                index=active.index.to(device),
                count=active.count.to(device),
                mask_id=MASK,
                **{
                    name: None if table is None else table.to(device)
                    for name, table in tables._asdict().items()
                    if name != "steps"
                },
                psi=kept if by_confidence else None,
                hidden=hidden,
                step=last,
                iteration=torch.tensor(2**32 - 1, device=device),
                chain_ids=torch.arange(batch, device=device) + (2**32 - batch),
                seed=seed_tensor(2**64 - 3, device),
            )
            found.append((out, kept, last, hidden))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert (found[0][2] == step).all()
        masked = active.occupied & (active.gather(found[0][0].cpu()) == MASK)
        assert torch.equal(found[0][3].cpu(), torch.where(masked, active.index, -1))
        inactive = torch.ones_like(tokens, dtype=torch.bool)
        inactive[
            torch.arange(batch)[:, None].expand_as(active.index)[active.occupied], active.index[active.occupied].long()
        ] = False
        assert torch.equal(found[0][0].cpu()[inactive], tokens[inactive])
