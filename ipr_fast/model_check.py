"""A self-check of a new model: run it on random inputs and compare it with the contract of `Denoiser`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipr_fast import checks
from ipr_fast.engine.capture_check import CaptureError, Watch, without_compile
from ipr_fast.engine.engine import Engine
from ipr_fast.engine.patch_lanes import PatchSettings
from ipr_fast.engine.precision import float32_products
from ipr_fast.engine.runner import Runner
from ipr_fast.golden import GoldenStep, check_golden
from ipr_fast.models import contract
from ipr_fast.models.denoiser import Denoiser
from ipr_fast.models.token_denoiser import TokenDenoiser
from ipr_fast.sampling.condition import Condition, Conditioning, call_arguments
from ipr_fast.sampling.condition import checked as checked_condition
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.prediction import Prediction, as_taken, mix_range
from ipr_fast.sampling.reference import ReferenceEngine
from ipr_fast.sampling.schedule import Sampling, Schedule
from ipr_fast.sampling.selection import Selection
from ipr_fast.sampling.tokens import TokenPrediction, check_prediction
from ipr_fast.sampling.user_code import model_call

SAMPLES = 4
ROUNDINGS, MAX_TOLERANCE = 1000, 0.1  # allowed between equal calls, in eps of the largest number; and at most


def check_model(
    model: Denoiser | TokenDenoiser,
    device: torch.device | str | None = None,
    condition: Conditioning | None = None,
    golden: GoldenStep | None = None,
) -> str:
    """Check a model against the contract of `ipr_fast.Denoiser` or `TokenDenoiser`: some twenty calls with few samples.

    device: by default where the model's parameters are, else the CPU. condition: of four different samples, for a model
    whose calls take one. golden: a step that the model's own sampler has computed. Random inputs cannot show whether
    levels and velocities mean the same to the model as to the engine; this does.

    Returns a line for each check. Raises ValueError with a line for each failure, or at once where the model cannot be
    called, is in training mode or returns other shapes. Other errors in the model are raised as they are.
    """
    is_tokens = contract.is_token_denoiser(model)
    count = (contract.token_denoiser(model) if is_tokens else contract.denoiser(model)).num_patches
    device = checks.usable_device("device", device or contract.device_of(model) or "cpu")
    contract.model_device(model, device)
    given = checked_condition(condition, SAMPLES, device)
    contract.condition(model, given is not None)
    golden = check_golden(golden, None if given is None else SAMPLES)
    if golden is not None and is_tokens:
        raise ValueError("golden must be None for a model of tokens, whose steps are random")
    passed: list[str] = []
    failures: list[str] = []
    with torch.inference_mode(), float32_products(device, tf32=False):
        generator, slots = torch.Generator("cpu").manual_seed(0), max(1, count // 4)
        counts = torch.tensor([slots, slots // 2, 0, slots], device="cpu")  # a row with padding, one without patches
        mask = torch.rand(SAMPLES, count, generator=generator, device="cpu").argsort(1) < counts[:, None]
        inputs = _Inputs.of_tokens if is_tokens else _Inputs.of_patches
        some, every = (
            inputs(model, each.to(device), number, generator, given)
            for each, number in ((mask, slots), (torch.ones_like(mask), count))
        )
        run = (_TokenChecks if is_tokens else _Checks)(model, some, every)
        all_checks: dict[str, Callable[[Any], None]] = dict(run.checks)
        if golden is not None:
            step = golden
            all_checks["a step is that of the model's own sampler"] = lambda run: step.check(model, given, device)
        for name, check in all_checks.items():
            if name == STEPS and failures:
                continue  # would fail too, and say less
            try:
                check(run)
                passed.append(f"ok: {name}")
            except (ValueError, CaptureError) as error:
                failures.append(f"{name}: {error}")
    if failures:
        raise ValueError(
            f"model: {checks.name_of(model)} fails {len(failures)} of {len(all_checks)} checks\n" + "\n".join(failures)
        )
    return "\n".join(passed)


class _Inputs(NamedTuple):
    """The arguments of a call: patches (B, N, P) with levels (B, A), or tokens (B, N); active slots; condition."""

    values: Tensor
    levels: Tensor | None
    active: ActivePatches
    condition: Condition | None

    @classmethod
    def of_patches(
        cls, model: Any, mask: Tensor, slots: int, generator: torch.Generator, condition: Condition | None
    ) -> _Inputs:
        """Make the patches of a mask (B, N) active, at random levels."""
        active, low_high = ActivePatches.from_mask(mask, slots), contract.bounds(model, "value_range") or (-1.0, 1.0)
        shape, device = (*mask.shape, model.grid.patch_numel), mask.device
        x = low_high[0] + (low_high[1] - low_high[0]) * torch.rand(
            shape, generator=generator, dtype=torch.float32, device="cpu"
        ).to(device)
        levels = torch.rand(active.index.shape, generator=generator, dtype=torch.float32, device="cpu")
        levels[:1, :1] = 1.0  # as in the first step of a run
        levels = levels.to(device) * active.occupied
        level = active.scatter(levels, mask.shape[1])[..., None]
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)
        return cls((1 - level) * x + level * noise, levels, active, condition)

    @classmethod
    def of_tokens(
        cls, model: Any, mask: Tensor, slots: int, generator: torch.Generator, condition: Condition | None
    ) -> _Inputs:
        """Make the positions of a mask (B, N) active, about half of them revealed."""
        vocabulary = model.vocabulary
        ids = torch.tensor([each for each in range(vocabulary.size) if each not in vocabulary.forbidden], device="cpu")
        tokens = ids[torch.randint(0, len(ids), mask.shape, generator=generator, device="cpu")].to(mask.device)
        hidden = mask & (torch.rand(mask.shape, generator=generator, device="cpu") < 0.5).to(mask.device)
        tokens = tokens.masked_fill(hidden, vocabulary.mask_id)
        return cls(tokens, None, ActivePatches.from_mask(mask, slots), condition)

    @property
    def named(self) -> dict[str, Tensor]:
        """The tensors by their names in a message."""
        values = {"tokens": self.values} if self.levels is None else {"patches": self.values, "levels": self.levels}
        slots = {"active.index": self.active.index, "active.count": self.active.count}
        return values | slots | ({} if self.condition is None else self.condition.named)

    def rows(self, rows: list[int], slots: int | None = None) -> _Inputs:
        active = ActivePatches(self.active.index[rows, :slots], self.active.count[rows])
        levels = None if self.levels is None else self.levels[rows, :slots]
        condition = None if self.condition is None else self.condition.map(lambda tensor: tensor[rows])
        return _Inputs(self.values[rows], levels, active, condition)

    def with_all_slots(self) -> _Inputs:
        """Return inputs with as many slots as patches, of which most are padding."""
        more = self.values.shape[1] - self.active.index.shape[1]
        index = nn.functional.pad(self.active.index, (0, more), value=-1)
        levels = None if self.levels is None else nn.functional.pad(self.levels, (0, more))
        return self._replace(levels=levels, active=ActivePatches(index, self.active.count))


class _Checks:
    """The checks of one model; `some` has a few active patches, `every` has all of them active."""

    def __init__(self, model: Any, some: _Inputs, every: _Inputs) -> None:
        self.model, self.some, self.every = model, some, every
        self.table: dict[str, Any] = {}
        self.expected = self.call(some)
        weights = [w for w in model.parameters() if w.is_floating_point()] if isinstance(model, nn.Module) else []
        eps = max(
            torch.finfo(dtype).eps for dtype in (torch.float32, self.expected[0].dtype, *(w.dtype for w in weights))
        )
        self.tolerance = min(MAX_TOLERANCE, ROUNDINGS * eps)

    @property
    def checks(self) -> dict[str, Callable[[Any], None]]:
        return CHECKS

    def call(self, inputs: _Inputs, *, active: bool = True, **prepared: Any) -> Any:
        """Call the model, with `active` or without; it must not write to its inputs, and return the right shapes."""
        with model_call(self.model, **inputs.named):
            prediction = self._call(inputs, active, **prepared)
        self.check_shape(prediction, inputs)
        return prediction

    def _call(self, inputs: _Inputs, active: bool = True, **prepared: Any) -> Any:
        arguments = (as_taken(self.model, inputs.values), inputs.levels, inputs.active if active else None)
        given = (each for each in arguments if each is not None)
        return self.model(*given, **prepared, **call_arguments(inputs.condition))

    def check_shape(self, prediction: Any, inputs: _Inputs) -> None:
        num_patches, numel = inputs.values.shape[1:]
        contract.prediction(prediction, (*inputs.active.index.shape, numel), num_patches)

    def prepare(self, inputs: _Inputs, **options: Any) -> Any:
        """Call the model's `prepare`."""
        condition = call_arguments(inputs.condition) if contract.prepare_takes_condition(self.model) else {}
        values = as_taken(self.model, inputs.values)
        return self.model.prepare(values, inputs.active, **options, **self.table, **condition)

    def table_levels(self) -> Tensor:
        """Return the levels of a table, ascending."""
        levels = (each.levels for each in (self.some, self.every))
        return torch.cat([each.flatten() for each in levels if each is not None]).unique()

    def agree(self, when: str, inputs: _Inputs, found: Prediction, expected: Iterable[Tensor | None]) -> None:
        """Raise ValueError unless predictions of the occupied slots are equal to rounding."""
        occupied = inputs.active.occupied
        for name, ours, theirs in zip(found._fields, found, expected, strict=True):
            if ours is not None and theirs is not None and occupied.any():
                error = (
                    (ours[occupied] - theirs[occupied]).masked_fill(ours[occupied] == theirs[occupied], 0).abs().max()
                )
                if error.isnan():
                    return  # told by `finite`
                allowed = self.tolerance * _largest(theirs[occupied]).clamp_min(1)
                if not error <= allowed:
                    raise ValueError(f"{when}, {name} differs by {error:.2g}, expected at most {allowed:.2g}")

    def grid(self) -> None:
        grid, patches = self.model.grid, self.every.values
        images = grid.to_images(patches)
        shapes = tuple(images.shape), (len(patches), *grid.sample_shape)
        if shapes[0] != shapes[1]:
            raise ValueError(f"grid.to_images must return samples {shapes[1]}, got {shapes[0]}")
        if not torch.equal(grid.to_patches(images), patches):
            raise ValueError("grid.to_patches(grid.to_images(patches)) must be the patches, and differs")
        if not torch.equal(images.flatten(1).sort().values, patches.flatten(1).sort().values):
            raise ValueError("grid.to_images must place the numbers of the patches unchanged, and changes some")

    def finite(self) -> None:
        for inputs, prediction in ((self.some, self.expected), (self.every, self.call(self.every))):
            occupied, levels = inputs.active.occupied, inputs.levels
            for name, field in prediction._asdict().items():
                if field is None or field[occupied].isfinite().all():
                    continue
                found = f"{name} has NaN or inf"
                if levels is not None and field[occupied & (levels < 1)].isfinite().all():
                    found += (
                        " at level 1, where the noise tells nothing of the sample; ipr_fast.models.Parameterised turns"
                    )
                    found += " networks that predict noise into Denoisers"
                raise ValueError(found)

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

    def all_slots(self) -> None:
        """With as many slots as patches, a prediction of all patches has the shape of the slots'."""
        inputs, number = self.some.with_all_slots(), self.some.active.index.shape[1]
        found = self.call(inputs)
        first = type(found)(*(field if field is None else field[:, :number] for field in found))
        when = "with as many slots as patches, other than with fewer: are predictions those of the slots, .at(active)?"
        self.agree(when, self.some, first, self.expected)

    def some_active(self) -> None:
        """A model without `prepare` knows context by its level 0 alone, so that a full call predicts the same."""
        if contract.prepares(self.model):
            return
        patches, levels, active, condition = self.some
        assert levels is not None, "of patches"
        every = ActivePatches.from_mask(torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device))
        full = self.call(_Inputs(patches, active.scatter(levels, patches.shape[1]), every, condition), active=False)
        when = "with `active`, other than the full call's predictions .at(active) at levels active.scatter(levels, N)"
        self.agree(when, self.some, self.expected, full.at(active))

    def prepared(self) -> None:
        model, some = self.model, self.some
        if contract.tabulates(model):
            levels = self.table_levels()
            table = self.table["table"] = model.tabulate(levels / 2)
            if model.tabulate(levels, out=table) is not table:
                raise ValueError("tabulate must overwrite and return the table passed as `out`")
        made = dict(self.table)
        if contract.prepares(model):
            context = made["context"] = self.prepare(self.every)
            if self.prepare(some, out=context) is not context:
                raise ValueError("prepare must overwrite and return the context passed as `out`")
        for when in ("with a context or table", "called again with a context or table"):  # calls may write to a context
            self.agree(when, some, self.call(some, **made), self.expected)
        if hasattr(made.get("context"), "first"):
            inputs, made["context"] = some.rows([0, 1]), made["context"].first(2)
            expected = (field if field is None else field[:2] for field in self.expected)
            self.agree("with context.first", inputs, self.call(inputs, **made), expected)

    def steps(self) -> None:
        """Two steps of all patches at once, by the engine and by its definition, from the same random numbers."""
        (values, _, active, condition), model = self.some, self.model
        mask = active.scatter(active.occupied, values.shape[1], fill=False)
        selection, sampling = Selection(mask, mask.sum(1).cpu()), Sampling(Schedule(2, 1.0))
        settings = PatchSettings.of(sampling, condition=None if condition is None else condition.layout)
        runner = Runner(settings.make_lanes(model, SAMPLES, values.device))
        ids, found = torch.arange(SAMPLES, device=values.device), []
        for engine in (
            Engine(runner, values, ids, sampling, condition),
            ReferenceEngine(model, values, ids, sampling, condition),
        ):
            engine.begin(1)
            engine.regenerate(selection)
            found.append(engine.values)
        error, allowed = (found[0] - found[1]).abs().max(), 4 * self.tolerance * _largest(found[1]).clamp_min(1)
        if error > allowed:  # NaN is told by `finite`
            raise ValueError(f"the samples of the engine and of the reference differ by {error:.2g}, not {allowed:.2g}")

    def capture(self) -> None:
        model, some = self.model, self.some
        with without_compile(), Watch(checks.name_of(model), some.values.device if some.values.is_cuda else None):
            made = {"context": self.prepare(some)} if contract.prepares(model) else {}
            self._call(some, **self.table, **made)


