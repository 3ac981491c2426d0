"""A self-check of a new model: run it on random inputs and compare it with the contract of `Denoiser`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipr_fast import checks
from ipr_fast.engine.capture_check import CaptureError, Watch, without_compile
from ipr_fast.engine.precision import float32_products
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.prediction import Prediction, mix_range
from ipr_fast.sampling.user_code import model_call

ROUNDINGS, MAX_TOLERANCE = 1000, 0.1  # allowed between equal calls, in eps of the largest number; and at most


def check_model(model: Denoiser, device: torch.device | str | None = None) -> str:
    """Check a model against the contract of `ipr_fast.Denoiser` by some twenty calls with at most four random samples.

    device: by default where the model's parameters are, else the CPU. What random inputs cannot show is whether levels
    and velocities mean the same to the model as to the engine.

    Returns a line for each check. Raises ValueError with a line for each failure, or at once where the model cannot be
    called, is in training mode or returns other shapes. Other errors in the model are raised as they are.
    """
    grid = contract.denoiser(model)
    device = checks.usable_device("device", device or contract.device_of(model) or "cpu")
    contract.model_device(model, device)
    passed, failures = [], []
    with torch.inference_mode(), float32_products(device, tf32=False):
        generator, slots = torch.Generator("cpu").manual_seed(0), max(1, grid.num_patches // 4)
        low, high = contract.bounds(model, "value_range") or (-1.0, 1.0)
        shape = 4, grid.num_patches, grid.patch_numel
        x = low + (high - low) * torch.rand(shape, generator=generator, device="cpu").to(device)
        counts = torch.tensor(
            [slots, slots // 2, 0, slots], device="cpu"
        )  # a row with padding, and one without active patches
        mask = torch.rand(x.shape[:2], generator=generator, device="cpu").argsort(1) < counts[:, None]
        some = _Inputs.noised(x, mask, slots, generator)
        run = _Checks(model, some, _Inputs.noised(x, torch.ones_like(mask), grid.num_patches, generator))
        for name, check in CHECKS.items():
            try:
                check(run)
                passed.append(f"ok: {name}")
            except (ValueError, CaptureError) as error:
                failures.append(f"{name}: {error}")
    if failures:
        raise ValueError(
            f"model: {checks.name_of(model)} fails {len(failures)} of {len(CHECKS)} checks\n" + "\n".join(failures)
        )
    return "\n".join(passed)


class _Inputs(NamedTuple):
    """The arguments of a call: patches (B, N, P), levels (B, A), active slots."""

    patches: Tensor
    levels: Tensor
    active: ActivePatches

    @classmethod
    def noised(cls, x: Tensor, mask: Tensor, slots: int, generator: torch.Generator) -> _Inputs:
        """Make the patches of a mask (B, N) active, at random levels."""
        active = ActivePatches.from_mask(mask.to(x.device), slots)
        levels = torch.rand(active.index.shape, generator=generator, device="cpu").to(x.device) * active.occupied
        level = active.scatter(levels, mask.shape[1])[..., None]
        noise = torch.randn(x.shape, generator=generator, device="cpu").to(x.device)
        return cls((1 - level) * x + level * noise, levels, active)

    def rows(self, rows: list[int], slots: int | None = None) -> _Inputs:
        active = ActivePatches(self.active.index[rows, :slots], self.active.count[rows])
        return _Inputs(self.patches[rows], self.levels[rows, :slots], active)


class _Checks:
    """The checks of one model; `some` has a few active patches, `every` has all of them active."""

    def __init__(self, model: Denoiser, some: _Inputs, every: _Inputs) -> None:
        self.model, self.some, self.every = model, some, every
        self.table: dict[str, Any] = {}
        self.expected = self.call(some)
        weights = [w for w in model.parameters() if w.is_floating_point()] if isinstance(model, nn.Module) else []
        eps = max(torch.finfo(tensor.dtype).eps for tensor in (self.expected.velocity, *weights))
        self.tolerance = min(MAX_TOLERANCE, ROUNDINGS * eps)

    def call(self, inputs: _Inputs, *, active: bool = True, **prepared: Any) -> Prediction:
        """Call the model, with `active` or without; it must not write to its inputs, and return the right shapes."""
        patches, levels, slots = inputs
        named = {"patches": patches, "levels": levels, "active.index": slots.index, "active.count": slots.count}
        with model_call(self.model, **named):
            prediction = self.model(patches, levels, *([slots] if active else []), **prepared)
        contract.prediction(prediction, (*levels.shape, patches.shape[-1]))
        return prediction

    def agree(self, when: str, inputs: _Inputs, found: Prediction, expected: Iterable[Tensor | None]) -> None:
        """Raise ValueError unless predictions of the occupied slots are equal to rounding."""
        occupied = inputs.active.occupied
        for name, ours, theirs in zip(found._fields, found, expected, strict=True):
            if ours is not None and theirs is not None and occupied.any():
                error = (ours[occupied] - theirs[occupied]).abs().max()
                if error.isnan():
                    return  # told by `finite`
                allowed = self.tolerance * theirs[occupied].abs().max().clamp_min(1)
                if not error <= allowed:
                    raise ValueError(f"{when}, {name} differs by {error:.2g}, expected at most {allowed:.2g}")

    def finite(self) -> None:
        for inputs, prediction in ((self.some, self.expected), (self.every, self.call(self.every))):
            for name, field in prediction._asdict().items():
                if field is not None and not field[inputs.active.occupied].isfinite().all():
                    raise ValueError(f"{name} has NaN or inf")

    def mix(self) -> None:
        complaint = contract.mix_complaint(self.model, mix_range(self.expected.variance_mix, self.some.active.occupied))
        if complaint is not None:
            raise ValueError(complaint)

    def rows(self) -> None:
        self.agree("called again", self.some, self.call(self.some), self.expected)
        count = int(self.some.active.count[1])
        for when, rows, slots in (("in another batch", [3, 1], None), ("without padding slots", [1], count)):
            inputs = self.some.rows(rows, slots)
            self.agree(when, inputs, self.call(inputs), (f if f is None else f[rows, :slots] for f in self.expected))

    def all_active(self) -> None:
        self.agree("without `active`", self.every, self.call(self.every, active=False), self.call(self.every))

    def some_active(self) -> None:
        """A model without `prepare` knows context by its level 0 alone, so that a full call predicts the same."""
        if contract.prepares(self.model):
            return
        patches, levels, active = self.some
        full = self.call(_Inputs(patches, active.scatter(levels, patches.shape[1]), active), active=False)
        when = "with `active`, other than the full call's predictions .at(active) at levels active.scatter(levels, N)"
        self.agree(when, self.some, self.expected, full.at(active))

    def prepared(self) -> None:
        model, (patches, _, active) = self.model, self.some
        if contract.tabulates(model):
            levels = torch.cat([self.some.levels.flatten(), self.every.levels.flatten()]).unique()
            table = self.table["table"] = model.tabulate(levels / 2)
            if model.tabulate(levels, out=table) is not table:
                raise ValueError("tabulate must overwrite and return the table passed as `out`")
        made = dict(self.table)
        if contract.prepares(model):
            context = made["context"] = model.prepare(self.every.patches, self.every.active, **self.table)
            if model.prepare(patches, active, out=context, **self.table) is not context:
                raise ValueError("prepare must overwrite and return the context passed as `out`")
        for when in ("with a context or table", "called again with a context or table"):  # calls may write to a context
            self.agree(when, self.some, self.call(self.some, **made), self.expected)
        if hasattr(made.get("context"), "first"):
            inputs, made["context"] = self.some.rows([0, 1]), made["context"].first(2)
            expected = (field if field is None else field[:2] for field in self.expected)
            self.agree("with context.first", inputs, self.call(inputs, **made), expected)

    def capture(self) -> None:
        model, (patches, levels, active) = self.model, self.some
        with without_compile(), Watch(checks.name_of(model), patches.device if patches.is_cuda else None):
            made = {"context": model.prepare(patches, active, **self.table)} if contract.prepares(model) else {}
            model(patches, levels, active, **self.table, **made)


CHECKS = {
    "predictions are finite": _Checks.finite,
    "the variance mix lies in mix_bounds": _Checks.mix,
    "a row depends on its own inputs alone": _Checks.rows,
    "with all patches active, calls with and without `active` agree": _Checks.all_active,
    "with some patches active, predictions are those of a full call": _Checks.some_active,
    "prepare and tabulate change nothing": _Checks.prepared,
    "a CUDA graph can hold the operations": _Checks.capture,
}
