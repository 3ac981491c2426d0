"""The experiment on models of tokens: its methods, costs, parts and rows."""

import dataclasses

import numpy as np
import pytest
import torch

from ipr_fast import TokenPrediction
from ipr_fast.evaluation.report import report
from ipr_fast.evaluation.token_methods import RIVAL, methods
from ipr_fast.evaluation.tokens import TokenExperiment, TokenExperimentSettings, run_token_experiment, work
from ipr_fast.tasks.grids import all_grids
from ipr_fast.tasks.token_sudoku import TokenSudoku

TASK = TokenSudoku(4)


class Recited:
    """Fills in one valid board, whatever it sees, and counts its calls and the positions in them."""

    vocabulary, length = TASK.vocabulary, TASK.length

    def __init__(self, certainty=50.0):
        self.logits = certainty * torch.nn.functional.one_hot(all_grids(4)[0].flatten(), 5).float()
        self.calls = self.positions = 0

    def __call__(self, tokens, active):
        self.calls += 1
        self.positions += int(active.count.sum())
        return TokenPrediction(active.gather(self.logits.expand(len(tokens), -1, -1)))


def calls(method):
    return method.first.steps, *((method.then.schedule.steps, method.then.times) if method.then else ())


@pytest.mark.parametrize(
    ("budget", "plan"), [(81, (40, 8, 5)), (40, (20, 4, 5)), (20, (10, 2, 5)), (10, (5, 1, 5)), (5, (2, 1, 3))]
)
def test_refinement_by_short_iterations_spends_its_budget(budget, plan):
    assert calls(methods(81)["confidence and IPR, alpha 0.25"](budget)) == plan
    first, each, times = plan
    assert budget - each < first + each * times <= budget


def test_every_method_keeps_to_its_budget():
    experiment = TokenExperiment(TASK, Recited(), TokenExperimentSettings(4, (0, 0)))
    for name, make in methods(TASK.length).items():
        for budget in (40, 16, 9, 5, 2):
            method = make(budget)
            if method is not None:
                assert 0 < experiment.cost(method, 4).calls <= budget, (name, budget)
    long = "confidence and IPR, alpha 0.25, one position a call"
    assert methods(16)[long](6) is None  # an iteration takes 4 calls, the pass leaves 3
    assert methods(16)[long](7).then.times == 1


@pytest.mark.parametrize("name", list(methods(16)))
def test_the_costs_are_those_of_the_calls(name):
    """Of chains without clues, which all take as many calls; `prepare` would compute all positions once."""
    model = Recited()
    experiment = TokenExperiment(TASK, model, TokenExperimentSettings(6, (0, 0)))
    method = experiment.method(name, 12)
    experiment.boards(name, 12, 0)
    cost = experiment.cost(method, 6)
    regenerations = sum(each.times for each in method.regenerations)
    assert model.calls == cost.calls
    assert model.positions == 6 * (cost.evaluations - 16 * regenerations)


def test_a_model_that_knows_a_board_makes_it_in_every_cell():
    settings = TokenExperimentSettings(8, (0, 0), budgets=(16, 4))
    results = run_token_experiment(TASK, Recited(), "recited", settings)
    assert results["rows"][0]["name"] == RIVAL
    assert len(results["rows"]) == len(methods(16))
    for row in results["rows"]:
        assert row["cells"][0]["budget"] == 16
        assert all(cell["good"] == cell["boards"] == 8 for cell in row["cells"])
    lines = report(results).splitlines()
    assert lines[0] == "| valid boards | 16 calls | 4 calls |"
    assert lines[2].startswith("| one pass, confidence | 100.0 % [")
    assert lines[-1].startswith("8 boards, seed 0, intervals 95 %. Measured at ")


def test_clues_are_kept_and_cost_nothing():
    experiment = TokenExperiment(TASK, Recited(), TokenExperimentSettings(40, (3, 8), part=16))
    for name in experiment.methods:
        x = torch.cat([experiment.boards(name, 10, part) for part in experiment.parts])
        assert torch.equal(x[experiment.known], experiment.values[experiment.known])
    assert experiment.free == (~experiment.known).sum(1).tolist()
    assert experiment.cost(experiment.method(RIVAL, 16), 40).calls == sum(experiment.free) / 40