class _TokenChecks(_Checks):
    """The checks of a model of tokens."""

    @property
    def checks(self) -> dict[str, Callable[[Any], None]]:
        return TOKEN_CHECKS

    def check_shape(self, prediction: TokenPrediction, inputs: _Inputs) -> None:
        shape = (*inputs.active.index.shape, self.model.vocabulary.size)
        check_prediction(prediction, shape, inputs.values.device)

    def prepare(self, inputs: _Inputs, **options: Any) -> Any:
        masked = inputs.active.scatter(inputs.active.occupied, inputs.values.shape[1], fill=False)
        values = inputs.values.masked_fill(masked, self.model.vocabulary.mask_id)
        return super().prepare(inputs._replace(values=values), **options)

    def table_levels(self) -> Tensor:
        return torch.tensor([0.0, 1.0], device="cpu").to(self.some.values.device)

    def finite(self) -> None:
        """A logit may be -inf, where others are not."""
        forbidden = list(self.model.vocabulary.forbidden)
        for inputs, prediction in ((self.some, self.expected), (self.every, self.call(self.every))):
            logits = prediction.logits[inputs.active.occupied].float().clone()
            logits[:, forbidden] = -torch.inf
            if logits.isnan().any() or not logits.amax(-1).isfinite().all():
                raise ValueError("logits have NaN or inf, or -inf for every token that may be drawn")


def _largest(values: Tensor) -> Tensor:
    """Return the largest finite absolute value."""
    return values.abs().masked_fill(values.isinf(), 0).max()


STEPS = "two steps of the engine are those of the reference"
CHECKS: dict[str, Callable[[Any], None]] = {
    "to_images of the grid undoes to_patches": _Checks.grid,
    "predictions are finite": _Checks.finite,
    "the variance mix lies in mix_bounds": _Checks.mix,
    "a row depends on its own inputs alone": _Checks.rows,
    "with all patches active, calls with and without `active` agree": _Checks.all_active,
    "as many slots as patches change nothing": _Checks.all_slots,
    "with some patches active, predictions are those of a full call": _Checks.some_active,
    "prepare and tabulate change nothing": _Checks.prepared,
    "a CUDA graph can hold the operations": _Checks.capture,
    STEPS: _Checks.steps,
}
TOKEN_CHECKS: dict[str, Callable[[Any], None]] = {
    "a token can be drawn at every position": _TokenChecks.finite,
    **{
        name: CHECKS[name]
        for name in ("a row depends on its own inputs alone", "as many slots as patches change nothing")
    },
    **{name: CHECKS[name] for name in ("prepare and tabulate change nothing", "a CUDA graph can hold the operations")},
}
