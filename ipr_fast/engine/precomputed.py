"""Results that a model computes ahead of its calls: a table of all levels, and a context of the clean patches.

These are the optional methods `tabulate` and `prepare` of the Denoiser protocol. The model allocates each result once
and overwrites it afterwards, so that captured graphs read the new values.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ipr_fast.engine.buffers import LaneState, SlotState
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.sampling import user_code
from ipr_fast.sampling.condition import call_arguments
from ipr_fast.sampling.prediction import as_taken


def guarded_call(model: Denoiser, state: LaneState, slots: SlotState, **more: Tensor) -> AbstractContextManager[None]:
    """Guard a call of the model on these lanes: it must not write to its inputs."""
    inputs = {slots.values_name: state.values, "active.index": slots.index, "active.count": slots.count, **more}
    return user_code.model_call(model, **inputs, **({} if state.condition is None else state.condition.named))


class Precomputed:
    """Table and context of one model for `num_lanes` lanes.

    may_replace: `prepare` may return another context in place of overwriting `out`, which a CUDA graph does not allow.
    """

    def __init__(self, model: Denoiser, num_lanes: int, device: torch.device) -> None:
        self.has_context, self.has_table = contract.prepares(model), contract.tabulates(model)
        self.slot_dtype: torch.dtype | None = model.slot_dtype if contract.takes_slots(model) else None
        self.is_conditioned = self.has_context and contract.prepare_takes_condition(model)
        self.num_lanes = num_lanes
        self.may_replace = True
        self.context: Any = None
        self.table: Any = None
        self.levels = torch.empty(0, dtype=torch.float32, device=device)  # (R,), those of the table's rows

    def set_levels(self, levels: Tensor) -> bool:
        """Set the levels (R,) of the table. Returns True if it must be reallocated for more rows.

        The last level is repeated up to a power of two, so that few sizes serve all schedules.
        """
        size = max(16, len(self.levels), 1 << (len(levels) - 1).bit_length())
        grows = size > len(self.levels)
        if grows:
            with torch.inference_mode(False):  # normal tensors count the writes to them
                self.levels = torch.empty(size, dtype=torch.float32, device=self.levels.device)
            self.table = None
        self.levels.copy_(torch.cat([levels, levels[-1:].expand(size - len(levels))]))
        return grows

    @torch.inference_mode()
    def tabulate(self, model: Any) -> None:
        """Fill the table."""
        with user_code.model_call(model, levels=self.levels):
            table = model.tabulate(self.levels, out=self.table)
        if self.table is not None and table is not self.table:
            raise ValueError("model: tabulate must overwrite `out` and return it, got another table")
        self.table = table

    def prepare(self, model: Any, num_lanes: int, state: LaneState, slots: SlotState, whole: bool = False) -> None:
        """Compute the context of the first lanes. The first call computes all lanes, to allocate the buffer.

        whole: tell the model that there is no context.
        """
        if self.context is None:
            with guarded_call(model, state, slots):
                active = replace(slots.active, whole=whole)
                self.context = model.prepare(as_taken(model, state.values), active, **self._options(state))
            if self.context is None:
                raise ValueError("model: prepare must return a context, got None")
            if self.lanes_called(num_lanes) == self.num_lanes:
                return
        num_lanes = self.lanes_called(num_lanes)
        out, state, slots = self._context(num_lanes), state.first(num_lanes), slots.first(num_lanes)
        with guarded_call(model, state, slots):
            active = replace(slots.active, whole=whole)
            context = model.prepare(as_taken(model, state.values), active, out=out, **self._options(state))
        if context is out:
            return
        if not self.may_replace or num_lanes < self.num_lanes:
            raise ValueError("model: prepare must overwrite `out` and return it, got another context")
        self.context = context

    def arguments(self, num_lanes: int, state: LaneState) -> dict[str, Any]:
        """Return the keyword arguments of a model call on the first lanes: `context`, `table`, `condition`, if any.

        state: of these lanes.
        """
        context = {} if self.context is None else {"context": self._context(self.lanes_called(num_lanes))}
        return context | self._table() | call_arguments(state.condition)

    def lanes_called(self, num_lanes: int) -> int:
        """Return the lanes that a call must include to compute `num_lanes`: all, if its context has no `first`."""
        return num_lanes if self.context is None or hasattr(self.context, "first") else self.num_lanes

    def _context(self, num_lanes: int) -> Any:
        return self.context if num_lanes == self.num_lanes else self.context.first(num_lanes)

    def _options(self, state: LaneState) -> dict[str, Any]:
        """Return the keyword arguments of `prepare`."""
        return self._table() | (call_arguments(state.condition) if self.is_conditioned else {})

    def _table(self) -> dict[str, Any]:
        return {} if self.table is None else {"table": self.table}
