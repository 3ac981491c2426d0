"""The experiment on models of tokens: its budgets, costs and rows."""

import pytest
import torch

from ipr_fast import TokenPrediction
from ipr_fast.evaluation.report import report
from ipr_fast.evaluation.tokens import RefinementPlan, TokenExperiment, TokenExperimentSettings, run_token_experiment
from ipr_fast.sampling.tokens import ORDERS
from ipr_fast.tasks.grids import all_grids
from ipr_fast.tasks.token_sudoku import TokenSudoku

TASK = TokenSudoku(4)


class Recited:
    """Fills in one valid board, whatever it sees, and counts its calls and the positions in them."""

    vocabulary, length = TASK.vocabulary, TASK.length

    def __init__(self):
        self.logits = 50.0 * torch.nn.functional.one_hot(all_grids(4)[0].flatten(), 5).float()
        self.calls = self.positions = 0

    def __call__(self, tokens, active):
        self.calls += 1
        self.positions += int(active.count.sum())
        return TokenPrediction(active.gather(self.logits.expand(len(tokens), -1, -1)))


@pytest.mark.parametrize(
    ("budget", "plan"), [(81, (40, 8, 5)), (40, (20, 4, 5)), (20, (10, 2, 5)), (10, (5, 1, 5)), (5, (2, 1, 3))]
)
def test_a_plan_spends_its_budget(budget, plan):
    found = RefinementPlan.of(budget)
    assert (found.first, found.calls, found.iterations) == plan
    assert budget - found.calls < found.first + found.calls * found.iterations <= budget


def test_the_costs_are_those_of_the_calls():
    """Of chains without clues, which all take as many calls; `prepare` would compute all positions once."""
    model = Recited()
    experiment = TokenExperiment(TASK, model, TokenExperimentSettings(6, (0, 0)))
    x = experiment.one_pass(5, "margin")
    cost = experiment.cost(5)
    assert (cost.calls, cost.evaluations) == (5, 16 + 5 * 16)
    assert (model.calls, model.positions) == (5, 6 * 5 * 16)
    assert experiment.one_pass(5, "margin") is x  # kept
    model.calls = model.positions = 0
    experiment.refined(x, RefinementPlan(5, 3, 2), 0.25, "confidence")
    cost = experiment.cost(3, 0.25, 2)
    assert (cost.calls, cost.evaluations) == (2 * 3, 2 * (16 + 3 * 4))
    assert (model.calls, model.positions) == (2 * 3, 6 * 2 * 3 * 4)
    assert experiment.cost(81).calls == 16  # one position a call


def test_a_model_that_knows_a_board_makes_it_in_every_arm():
    results = run_token_experiment(TASK, Recited(), "recited", TokenExperimentSettings(8, (0, 0), budgets=(16, 4)))
    names = [row["name"] for row in results["rows"]]
    assert names[:4] == [f"one pass, {order}" for order in ORDERS]
    assert len(names) == 7
    for row in results["rows"]:
        assert [cell["budget"] for cell in row["cells"]] == [16, 4]
        assert all(cell["good"] == 8 for cell in row["cells"])
    lines = report(results).splitlines()
    assert lines[0] == "| valid boards | 16 calls | 4 calls |"
    assert lines[2].startswith("| one pass, random | 100.0 % [")
    assert lines[-1].startswith("8 boards, seed 0, intervals 95 %. Measured at ")


def test_clues_are_kept_and_cost_nothing():
    experiment = TokenExperiment(TASK, Recited(), TokenExperimentSettings(40, (3, 8)))
    x = experiment.refined(experiment.one_pass(4, "confidence"), RefinementPlan(4, 2, 2), 0.5, "confidence")
    assert torch.equal(x[experiment.known], experiment.values[experiment.known])
    assert experiment.free == (~experiment.known).sum(1).tolist()
    assert experiment.cost(16).calls == sum(experiment.free) / 40
