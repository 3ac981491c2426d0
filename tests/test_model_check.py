"""`check_model` passes models that keep the contract, and names the broken part of those that do not."""

import re
from pathlib import Path

import pytest
import torch
from conditioned_models import Labelled, LabelledTokens, Prepared
from small_models import TINY, TINY_TOKENS, randomise
from small_token_models import Lookup
from torch import nn
from user_grids import Rings

import ipr_fast
from ipr_fast import PatchGrid, Prediction, check_model
from ipr_fast.model_check import CHECKS, TOKEN_CHECKS
from ipr_fast.models import Guided, PatchTransformer, SRMUNet, SRMUNetConfig, TokenTransformer, contract

UNET = SRMUNetConfig(1, 24, 8, (32, 64), (False, True), num_head_channels=32, t_emb_dim=64, d_emb=32)
GRID = PatchGrid(1, 16, 16, 4)


class Plain:
    """A model without parameters, prepare or tabulate."""

    grid = GRID

    def __call__(self, patches, levels, active=None):
        slots = patches if active is None else active.gather(patches)
        return self.predict(slots, levels)

    def predict(self, slots, levels):
        return Prediction(slots * levels[..., None], torch.full_like(slots, 0.5), levels)


@pytest.mark.parametrize(
    "model",
    [
        Plain(),
        randomise(PatchTransformer(TINY), seed=0),
        randomise(PatchTransformer(TINY), seed=0).to(torch.bfloat16),
        randomise(PatchTransformer(TINY), seed=0).double(),
        SRMUNet(UNET).eval(),
    ],
    ids=["plain", "transformer", "bfloat16", "float64", "unet"],
)
def test_a_good_model_passes_every_check(model):
    assert check_model(model).splitlines() == [f"ok: {name}" for name in CHECKS]


@pytest.mark.parametrize("size", [4, 16])
def test_a_grid_of_few_patches_is_checked_too(size):
    model = Plain()
    model.grid = PatchGrid(1, 16, 16, size)
    check_model(model, "cpu")


def test_a_grid_of_the_users_own_is_checked():
    class Mirrored(Rings):
        def to_images(self, patches):
            return super().to_images(patches.flip(-1))

    class Flat(Rings):
        def to_images(self, patches):
            return super().to_images(patches).flatten(1)

    class Scaled(Rings):
        def to_patches(self, images):
            return super().to_patches(images * 2)

        def to_images(self, patches):
            return super().to_images(patches / 2)

    model = Plain()
    model.grid = Rings()
    check_model(model)
    for grid, message in (
        (Mirrored(), r"to_images of the grid undoes to_patches: .* differs"),
        (Scaled(), "grid.to_images must place the numbers of the patches unchanged, and changes some"),
        (Flat(), r"grid.to_images must return samples \(4, 1, 4, 4\), got \(4, 16\)"),
    ):
        model.grid = grid
        with pytest.raises(ValueError, match=message):
            check_model(model)


class Mixed(Plain):
    """Predicts from all patches and levels, as networks do; subclasses get `active` wrong."""

    def __call__(self, patches, levels, active=None):
        if active is not None:
            levels = self.all_levels(levels, active)
        full = Prediction(patches * levels[..., None] + patches.mean(1, keepdim=True) + levels.mean(1)[:, None, None])
        return full if active is None else self.of_slots(full, active)

    def all_levels(self, levels, active):
        return active.scatter(levels, GRID.num_patches)

    def of_slots(self, full, active):
        return full.at(active)


class FirstPatches(Mixed):
    def of_slots(self, full, active):
        return Prediction(full.velocity[:, : active.index.shape[1]])


class FirstLevels(Mixed):
    def all_levels(self, levels, active):
        return torch.nn.functional.pad(levels, (0, GRID.num_patches - levels.shape[1]))


class NoisyContext(Mixed):
    def all_levels(self, levels, active):
        return active.scatter(levels, GRID.num_patches, fill=1.0)


@pytest.mark.parametrize("model", [FirstPatches(), FirstLevels(), NoisyContext()], ids=lambda m: type(m).__name__)
def test_a_model_that_gets_active_wrong_is_named(model):
    assert "ok" in check_model(Mixed())
    with pytest.raises(ValueError, match=r"fails 1 of \d+ checks\n.*predictions are those of a full call"):
        check_model(model)