def test_parts_are_of_the_same_chains_as_one_whole():
    settings = TokenExperimentSettings(10, (0, 6), part=4)
    parts, whole = (TokenExperiment(TASK, Recited(1.0), dataclasses.replace(settings, part=part)) for part in (4, 10))
    for name in (RIVAL, "confidence and IPR, alpha 0.5", "confidence, better of two passes by the rules"):
        joined = torch.cat([parts.boards(name, 8, part) for part in parts.parts])
        assert torch.equal(joined, whole.boards(name, 8, 0)), name


def test_the_better_of_two_passes_breaks_fewer_rules():
    experiment = TokenExperiment(TASK, Recited(2.0), TokenExperimentSettings(64, (0, 0)))
    better = experiment.judge(experiment.boards("confidence, better of two passes by the rules", 8, 0)).violations
    first = experiment.judge(experiment.boards(RIVAL, 4, 0)).violations
    assert (better <= first).all()
    assert (better < first).any()


def test_all_cells_begin_before_one_has_its_second_part():
    experiment = TokenExperiment(TASK, Recited(), TokenExperimentSettings(10, (0, 0), budgets=(16, 4), part=4))
    pieces = list(work(experiment))
    assert len(set(pieces)) == len(pieces)
    parts = [part for _, _, part in pieces]
    later = parts.index(1)
    assert set(parts[:later]) == {0}
    assert 0 not in parts[later:]
    budgets = [budget for _, budget, _ in pieces[:later]]
    assert budgets == sorted(budgets)  # the largest last


def test_a_stopped_measurement_goes_on_from_its_folder(tmp_path):
    settings, seen = TokenExperimentSettings(6, (0, 0), budgets=(16, 4), part=4), []

    def stop(results):
        seen.append(results)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_token_experiment(TASK, Recited(1.0), "recited", settings, folder=tmp_path / "kept", found=stop)
    cells = [cell for row in seen[-1]["rows"] for cell in row["cells"]]
    assert len(cells) == 5
    assert all(cell["boards"] == 4 for cell in cells)
    assert report(seen[-1]).splitlines()[-1].startswith("4 boards, seed 0, intervals 95 %. These are the first of 6 ")
    seen[-1]["rows"][0]["cells"][0]["boards"] = 6
    assert "of 4 |" in report(seen[-1])
    assert "Cells with fewer boards name their number." in report(seen[-1])
    model = Recited(1.0)
    results = run_token_experiment(TASK, model, "recited", settings, folder=tmp_path / "kept")
    whole = run_token_experiment(TASK, Recited(1.0), "recited", settings)
    assert results["rows"] == whole["rows"]
    calls = model.calls
    run_token_experiment(TASK, model, "recited", settings, folder=tmp_path / "kept")
    assert model.calls == calls  # nothing is made again


@pytest.mark.parametrize("change", [{"seed": 1}, {"count": 7}, {"clues": (0, 2)}, {"part": 3}])
def test_a_folder_of_another_run_is_refused(tmp_path, change):
    settings = TokenExperimentSettings(6, (0, 0), part=4)
    TokenExperiment(TASK, Recited(), settings, folder=tmp_path)
    with pytest.raises(ValueError, match=r"run\.json: a run of other settings: "):
        TokenExperiment(TASK, Recited(), dataclasses.replace(settings, **change), folder=tmp_path)


def test_a_damaged_piece_is_named(tmp_path):
    experiment = TokenExperiment(TASK, Recited(), TokenExperimentSettings(4, (0, 0)), folder=tmp_path)
    experiment.boards(RIVAL, 4, 0)
    (file,) = tmp_path.glob("*.npy")
    tokens = np.load(file)
    for damaged in (tokens[:2], tokens + 99, tokens[0], tokens.astype(np.float32), None):
        file.write_bytes(file.read_bytes()[:40]) if damaged is None else np.save(file, damaged)
        again = TokenExperiment(TASK, Recited(), TokenExperimentSettings(4, (0, 0)), folder=tmp_path)
        with pytest.raises(ValueError, match=f"{file.name}: cannot be read as samples"):
            again.boards(RIVAL, 4, 0)


def test_a_budget_of_one_call_is_refused():
    with pytest.raises(ValueError, match="budgets must be at least 2 calls, got 1"):
        run_token_experiment(TASK, Recited(), "recited", TokenExperimentSettings(4, (0, 0), budgets=(4, 1)))
