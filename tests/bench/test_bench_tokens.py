"""bench/tokens.py, on small networks; and the loops that it times have the law of the engine."""

import json

import pytest
import tokens
import torch
from baselines import token_loops
from baselines.token_network import Sizes
from small_token_models import Oracle

from ipr_fast import TokenSchedule, generate_batch
from ipr_fast.sampling.remask import Cap
from ipr_fast.sampling.tokens import TokenPrediction, Vocabulary

ALMOST_NEVER = 5.0  # standard deviations
SMALL = tokens.Subject(tokens.live_model, Sizes(8, 12, 16, 1, 2), 4, chains=(1, 40), most_batched=30)
OWN = tokens.Subject(tokens.own_model, Sizes(16, 12, 16, 1, 2), 4, chains=(1, 40), most_batched=30)


class WithMask(Oracle):
    """The exact conditionals of a law, with a logit of the mask too."""

    def __init__(self):
        super().__init__()
        self.vocabulary = Vocabulary(self.size + 1, self.size)

    def logits(self, x):
        return torch.nn.functional.pad(self.conditionals(x).log().float(), (0, 1), value=-torch.inf)

    def __call__(self, x, active):
        return TokenPrediction(active.gather(self.logits(x)))


@pytest.fixture(scope="module")
def oracle():
    return WithMask()


def masked(oracle, chains):
    return torch.full((chains, oracle.length), oracle.size)


def apart(oracle, one, other):
    """The chi-square statistic of two sets of samples of the same size, in standard deviations from its mean."""
    powers = oracle.size ** torch.arange(oracle.length - 1, -1, -1)
    a, b = (torch.bincount((each * powers).sum(1), minlength=len(oracle.law)).double() for each in (one, other))
    seen = a + b > 10
    statistic = ((a - b)[seen] ** 2 / (a + b)[seen]).sum()
    return (statistic - seen.sum()) / (2 * seen.sum()) ** 0.5


def test_the_loop_of_llada_samples_the_models_law_in_random_order(oracle):
    torch.manual_seed(0)
    x = token_loops.llada(oracle.logits, masked(oracle, 60_000), 4, mask_id=oracle.size, order="random")
    assert abs(oracle.excess(x)) < ALMOST_NEVER


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_loop_of_llada_has_the_law_of_the_engine(oracle, steps):
    torch.manual_seed(1)
    x = token_loops.llada(oracle.logits, masked(oracle, 20_000), steps, mask_id=oracle.size, temperature=0.8)
    ours = generate_batch(20_000, model=oracle, schedule=TokenSchedule(steps, temperature=0.8), seed=2)
    assert abs(apart(oracle, x, ours)) < ALMOST_NEVER


@pytest.mark.parametrize("options", [{"eta": 0.0}, {"eta": 0.3}, {"eta": 0.3, "top_p": 0.7}], ids=str)
def test_the_loop_of_remdm_has_the_law_of_the_engine(oracle, options):
    torch.manual_seed(2)
    x = token_loops.remdm(oracle.logits, masked(oracle, 20_000), 6, mask_id=oracle.size, **options)
    eta, top_p = options["eta"], options.get("top_p", 1.0)
    remask = Cap(eta) if eta else None
    schedule = TokenSchedule(6, "independent", remask=remask, top_p=top_p, nucleus="inner")
    ours = generate_batch(20_000, model=oracle, schedule=schedule, seed=3)
    assert abs(apart(oracle, x, ours)) < ALMOST_NEVER
    other = generate_batch(20_000, model=oracle, schedule=TokenSchedule(1), seed=3)
    assert apart(oracle, x, other) > 20


def test_llada_reveals_one_more_in_the_first_steps(oracle):
    known = masked(oracle, 2)
    known[1, :3] = 0
    assert token_loops._numbers(known == oracle.size, 3).tolist() == [[2, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("subject", [SMALL, OWN], ids=["live", "own"])
@pytest.mark.parametrize("case", tokens.CASES, ids=lambda case: case.name)
def test_a_case_that_reveals_otherwise_is_no_measurement(case, subject):
    work = tokens.Work(case, subject, subject.make(subject.sizes), 40)
    work.check()
    loops_back = case._replace(schedule=lambda steps: TokenSchedule(steps, "independent", remask="loop"))
    with pytest.raises(AssertionError, match="revealed otherwise"):
        work._replace(case=loops_back).check()


def test_it_measures_and_reports(tmp_path, capsys, monkeypatch):
    out = tmp_path / "tokens.json"
    monkeypatch.setattr(tokens, "SUBJECTS", {"10": OWN, "50,258": SMALL})
    monkeypatch.setattr("sys.argv", ["tokens.py", "--rounds", "2", "--subjects", "10", "--out", str(out)])
    tokens.main()
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * len(tokens.CASES) - 1  # one case is slow
    assert all(row["rates"][side] > 0 for row in rows for side in ("ours", "batched", "alone"))
    printed = capsys.readouterr().out
    assert "| 10 | LLaDA, a quarter | 40 |" in printed
    monkeypatch.setattr("sys.argv", ["tokens.py", "--report", str(out)])
    tokens.main()
    assert capsys.readouterr().out == printed
