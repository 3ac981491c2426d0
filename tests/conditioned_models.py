"""Models that depend on a condition, of operations on single numbers: a batch changes their roundings at most."""

import torch
from torch import nn

from ipr_fast import PatchGrid, Prediction
from ipr_fast.sampling.tokens import TokenPrediction, Vocabulary


class Labelled(nn.Module):
    """A denoiser whose velocity depends on a label of each row; context counts too, so that all patches matter."""

    grid = PatchGrid(1, 16, 16, 4)

    def __init__(self, classes=17):
        super().__init__()
        self.register_buffer("shift", torch.linspace(-1, 1, classes))

    def of_rows(self, condition):
        """What is added to each row (B, 1, 1)."""
        assert condition.dtype == torch.int64
        return self.shift[condition][:, None, None]

    def forward(self, patches, levels, active=None, *, condition):
        return self.predict(patches, levels, active, self.of_rows(condition))

    @staticmethod
    def predict(patches, levels, active, shift):
        slots = patches if active is None else active.gather(patches)
        velocity = 0.3 * slots + shift + 0.01 * patches[:, :1, :1] * levels[..., None]
        log_variance = (slots[..., 0] * (1 + shift[..., 0])).sin()
        return Prediction(velocity, (slots + shift).sigmoid(), log_variance)


class LabelledBy(Labelled):
    """Whose condition is a dict or a tuple, of a label and a weight for each patch."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def of_rows(self, condition):
        assert type(condition) is self.form
        label, weight = condition.values() if isinstance(condition, dict) else condition
        assert weight.shape == (len(label), 16)
        return super().of_rows(label) * weight.sum(1)[:, None, None]


class Prepared(Labelled):
    """Prepares what its condition adds, once an iteration; a table of levels does nothing."""

    class Context:
        def __init__(self, shift):
            self.shift = shift

        def first(self, chains):
            return Prepared.Context(self.shift[:chains])

    def prepare(self, patches, active, out=None, *, condition, table=None):
        shift = self.of_rows(condition)
        if out is None:
            return Prepared.Context(shift)
        out.shift.copy_(shift)
        return out

    def forward(self, patches, levels, active=None, *, condition, context=None):
        shift = self.of_rows(condition) if context is None else context.shift
        return self.predict(patches, levels, active, shift)


class LabelledTokens(nn.Module):
    """A model of tokens: a label of each row shifts its logits."""

    length, size = 11, 6
    never = (2,)

    def __init__(self, classes=17):
        super().__init__()
        self.vocabulary = Vocabulary(self.size, self.size, self.never)
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("table", torch.randn(classes, self.length, self.size, generator=generator))

    def forward(self, tokens, active=None, *, condition):
        logits = 2 * self.table[condition] + 0.1 * tokens.float().cumsum(1)[..., None].sin()
        return TokenPrediction(logits if active is None else active.gather(logits))
