"""`accept` against its definition, chain by chain, and the law of its decisions."""

import math

import pytest
import torch

from ipr_fast.kernels.accept import Kept, accept, log_uniforms
from ipr_fast.kernels.philox import seed_tensor

LOW, HIGH = -math.inf, math.inf


def counters(batch, iteration=3):
    return {
        "iteration": torch.tensor(iteration),
        "chain_ids": torch.arange(batch) * 7 + (1 << 31),
        "seed": seed_tensor(5, "cpu"),
    }


def decide(values, reward, kept, temperature, best=None, **given):
    """Decide by `accept` on copies. Returns what it wrote."""
    values, kept = values.clone(), Kept(*(each.clone() for each in kept))
    best = None if best is None else Kept(*(each.clone() for each in best))
    accepted, improved = (torch.zeros(len(values), dtype=torch.bool) for _ in range(2))
    scalar = torch.tensor(temperature, dtype=torch.float64)
    given = {**counters(len(values)), **given}
    more = {} if best is None else {"best": best, "improved": improved}
    accept(values, reward, kept=kept, accepted=accepted, temperature=scalar, **given, **more)
    return values, kept, accepted, best, improved


@pytest.mark.parametrize("values", [torch.randn(60, 3, 5), torch.randint(0, 9, (60, 4))], ids=["patches", "tokens"])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1e9])
def test_every_chain_keeps_the_sample_that_the_rule_says(values, temperature):
    old, reward = values.flip(0), torch.randn(60, dtype=torch.float64)
    kept_reward, best_reward = torch.randn(60, dtype=torch.float64), torch.randn(60, dtype=torch.float64)
    reward[:6] = torch.tensor([LOW, LOW, HIGH, HIGH, 0.0, LOW])
    kept_reward[:6] = torch.tensor([LOW, 0.0, HIGH, LOW, 0.0, HIGH])
    reward[6:9] = kept_reward[6:9] = best_reward[6:9]
    best = Kept(values.roll(1, 0), best_reward)
    new, kept, accepted, now_best, improved = decide(values, reward, Kept(old, kept_reward), temperature, best)
    log_u = log_uniforms(5, torch.tensor(3), counters(60)["chain_ids"])
    for i in range(60):
        r, r_old = float(reward[i]), float(kept_reward[i])
        yes = r >= r_old or temperature * float(log_u[i]) < r - r_old
        assert bool(accepted[i]) == yes
        expected = values[i] if yes else old[i]
        assert torch.equal(new[i], expected)
        assert torch.equal(kept.values[i], expected)
        assert float(kept.reward[i]) == (r if yes else r_old)
        better = yes and r > float(best_reward[i])
        assert bool(improved[i]) == better
        assert torch.equal(now_best.values[i], values[i] if better else best.values[i])
        assert float(now_best.reward[i]) == (r if better else float(best_reward[i]))
    assert accepted[[0, 2, 3, 4]].all()  # equals, and anything above -infinity
    assert not accepted[[1, 5]].any()
    assert not improved[6:9].any()  # as good as the best: the first one stays


def test_nan_is_never_accepted():
    values = torch.randn(4, 2)
    reward, kept = (
        torch.tensor([math.nan, 0, math.nan, LOW]).double(),
        torch.tensor([0, math.nan, LOW, math.nan]).double(),
    )
    assert not decide(values, reward, Kept(values + 1, kept), 1.0)[2].any()


def test_proposals_are_accepted_with_the_probability_of_the_rule():
    batch = 200_000
    values, kept = torch.ones(batch, 1), Kept(torch.zeros(batch, 1), torch.zeros(batch, dtype=torch.float64))
    for loss, temperature in ((0.1, 0.2), (1.0, 0.5), (3.0, 1.0)):
        reward = torch.full((batch,), -loss, dtype=torch.float64)
        share = decide(values, reward, kept, temperature)[2].double().mean().item()
        p = math.exp(-loss / temperature)
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / batch)


def test_a_decision_depends_on_seed_iteration_and_chain_alone():
    ids = torch.arange(1000)
    every = log_uniforms(5, torch.tensor(3), ids)
    assert torch.equal(log_uniforms(5, torch.tensor(3), ids[::7]), every[::7])
    for other in (log_uniforms(6, torch.tensor(3), ids), log_uniforms(5, torch.tensor(4), ids)):
        assert abs(torch.corrcoef(torch.stack([every, other]))[0, 1].item()) < 5 / math.sqrt(1000)
    assert every.isfinite().all()
    assert (every < 0).all()
    both = log_uniforms(5, torch.tensor([[3], [4]]), ids)
    assert torch.equal(both, torch.stack([every, log_uniforms(5, torch.tensor(4), ids)]))


def test_bad_arguments_are_refused():
    values, accepted = torch.zeros(2, 1), torch.zeros(2, dtype=torch.bool)
    reward = torch.zeros(2, dtype=torch.float64)
    given = {"accepted": accepted, "temperature": reward[0], **counters(2)}
    with pytest.raises(ValueError, match="best and improved"):
        accept(values, reward, kept=Kept(values, reward), improved=accepted, **given)
    with pytest.raises(ValueError, match=r"4 or 8 bytes, got torch\.float16"):
        accept(values.half(), reward, kept=Kept(values.half(), reward), **given)
