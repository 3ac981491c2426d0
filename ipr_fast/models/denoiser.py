"""What the engine asks of a model."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ipr_fast.sampling.patches import ActivePatches, PatchGrid
from ipr_fast.sampling.prediction import Prediction


@runtime_checkable
class Denoiser(Protocol):
    """A model of a sequential diffusion process: any callable with a `grid`.

    **Rows are lanes, not chains.** Row b of a call is whichever chain is in lane b at that moment: chains are sorted by
    length, leave as they finish, and pass through in turns (`max_chains`). A tensor that a model keeps for each chain,
    such as labels, would meet the rows of other chains. A model must compute each row from that row's inputs alone.

    `model(patches, levels, active=None)` gets patches (B, N, P) float32 and, without `active`, levels (B, N) in [0, 1];
    it returns the Prediction of all N patches. With `active`, levels are those of the slots (B, A), every other patch
    is clean context, and the Prediction is that of the slots; its values for padding slots are not used. A model that
    writes into its inputs is refused, as is one in training mode that has dropout, batch norm or another layer that
    differs there. The engine calls it in `torch.inference_mode`; a model that needs gradients, for guidance, opens
    `torch.inference_mode(False)` and `torch.enable_grad()` and clones its inputs there.

    Optional methods. They are used only if the model's call takes what they return, `context` or `table`, and must then
    have the signature below.

    - `prepare(patches, active, out=None) -> context`, called once per iteration: whatever depends on the clean context
      alone. Calls are then `model(patches, levels, active, context=context)`. `out` is the context of an earlier
      iteration, perhaps with another number of slots: to be overwritten and returned. A context may have
      `first(chains)`, the context of the first chains; chains that have finished are then left out of later calls.
    - `tabulate(levels, out=None) -> table`, called once a call with every level (R,) float32 that slots can have,
      ascending, the last one perhaps repeated: whatever depends on the level alone. Calls are then
      `model(patches, levels, active, table=table)`. `out` is an earlier table for as many levels: to be overwritten
      and returned. A model that also has `prepare` gets it there too: `prepare(patches, active, out=out, table=table)`.

    Optional attributes.

    - `generate_schedule` and `refine_schedule` (`ipr_fast.Schedule`), its defaults.
    - `value_range` (low, high) of the samples that it was trained on: others get a warning. Without it, none do.
    - `mix_bounds` (low, high) of its variance mix, by default (0, 1): a first call outside of them gets a warning.
    """

    grid: PatchGrid

    def __call__(
        self, patches: Tensor, levels: Tensor, active: ActivePatches | None = None, **prepared: Any
    ) -> Prediction: ...
