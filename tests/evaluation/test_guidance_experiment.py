"""Methods that use a reward, side by side at equal model calls."""

import json
from dataclasses import replace

import pytest
import torch
from small_models import randomise

from ipr_fast import load_model
from ipr_fast.cli.main import main
from ipr_fast.evaluation import guidance
from ipr_fast.evaluation.cells import Cells
from ipr_fast.evaluation.guidance import GuidanceSettings, guidances, run_guidance_experiment
from ipr_fast.evaluation.report import report
from ipr_fast.models import TokenTransformer, TokenTransformerConfig
from ipr_fast.refine import generate_batch, refine_batch
from ipr_fast.sampling.policies import random_patches, violating_patches
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.tasks.catalog import task_of
from ipr_fast.tasks.even_pixels import EvenPixels
from ipr_fast.tasks.sudoku import DigitSudoku
from ipr_fast.tasks.token_sudoku import TokenSudoku

AT_VIOLATIONS = {  # patience, ratio, others
    "IPR, at violations": (10**6, 0.25, 0.0),
    "IPR, at violations, new boards": (guidance.PATIENCE, 0.25, 0.0),
    "IPR, at violations and others, new boards": (guidance.OTHERS_PATIENCE, 1.0, guidance.OTHERS),
}
SETTINGS = GuidanceSettings(count=30, clues=(4, 12), budgets=(1, 2, 5))


@pytest.fixture(scope="module")
def model():
    config = TokenTransformerConfig(vocabulary_size=5, mask_id=0, rows=4, columns=4, width=16, depth=1, num_heads=1)
    return randomise(TokenTransformer(config), seed=0)


@pytest.fixture(scope="module")
def results(model):
    return run_guidance_experiment(TokenSudoku(4), model, "random", SETTINGS)


def test_every_arm_keeps_to_the_budget_and_counts_its_rewards(results):
    rows = {row["name"]: {cell["budget"]: cell for cell in row["cells"]} for row in results["rows"]}
    methods = ["IPR", "IPR, best so far", "IPR, greedy", "IPR, Metropolis, T = 0.5, best so far", *AT_VIOLATIONS]
    assert list(rows)[:8] == ["best of N", *methods]
    assert set(rows) == {"best of N", *methods, "IterRef, T = 0.5", "FK steering, T = 0.5", "SVDD"}
    for name, cells in rows.items():
        for budget, cell in cells.items():
            assert cell["calls"] <= budget * results["pass_calls"] + 1e-9, (name, budget)
            assert (cell["reward_calls"] == 0) == (name == "IPR")
    assert [rows["best of N"][budget]["calls"] / budget for budget in (1, 2, 5)] == [results["pass_calls"]] * 3
    violations = [rows["best of N"][budget]["means"]["violations"][0] for budget in (1, 2, 5)]
    assert violations[0] > violations[1] > violations[2]
    assert rows["IPR"][1]["means"] == rows["best of N"][1]["means"]


def test_cells_are_those_of_the_library_calls(model, results):
    task = TokenSudoku(4)
    experiment = guidance.GuidanceExperiment(task, model, SETTINGS, Cells({}))
    options = {"model": model, "known": experiment.given["known"]}
    x = generate_batch(30, known_values=experiment.given["known_values"], **options)
    (cells,) = (row["cells"] for row in results["rows"] if row["name"] == "IPR")
    iterations = int(4 * experiment.pass_calls / experiment.iteration_calls)
    x = refine_batch(x, random_patches(), iterations, **options)
    assert cells[-1]["means"]["violations"][0] == pytest.approx(task.judge()(x).violations.double().mean())
    assert cells[-1]["calls"] == pytest.approx(experiment.pass_calls + iterations * experiment.iteration_calls)