def test_nan_is_told_once():
    model = Plain()
    model.predict = lambda slots, levels: Prediction(slots * float("nan"))
    with pytest.raises(ValueError, match=r"fails 1 of .*\n.*velocity has NaN or inf$"):
        check_model(model)


class Writes(Plain):
    def __call__(self, patches, levels, active=None):
        patches.clamp_(-0.1, 0.1)
        return super().__call__(patches, levels, active)


class WritesUncounted(Plain):
    def __call__(self, patches, levels, active=None):
        patches.data.clamp_(-0.1, 0.1)  # torch does not count this one
        return super().__call__(patches, levels, active)


class WrongShape(Plain):
    def predict(self, slots, levels):
        return Prediction(slots[..., :1])


class NotFinite(Plain):
    def predict(self, slots, levels):
        return Prediction(slots / 0)


class Noise(Plain):
    def predict(self, slots, levels):
        return Prediction((slots - slots / 2) / (1 - levels[..., None]))


class NoSigmoid(Plain):
    def predict(self, slots, levels):
        return Prediction(slots, 10 * slots)


class Random(Plain):
    def predict(self, slots, levels):
        return Prediction(slots + torch.randn_like(slots))


class MixesRows(Plain):
    def predict(self, slots, levels):
        return Prediction(slots - slots.mean(0, keepdim=True))


class SeesPadding(Plain):
    def predict(self, slots, levels):
        return Prediction(slots + levels.shape[1])


class IgnoresActive(Plain):
    def __call__(self, patches, levels, active=None):
        return super().__call__(patches if active is None else 2 * patches, levels, active)


class WrongContext(Plain):
    def prepare(self, patches, active, out=None):
        return patches.clone() if out is None else out

    def __call__(self, patches, levels, active=None, context=None):
        return super().__call__(patches if context is None else context, levels, active)


class NewContext(WrongContext):
    def prepare(self, patches, active, out=None):
        return patches.clone()


class WrongTable(Plain):
    def tabulate(self, levels, out=None):
        return levels.clone() if out is None else out.copy_(levels)

    def __call__(self, patches, levels, active=None, table=None):
        return super().__call__(patches, levels if table is None else levels / 2, active)


class Waits(Plain):
    def predict(self, slots, levels):
        return Prediction(slots * levels.max().item())


class Branches(Plain):
    def predict(self, slots, levels):
        return super().predict(slots, levels) if (levels >= 0).all() else None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Writes, "Writes writes into its input `patches`"),
        (WritesUncounted, "WritesUncounted writes into its input `patches`"),
        (WrongShape, "floating-point velocity of shape"),
        (NotFinite, "predictions are finite: velocity has NaN or inf$"),
        (Noise, r"predictions are finite: velocity has NaN or inf at level 1, .*Parameterised"),
        (NoSigmoid, "mix_bounds: .*variance mix of NoSigmoid"),
        (Random, "a row depends .*: called again, velocity differs by"),
        (MixesRows, "a row depends .*: in another batch, velocity differs by"),
        (SeesPadding, "a row depends .*: without padding slots, velocity differs by"),
        (IgnoresActive, "with all patches active, .*: without `active`, velocity differs by"),
        (WrongContext, "prepare and tabulate .*: with a context or table, velocity differs by"),
        (NewContext, "prepare must overwrite and return the context"),
        (WrongTable, "prepare and tabulate .*: with a context or table, velocity differs by"),
        (Waits, "a CUDA graph .*: Waits cannot be captured as a CUDA graph: .* in predict"),
        (Branches, "a CUDA graph .*: Branches cannot be captured as a CUDA graph"),
    ],
)
def test_a_broken_model_is_named_with_what_is_broken(kind, message):
    with pytest.raises(ValueError, match=message):
        check_model(kind())


def test_every_failure_is_listed():
    class Both(Waits, NoSigmoid):
        def predict(self, slots, levels):
            return NoSigmoid.predict(self, slots * levels.max().item(), levels)

    with pytest.raises(ValueError, match=r"Both fails 3 of \d+ checks\n.*mix_bounds.*\na row.*\na CUDA graph"):
        check_model(Both())


def test_training_mode_and_other_devices_are_refused():
    class Network(nn.Module):
        grid = GRID

        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.weight = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match="training mode"):
        check_model(Network())
    with pytest.raises(ValueError, match="model must be on"):
        check_model(Network().eval().to("meta"), "cpu")
    with pytest.raises(ValueError, match="a callable with a `grid`"):
        check_model(lambda patches, levels, active=None: None)


