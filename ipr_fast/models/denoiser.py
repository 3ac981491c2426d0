"""The protocol of a model: `Denoiser`, and the optional methods that save work."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ipr_fast.sampling.patches import ActivePatches, Grid
from ipr_fast.sampling.prediction import Prediction


@runtime_checkable
class Denoiser(Protocol):
    """A model of a sequential diffusion process: a callable with a `grid`. `ipr_fast.check_model` tests one.

    Row b of a call is not row b of your x: rows are the chains that run now, sorted by length, and others take their
    places as they finish (`max_chains`). So a model must not keep a tensor per chain: labels or embeddings come as
    `condition=`, with the rows of the call's chains, if its calls take that keyword argument; likewise to `prepare`.

    The process is rectified flow: a patch x at level t in [0, 1] is `z_t = (1 - t) x + t eps` with eps ~ N(0, 1), and
    the model predicts the velocity `u = eps - x`. Level 0 is clean, level 1 pure noise. Each patch has its own level.

    `model(patches, levels)` gets patches (B, N, P) float32 (see `patch_dtype`) and levels (B, N) float32, and returns
    the Prediction of all N patches. `model(patches, levels, active)` gets the levels (B, A) of the active slots alone,
    and returns the Prediction of the slots, (B, A, P): slot a of row b is patch `active.index[b, a]`, and every patch
    that is in no slot is clean context, of level 0. A row may have fewer than A active patches, down to none: its last
    slots are padding, with index -1 and level 0, whose predictions are ignored.

    The engine relies on this:

    - **A row is computed from that row's inputs alone.**
    - **Inputs are read only**: patches, levels, active and condition are the engine's own buffers. A write is a
      ValueError; torch does not count writes through `.data` or NumPy, which only `check_model` finds.
    - **Evaluation mode**: call `model.eval()`. A module in training mode that has dropout, batch norm or another layer
      that differs there is a ValueError.
    - **No gradients**: calls run under `torch.inference_mode`. A model that needs gradients, for guidance, opens
      `torch.inference_mode(False)` and `torch.enable_grad()` and clones its inputs there.
    - **No waiting on the host**, on a GPU: calls are captured as CUDA graphs, so there is no `.item()`, no branch on
      values and no shape that depends on data. `backend="torch"` runs models that need these.

    Optional attributes:

    - `generate_schedule` and `refine_schedule` (`ipr_fast.Schedule`): the defaults of the calls that take a schedule.
    - `patch_dtype`: the type in which calls get the patches. By default float32, and for a module whose weights are all
      bfloat16 or all float16, that type. Levels are float32, and so is the engine's state.
    - `value_range` (low, high): the range of x in training, (-1, 1) for the bundled models. Samples that clearly lie
      in another range get a warning. Without it, or if it is None, the range is not checked.
    - `preserves_variance`: the variance mix is between the bounds of a flow z = a x + b eps with a^2 + b^2 = 1, on
      which the model was trained (see `Parameterised`); by default those of rectified flow.
    - `mix_bounds` (low, high): the range of the variance mix, by default (0, 1). A call whose first step leaves it gets
      a warning.

    Optional methods: `prepare` (see `ContextDenoiser`) and `tabulate` (see `TableDenoiser`); with both of them, `slots`
    (see `SlotDenoiser`).
    """

    @property
    def grid(self) -> Grid:
        """How samples are divided into patches: a PatchGrid, or anything with its names (`sampling.patches.Grid`)."""
        ...

    def __call__(self, patches: Tensor, levels: Tensor, active: ActivePatches | None = None) -> Prediction: ...


class ContextDenoiser(Denoiser, Protocol):
    """A Denoiser that computes what depends on the clean context alone once per iteration, not in every step.

    Its calls take a keyword argument `context`. Otherwise a method named `prepare` is ignored.
    """

    def prepare(self, patches: Tensor, active: ActivePatches, out: Any = None, **table: Any) -> Any:
        """Return the context; steps are then `model(patches, levels, active, context=context)`.

        out: the context of an earlier iteration, perhaps with another number of slots, to be overwritten and returned.
        table: passed as `table=` if the model has `tabulate` too.

        A context may have a method `first(chains)`, the context of the first chains: the engine then drops chains that
        have finished from later steps.
        """
        ...


class TableDenoiser(Denoiser, Protocol):
    """A Denoiser that computes what depends on levels alone once per call of the engine, not in every step.

    Its calls take a keyword argument `table`. Otherwise a method named `tabulate` is ignored.
    """

    def tabulate(self, levels: Tensor, out: Any = None) -> Any:
        """Return the table; steps are then `model(patches, levels, active, table=table)`.

        levels: every level (R,) float32 that a slot can have, ascending from 0, the last one perhaps repeated.
        out: an earlier table for as many levels, to be overwritten and returned.
        """
        ...


class SlotDenoiser(ContextDenoiser, TableDenoiser, Protocol):
    """A Denoiser with `prepare` and `tabulate` whose steps read the patches of their slots alone.

    Its calls take a keyword argument `slots`, an `ipr_fast.kernels.slot_inputs.SlotInputs`: the engine gathers these
    once an iteration and then updates what moves. Without a `slot_dtype` the argument is not passed.
    """

    @property
    def slot_dtype(self) -> torch.dtype:
        """The type in which the network takes the slots' patches."""
        ...

    def __call__(self, patches: Tensor, levels: Tensor, active: ActivePatches | None = None, **prepared: Any) -> Any:
        """Return a Prediction; with `context`, `table` and `slots` perhaps a `sampling.prediction.LogitPrediction`."""
        ...
