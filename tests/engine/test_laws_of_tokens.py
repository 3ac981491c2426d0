"""The laws of generated tokens, enumerated: several revealed at once, and the levels of remasking."""

import pytest
import torch
from small_token_models import Oracle
from token_laws import Partial, distance

from ipr_fast import generate_batch
from ipr_fast.sampling.remask import Remasking
from ipr_fast.sampling.tokens import TokenPrediction, TokenSchedule

CHAINS, ALMOST_NEVER = 200_000, 5.0  # standard deviations


def test_one_token_at_a_time_has_the_models_law_and_more_at_once_another():
    """`count` reveals the positions of a random order, which the steps of `Partial` choose uniformly."""
    oracle = Oracle()
    partial = Partial(oracle)
    for steps in ([1, 1, 1, 1], [2, 2], [4]):
        law = partial.start()
        for number in steps:
            law = law @ partial.reveal(number)
        law, schedule = partial.finished(law), TokenSchedule(len(steps), order="random")
        x = generate_batch(CHAINS, model=oracle, schedule=schedule, seed=len(steps))
        assert abs(oracle.excess(x, law)) < ALMOST_NEVER
        apart = distance(law, oracle.law)
        print(f"{len(steps)} steps: total variation from the model's law {apart:.3g}")
        assert apart < 1e-6 if len(steps) == 4 else apart > 0.05  # the law is normalised in float32
        assert len(steps) == 4 or oracle.excess(x) > 100


class Product:
    """Positions that are independent: position i has the token v with probability p[i, v]. Keeps what it was given."""

    def __init__(self):
        self.p = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
        self.vocabulary, self.length, self.seen = Oracle().vocabulary, 4, []

    def __call__(self, tokens, active):
        self.seen.append(tokens.clone())
        return TokenPrediction(active.gather(self.p.log().expand(len(tokens), -1, -1)))


@pytest.mark.parametrize("name", [None, "cap", "rescale", "loop", "forward_backward"])
def test_the_marginals_of_every_level_are_those_of_remdm(name):
    """A position is masked with probability 1 - alpha, else it has a token of the model's law, as q(z | x) says."""
    model, total, count = Product(), 10, 30_000
    schedule = TokenSchedule(total, "independent", remask=name)
    x = generate_batch(count, model=model, schedule=schedule, seed=6, max_chains=count)
    strategy = schedule.remask or Remasking()
    assert len(model.seen) == total
    for step, tokens in enumerate([*model.seen, x]):
        alpha = strategy.visible(torch.tensor(step / total, dtype=torch.float64)).item()
        for position in range(4):
            found = tokens[:, position].bincount(minlength=4).double()
            expected = count * torch.cat([alpha * model.p[position], torch.tensor([1 - alpha])]).double()
            assert (found[expected == 0] == 0).all()
            found, expected = found[expected > 0], expected[expected > 0]
            free = max(1, len(found) - 1)
            chi_square = ((found - expected) ** 2 / expected).sum()
            assert (chi_square - free) / (2 * free) ** 0.5 < 7.0  # of 220 numbers, whose tail is longer