def test_the_example_in_the_readme_of_models_passes(capsys):
    text = (Path(ipr_fast.__file__).parent / "models" / "README.md").read_text()
    own, shrink, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for example, number in ((own, len(CHECKS) + 1), (shrink, len(CHECKS))):
        exec(compile(example, "models/README.md", "exec"), {})
        assert capsys.readouterr().out.count("ok: ") == number
    assert own.count("\n") <= 32  # twenty lines and what they are tried with


def test_bundled_models_of_patches_pass():
    for model in map(ipr_fast.load_model, ipr_fast.bundled_models()):
        if not contract.is_token_denoiser(model):
            check_model(model)


class AllWhenManySlots(Mixed):
    """Takes as many slots as patches for all patches, in their order."""

    def of_slots(self, full, active):
        return full if active.index.shape[1] == GRID.num_patches else full.at(active)


def test_a_prediction_of_all_patches_is_named_where_there_are_as_many_slots():
    with pytest.raises(
        ValueError, match=r"fails 1 of \d+ checks\nas many slots .* those of the slots, \.at\(active\)\?"
    ):
        check_model(AllWhenManySlots())


def test_a_prediction_of_all_patches_is_named_by_its_shape(finished):
    class All(Mixed):
        def of_slots(self, full, active):
            return full

    message = r"got \(.*\) of torch.float32: the prediction of all 16 patches, which lacks \.at\(active\)"
    with pytest.raises(ValueError, match=message):
        check_model(All())
    with pytest.raises(ValueError, match=message):
        ipr_fast.refine_batch(finished, ipr_fast.random_patches(), 1, model=All())


# ------------------------------------------------------------------------------------------------ tokens, conditions

FOUR = torch.tensor([3, 0, 7, 12])


@pytest.mark.parametrize(
    "model",
    [Lookup(), randomise(TokenTransformer(TINY_TOKENS), seed=0), LabelledTokens()],
    ids=lambda m: type(m).__name__,
)
def test_a_good_model_of_tokens_passes_every_check(model):
    condition = FOUR if isinstance(model, LabelledTokens) else None
    assert check_model(model, condition=condition).splitlines() == [f"ok: {name}" for name in TOKEN_CHECKS]


class Bad(Lookup):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def __call__(self, tokens, active):
        prediction = super().__call__(tokens, active)
        return prediction._replace(logits=self.change(prediction.logits, tokens))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits, tokens: logits * float("nan"), "a token can be drawn at every position: logits have NaN"),
        (lambda logits, tokens: logits - logits.mean(0), "a row depends on its own inputs alone: in another batch"),
        (lambda logits, tokens: logits + len(logits[0]), "as many slots as patches change nothing"),
        (lambda logits, tokens: logits + float(tokens.sum()), "a CUDA graph can hold the operations"),
    ],
)
def test_a_bad_model_of_tokens_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        check_model(Bad(change))


def test_a_condition_belongs_to_its_row():
    class OfOthers(Labelled):
        def of_rows(self, condition):
            return super().of_rows(condition).flip(0)

    class Kept(Prepared):
        def prepare(self, patches, active, out=None, *, condition, table=None):
            return super().prepare(patches, active, out, condition=torch.zeros_like(condition))

    for model in (Labelled(), Prepared(), Guided(Prepared(), 2.0, torch.tensor(16))):
        assert check_model(model, condition=FOUR).splitlines() == [f"ok: {name}" for name in CHECKS]
    with pytest.raises(ValueError, match="a row depends on its own inputs alone"):
        check_model(OfOthers(), condition=FOUR)
    with pytest.raises(ValueError, match="prepare and tabulate change nothing"):
        check_model(Kept(), condition=FOUR)
    with pytest.raises(ValueError, match="condition must have a row for each of the 4 chains"):
        check_model(Labelled(), condition=FOUR[:3])
    with pytest.raises(ValueError, match="condition must be given: Labelled needs one"):
        check_model(Labelled())


def golden_step(sign=1.0, unit=1.0):
    """An Euler step of `Plain`, whose velocity is z t, of patches at different levels."""
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(5, 16, 16, generator=generator), torch.rand(5, 16, generator=generator)
    s = t * torch.rand(5, 16, generator=generator)
    velocity = z * (unit * t)[..., None]
    return ipr_fast.GoldenStep(*(GRID.to_images(z), t, s, GRID.to_images(z + sign * (s - t)[..., None] * velocity)))