@pytest.mark.parametrize("name", AT_VIOLATIONS)
def test_boards_refined_at_their_violations_are_those_of_one_chain_at_a_time(name, model, results):
    """Of a chain's samples and their iterations, all that end within the budget count."""
    task, (patience, ratio, others) = TokenSudoku(4), AT_VIOLATIONS[name]
    experiment = guidance.GuidanceExperiment(task, model, SETTINGS, Cells({}))
    judge, (cells,) = task.judge(), (row["cells"] for row in results["rows"] if row["name"] == name)
    found, asked = {budget: [] for budget in SETTINGS.budgets}, dict.fromkeys(SETTINGS.budgets, 0)
    for chain in range(SETTINGS.count):
        known, values = (experiment.given[each][chain : chain + 1] for each in ("known", "known_values"))
        own_pass, seen, spent = int((~known).sum()), [], 0  # a call reveals one token
        for sample in range(5):
            options = {"model": model, "chain_ids": torch.tensor([chain + sample * SETTINGS.count]), "known": known}
            x, spent = generate_batch(1, known_values=values, **options), spent + own_pass
            for iteration in range(patience + 1):
                seen.append((spent, int(judge(x).violations)))
                violating = int((judge(x).violating_cells.flatten(1) & ~known).sum())
                chosen = min(violating, max(1, int(ratio * own_pass)))
                chosen = min(chosen + int(others * own_pass), own_pass) if violating else 0
                spent += chosen
                if not chosen or iteration == patience or spent > 5 * own_pass:
                    spent -= chosen
                    break
                policy = violating_patches(judge, ratio, others=others)
                x = refine_batch(x, policy, 1, first_iteration=iteration + 1, **options)
            if seen[-1][1] == 0 or patience > 5 or spent + own_pass > 5 * own_pass:
                break
        for budget in SETTINGS.budgets:
            within = [violations for calls, violations in seen if calls <= budget * own_pass]
            found[budget].append(min(within))
            asked[budget] = max(asked[budget], len(within))
    for cell in cells:
        violations = torch.tensor(found[cell["budget"]]).double()
        assert cell["means"]["violations"][0] == pytest.approx(violations.mean())
        assert cell["good"] == (violations == 0).sum()
        assert cell["reward_calls"] == asked[cell["budget"]]


@pytest.mark.parametrize("budget", [1, 2, 4, 16])
@pytest.mark.parametrize(("steps", "every"), [(16, 1), (48, 3), (81, 1)])
def test_guided_generations_take_the_calls_that_were_planned(budget, steps, every, model):
    """On boards without clues, whose passes take `steps` calls; only the plan where that is slow."""
    arms = guidances(steps, budget, lambda x: x.double().flatten(1).mean(1), 0.5, every)
    assert len(arms) == {1: 0, 2: 1}.get(budget, 3)
    if steps > 48 or budget > 4:
        return
    boards = load_model("digit-sudoku-4x4")
    for arm in arms.values():
        generate_batch(2, model=model if every == 1 else boards, guidance=arm)
        cost = getattr(arm.last, "cost", arm.last)
        assert 0.5 * budget * steps < cost.model_calls.double().mean() <= budget * steps


def test_a_task_without_boards_is_refused(model):
    with pytest.raises(ValueError, match=r"^model: guidance is measured on boards of digits, got a model of even-"):
        run_guidance_experiment(EvenPixels(), model, "random", SETTINGS)


def test_the_report_has_a_column_for_each_budget(results):
    again = json.loads(json.dumps(results))
    table = report(again)
    assert table == report(results)
    assert table.startswith(f"| valid boards | 1 x {results['pass_calls']:.4g} calls | 2 x ")
    assert "The reward is minus the violations." in table
    assert all(f"| {row['name']} |" in table for row in results["rows"])


