"""`reveal` against the definition of a regeneration of tokens, one chain at a time."""

import pytest
import torch

from ipr_fast.kernels import philox
from ipr_fast.kernels.reveal import reveal
from ipr_fast.sampling.patches import ActivePatches
from ipr_fast.sampling.token_reference import Keys, certainty_of, gumbel_max, regenerate_tokens
from ipr_fast.sampling.tokens import TokenPrediction, TokenSchedule, Vocabulary

N, V, SEED, ITERATION = 11, 6, 5, 3
VOCABULARY = Vocabulary(V, V, never=(2,))
REMASKINGS = (None, "cap", "rescale", "conf", "loop", "forward_backward")
SCORES = {"confidence": "odds", "margin": "gap", "entropy": "entropy"}


class Lookup:
    """A model whose logits are a sum of table entries, one for each token present: the same numbers in every batch."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(N, V + 1, N, V, generator=generator)

    def __call__(self, tokens, active):
        logits = torch.zeros(len(tokens), N, V)
        for position in range(N):
            logits += self.table[position, tokens[:, position]]
        return TokenPrediction(active.gather(logits))


def drawn_by(chain, logits, step, schedule):
    """The tokens (N,) that a chain draws in a step."""
    generator = torch.Generator().manual_seed(1000 * chain + step)
    gumbel = -torch.log(torch.empty(N, V).exponential_(generator=generator))
    return gumbel_max(logits, gumbel, VOCABULARY, schedule)


def keys_of(chain, step):
    """The other random numbers of one chain in a step."""
    ids, positions = torch.tensor([chain]), torch.arange(N)[None]
    return Keys(*(philox.step_keys(SEED, stream, step, ITERATION, ids, positions)[0] for stream in (6, 7)))


def run(schedule, tokens, unknown):
    """Regenerate chains (B, N) together, by `reveal`."""
    model, tables = Lookup(), schedule.tables(N)
    active, chain_ids = ActivePatches.from_mask(unknown, int(unknown.sum(1).max())), torch.arange(len(tokens))
    tokens = tokens.masked_fill(unknown, V)
    psi = None if schedule.remask is None or not schedule.remask.by_confidence else torch.zeros(active.index.shape)
    history, last, hidden = [tokens], torch.full((len(tokens),), -1), active.index.clone()
    for step in range(int(tables.steps[unknown.sum(1)].max())):
        logits = active.scatter(model(tokens, active).logits, N)
        drawn = torch.stack([drawn_by(b, logits[b], step, schedule) for b in range(len(tokens))])
        certainty = [certainty_of(each, token, VOCABULARY) for each, token in zip(logits, drawn, strict=True)]

        def of_slots(name, certainty=certainty):
            return active.gather(torch.stack([getattr(each, name) for each in certainty])).float()

        tokens = tokens.clone()
        reveal(
            tokens,
            active.gather(drawn),
            score=None if schedule.order == "random" else of_slots(SCORES[schedule.order]),
            confidence=of_slots("confidence"),
            index=active.index,
            count=active.count,
            mask_id=V,
            visible=tables.visible,
            reveal=tables.reveal,
            sigma=tables.sigma,
            psi=psi,
            hidden=hidden,
            step=last,
            iteration=torch.tensor(ITERATION),
            chain_ids=chain_ids,
            seed=philox.seed_tensor(SEED, "cpu"),
        )
        history.append(tokens)
        assert torch.equal(hidden >= 0, active.occupied & (active.gather(tokens) == V))
        assert torch.equal(hidden[hidden >= 0], active.index[hidden >= 0])
    return torch.stack(history)


@pytest.fixture
def chains():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, V, (12, N), generator=generator)
    unknown = torch.rand(12, N, generator=generator) < torch.linspace(0, 1.2, 12)[:, None]
    assert unknown.sum(1).unique().numel() > 4
    return tokens, unknown


@pytest.mark.parametrize("remask", REMASKINGS)
@pytest.mark.parametrize(
    ("how", "order"),
    [("count", order) for order in ("random", "confidence", "margin", "entropy")] + [("independent", "random")],
)
@pytest.mark.parametrize("steps", [None, 4, 15])
def test_ragged_chains_together_equal_the_definition(chains, steps, how, order, remask):
    schedule = TokenSchedule(steps, how, order, remask)
    history = run(schedule, *chains)
    for b, (tokens, unknown) in enumerate(zip(*chains, strict=True)):
        final, expected = regenerate_tokens(
            Lookup(),
            tokens,
            unknown,
            VOCABULARY,
            schedule,
            draw=lambda logits, step, b=b: drawn_by(b, logits, step, schedule),
            keys=lambda step, b=b: keys_of(b, step),
        )
        assert torch.equal(history[: len(expected), b], expected)
        assert (history[len(expected) :, b] == final).all()  # chains that are done stay as they are
        assert torch.equal(final[~unknown], tokens[~unknown])
        assert not torch.isin(final[unknown], torch.tensor([2, V])).any()


def test_a_position_without_a_drawn_token_stays_masked():
    tokens, index = torch.full((1, 3), V), torch.tensor([[0, 1, 2]], dtype=torch.int32)
    step = torch.tensor([-1])
    reveal(
        tokens,
        torch.tensor([[4, -1, 5]]),
        score=torch.tensor([[2.0, 0.0, 1.0]]),
        index=index,
        count=torch.tensor([3], dtype=torch.int32),
        mask_id=V,
        visible=TokenSchedule(1).tables(3).visible,
        reveal=None,
        sigma=None,
        step=step,
        iteration=torch.tensor(0),
        chain_ids=torch.arange(1),
        seed=philox.seed_tensor(0, "cpu"),
    )
    assert tokens.tolist() == [[4, V, 5]]
    assert step.tolist() == [0]