def test_a_step_of_the_models_own_sampler_shows_what_levels_and_signs_mean():
    assert (
        check_model(Plain(), golden=golden_step()).splitlines()[-1] == "ok: a step is that of the model's own sampler"
    )
    for wrong in (golden_step(sign=-1), golden_step(unit=1000.0)):
        with pytest.raises(ValueError, match=r"fails 1 of .*\na step is that .* own sampler: next_x differs by"):
            check_model(Plain(), golden=wrong)
    step = golden_step()
    with pytest.raises(ValueError, match=r"golden must be an ipr_fast.GoldenStep of tensors, got tuple"):
        check_model(Plain(), golden=tuple(step))
    with pytest.raises(ValueError, match=r"golden: levels must be floats \(5, 16\) or \(5, 4, 4\), got \(5, 4\)"):
        check_model(Plain(), golden=step._replace(levels=step.levels[:, :4]))
    with pytest.raises(ValueError, match="next_levels no larger"):
        check_model(Plain(), golden=step._replace(levels=step.next_levels, next_levels=step.levels))
    with pytest.raises(ValueError, match="golden must be None for a model of tokens"):
        check_model(Lookup(), golden=step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda step: {"next_levels": step.levels, "next_x": step.x}, "the step must move x by more than .*, got 0"),
        (
            lambda step: {"levels": 0 * step.levels, "next_levels": 0 * step.levels, "next_x": step.x},
            "the step must move x by more than",
        ),
        (lambda step: {"next_x": step.next_x / 0}, "next_x must be finite in float32, got NaN or inf in 5"),
        (lambda step: {"x": step.x * float("nan")}, "x must be finite in float32, got NaN or inf in 5"),
        (lambda step: {"x": step.x.to(torch.complex64)}, "x must be a dense tensor of float16, .* torch.complex64"),
        (lambda step: {"next_x": step.next_x[:4]}, "must have the same number of samples, at least 1, got next_x of 4"),
        (lambda step: {name: value[:0] for name, value in step._asdict().items()}, "at least 1, got x of 0"),
        (lambda step: {"levels": step.levels.view(5, 2, 8)}, r"levels must be floats .*, got \(5, 2, 8\) of"),
        (lambda step: {"levels": step.levels > 0}, r"levels must be floats .* of torch.bool"),
    ],
)
def test_a_step_that_shows_nothing_is_refused(change, message):
    step = golden_step()
    with pytest.raises(ValueError, match=f"own sampler: golden: .*{message}"):
        check_model(Plain(), golden=step._replace(**change(step)))


def test_clean_patches_of_a_step_are_context():
    class Roles(Plain):
        """Adds the mean of the context to every velocity, as a model that knows active patches by `active`."""

        def __call__(self, patches, levels, active):
            clean = ~active.scatter(active.occupied, 16, fill=False)
            mean = (patches * clean[..., None]).mean((1, 2), keepdim=True)
            return Prediction(active.gather(patches) * levels[..., None] + mean)

    step = golden_step()
    z, t, s = GRID.to_patches(step.x), step.levels.clone(), step.next_levels.clone()
    t[:, 3:], s[:, 3:] = 0, 0
    mean = z[:, 3:].sum((1, 2), keepdim=True) / (16 * 16)
    next_x = GRID.to_images(z + (s - t)[..., None] * (z * t[..., None] + mean))
    ipr_fast.GoldenStep(step.x, t, s, next_x).check(Roles(), None, torch.device("cpu"))


def test_levels_of_a_step_may_have_the_grids_shape():
    step = golden_step()
    levels = {name: getattr(step, name).view(5, 4, 4) for name in ("levels", "next_levels")}
    check_model(Plain(), golden=step._replace(**levels))


def test_steps_of_the_engine_are_compared_with_the_reference():
    class Tiring(Plain):
        """Changes with each call of several patches at level 1, which no other check makes."""

        calls = torch.zeros(())

        def predict(self, slots, levels):
            self.calls = self.calls + ((levels == 1).sum() > 1)
            return Prediction(slots * (1 + self.calls))

    with pytest.raises(ValueError, match=r"two steps of the engine .* of the reference: the samples .* differ by"):
        check_model(Tiring())