def test_the_command_measures_images_too(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    out = tmp_path / "guidance.json"
    arguments = ["evaluate", "guidance", "--count", "3", "--budgets", "1,2", "--out", str(out), "--quiet"]
    assert main(arguments) == 0
    assert "| IPR, greedy | " in capsys.readouterr().out
    assert [row["name"] for row in json.loads(out.read_text())["rows"]][:2] == ["best of N", "IPR"]


def test_a_stopped_measurement_goes_on_from_its_folder(tmp_path, model, monkeypatch):
    settings, told = GuidanceSettings(count=5, budgets=(1, 3)), []

    def measure(**options):
        return run_guidance_experiment(TokenSudoku(4), model, "random", settings, folder=tmp_path, **options)

    def stop(results):
        told.append(results)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(found=stop)
    assert [row["name"] for row in told[-1]["rows"]] == ["best of N", "IPR", "IPR, best so far", "IPR, greedy"]
    made = []
    monkeypatch.setattr(guidance.GuidanceExperiment, "best_of_n", None)  # it is there
    going_on = measure(found=made.append)
    assert len(made) == 4 + 2  # SVDD has no budget of two candidates
    monkeypatch.undo()
    whole = run_guidance_experiment(TokenSudoku(4), model, "random", settings)
    assert going_on == whole
    with pytest.raises(ValueError, match=r"cells.json: a run of other settings: seed 0 \(now 1\)"):
        run_guidance_experiment(TokenSudoku(4), model, "random", replace(settings, seed=1), folder=tmp_path)
    (tmp_path / "cells.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cells.json: not a measurement that can be gone on with"):
        measure()


def test_calls_of_a_pass_of_tokens_are_a_setting(model):
    settings = GuidanceSettings(count=4, budgets=(1, 2), calls=8)
    results = run_guidance_experiment(TokenSudoku(4), model, "random", settings)
    assert results["pass_calls"] == 8
    (cells,) = (row["cells"] for row in results["rows"] if row["name"] == "IPR")
    assert cells[-1]["calls"] == 8 + 4 * 2
    with pytest.raises(ValueError, match=r"^calls: they are a setting of models of tokens, got a model of images"):
        guidance.schedules_of(load_model("digit-sudoku-4x4"), settings)


def test_a_schedule_of_passes_and_iterations_is_a_setting(tmp_path, capsys):
    pytest.importorskip("sklearn")
    arguments = ["evaluate", "guidance", "--count", "3", "--budgets", "1,4", "--quiet", "--seed", "2"]
    options = ["--generate-schedule", "2", "0.5", "--refine-schedule", "3", "0.5", "--group", "3"]
    assert main([*arguments, *options, "--out", str(tmp_path / "guidance.json")]) == 0
    results = json.loads((tmp_path / "guidance.json").read_text())
    schedule, refine_schedule = Schedule(2, 0.5, group=3), Schedule(3, 0.5, group=3)
    assert results["pass_calls"] == schedule.steps(16) == 7
    words = f" Each pass by `{schedule}`. Each iteration by `{refine_schedule}`. The reward is "
    assert words in report(results)
    x = generate_batch(3, schedule=schedule, seed=2)
    x = refine_batch(x, random_patches(), 4, schedule=refine_schedule, seed=2)  # of 5 calls each
    (cells,) = (row["cells"] for row in results["rows"] if row["name"] == "IPR")
    assert cells[-1]["calls"] == 7 + 4 * 5
    violations = DigitSudoku(4).judge()(x).violations.double()
    assert cells[-1]["means"]["violations"][0] == pytest.approx(violations.mean())
    capsys.readouterr()
    told = "generate_schedule: it is a setting of models of images, got a model of tokens; see calls"
    for asked, error in [
        ([*arguments, "--group", "3"], "error: --group goes with --generate-schedule or --refine-schedule\n"),
        ([*arguments, *options, "--model", "token-sudoku-9x9"], told),
        (["evaluate", "arms", *options], "--generate-schedule is not an option of arms"),
    ]:
        assert main(asked) == 1
        assert error in capsys.readouterr().err


def test_chosen_methods_are_measured_as_among_all(tmp_path, model, results):
    """And a folder goes on with others."""

    def measure(*methods):
        settings = replace(SETTINGS, methods=methods)
        rows = run_guidance_experiment(TokenSudoku(4), model, "random", settings, folder=tmp_path)["rows"]
        return {row["name"]: row for row in rows}

    whole = {row["name"]: row for row in results["rows"]}
    found = measure("iterref", "svdd")
    assert list(found) == ["best of N", "IterRef, T = 0.5", "SVDD"]
    assert found == {name: whole[name] for name in found}
    assert measure("steering", "refinement", "violations", "others") == whole


def test_budgets_of_equally_many_iterations_have_a_cell_each(model):
    """Where an iteration takes nine calls and a pass one."""
    settings = GuidanceSettings(count=4, clues=(15, 15), budgets=(1, 2, 3), methods=("refinement",))
    boards = load_model("digit-sudoku-4x4")
    boards.generate_schedule, boards.refine_schedule = Schedule(1), Schedule(9)
    for row in run_guidance_experiment(task_of(boards.grid), boards, "few", settings)["rows"]:
        assert [cell["budget"] for cell in row["cells"]] == [1, 2, 3]


@pytest.mark.parametrize("changed", [{"clues": (16, 16)}, {"methods": ("iterref", "other")}])
def test_settings_that_measure_nothing_are_refused(changed, model):
    with pytest.raises(
        ValueError,
        match=r"^clues: all cells are given|^methods must be some of refinement, violations, others",
    ):
        run_guidance_experiment(TokenSudoku(4), model, "random", replace(SETTINGS, **changed))


def test_unknown_methods_are_wrong_usage(capsys):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "guidance", "--methods", "iterref,fk"])
    assert end.value.code == 2
    assert (
        "none, or some of refinement,violations,others,iterref,steering,svdd, got 'iterref,fk'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("budgets", ["2,4", "0,1", "1,4,2", "1,1", "1,x", ""])
def test_bad_budgets_are_wrong_usage(budgets, capsys):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "guidance", "--budgets", budgets])
    assert end.value.code == 2
    assert "must be ascending whole numbers from 1 on with commas between" in capsys.readouterr().err
