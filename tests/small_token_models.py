"""Models of tokens whose predictions are known exactly."""

import torch

from ipr_fast.sampling.tokens import TokenPrediction, Vocabulary


class Lookup:
    """Logits that are sums of table entries, one for each token present: the same numbers in every batch."""

    length, size = 11, 6

    def __init__(self):
        self.vocabulary = Vocabulary(self.size, self.size, never=(2,))
        shape = self.length, self.size + 1, self.length, self.size
        self.table = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def __call__(self, tokens, active):
        logits = torch.zeros(len(tokens), self.length, self.size)
        for position in range(self.length):
            logits += self.table[position, tokens[:, position]]
        return TokenPrediction(active.gather(logits))


class Oracle:
    """The exact conditionals of a random law over all sequences of 4 tokens of 3 kinds: `law` (81,), of `states`."""

    length, size = 4, 3

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.vocabulary = Vocabulary(self.size, self.size)
        self.states = torch.cartesian_prod(*[torch.arange(self.size)] * self.length)
        self.law = torch.softmax(1.5 * torch.randn(len(self.states), generator=generator), 0).double()
        self.one_hot = torch.nn.functional.one_hot(self.states, self.size).double()

    def __call__(self, tokens, active):
        return TokenPrediction(active.gather(self.conditionals(tokens).log().float()))

    def conditionals(self, tokens):
        """The law (B, N, V) of each position given the visible tokens (B, N)."""
        seen = tokens[:, None] == self.states
        weight = (seen | (tokens == self.size)[:, None]).all(-1).double() * self.law
        joint = torch.einsum("bs,snv->bnv", weight, self.one_hot)
        return joint / joint.sum(-1, keepdim=True)

    def draw(self, count, seed=0):
        """Exact samples (B, N)."""
        generator = torch.Generator().manual_seed(seed)
        return self.states[torch.multinomial(self.law, count, replacement=True, generator=generator)]

    def excess(self, tokens, law=None):
        """The chi-square statistic of samples against a law, in standard deviations from its mean.

        Sequences that are expected five times or less are counted together.
        """
        place = (tokens * self.size ** torch.arange(self.length - 1, -1, -1)).sum(1)
        expected = (self.law if law is None else law) * len(tokens)
        found, rare = torch.bincount(place, minlength=len(expected)).double(), expected <= 5
        if rare.any():
            found, expected = (torch.cat([each[~rare], each[rare].sum()[None]]) for each in (found, expected))
        free = len(expected) - 1
        return (((found - expected) ** 2 / expected).sum().item() - free) / (2 * free) ** 0.5
