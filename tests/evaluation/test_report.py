"""Tables and sentences of measurements that are made up here."""

import pytest

from ipr_fast.evaluation.report import report

ENVIRONMENT = {"commit": "abc", "device": "a CPU", "torch": "2.0", "threads": 1}
MEASURED = "Measured at abc on a CPU, torch 2.0, threads: 1."


def arm(name, fixed=0, broken=0, **more):
    return {
        "name": name,
        "share": [0.5, 0.4, 0.6],
        "gain": [0.1, 0.05, 0.15],
        "fixed": fixed,
        "broken": broken,
        "means": {"hue_std": [1.0, 0.5, 1.5]},
        **more,
    }


def experiment(*arms, clues=(0, 0), judge=""):
    return {
        "good_by_iteration": [1, 2],
        "noun": "board",
        "adjective": "valid",
        "arms": list(arms),
        "clues": list(clues),
        "judge": judge,
        "samples": 2048,
        "seed": 3,
        "environment": ENVIRONMENT,
    }


def test_a_row_of_an_experiment_has_cost_share_gain_and_means():
    text = report(
        experiment(arm("one pass", calls=48, evaluations=784), arm("IPR", 246, 21, calls=128, evaluations=1184))
    )
    head, marks, first, second, _, note = text.splitlines()
    assert (
        head == "| arm | NFE | patch evaluations | valid boards | gain over one pass | fixed / broken | hue deviation |"
    )
    assert marks.count("---:") == 6
    assert first == "| one pass | 48 | 784 | 50.0 % [40.0, 60.0] |  |  | 1.00 [0.500, 1.50] |"
    gain = "+10.0 points [+5.0, +15.0] | 246 / 21"
    assert second == f"| IPR | 128 | 1,184 | 50.0 % [40.0, 60.0] | {gain} | 1.00 [0.500, 1.50] |"
    assert note == f"2,048 boards, seed 3, intervals 95 %. {MEASURED}"


def test_only_rows_of_one_pass_have_no_gain():
    text = report(experiment(arm("one pass"), arm("IPR"), arm("0 to 8 clues: one pass")))
    gains = [line.split(" | ")[4:6] for line in text.splitlines()[2:5]]
    assert gains == [["", ""], ["+10.0 points [+5.0, +15.0]", "0 / 0"], ["", ""]]


def test_the_note_names_clues_the_judge_and_rows_measured_again():
    text = report(experiment(arm("0 to 8 clues: one pass", commit="def"), clues=(0, 8), judge="judged by eye"))
    assert "| 0 to 8 clues: one pass |  |  |" in text
    assert text.endswith(
        "2,048 boards, 0 to 8 clues, seed 3, intervals 95 %. Judged by eye. "
        f"{MEASURED} Rows of 0 to 8 clues: measured again at def."
    )


def test_the_table_of_repairs():
    results = {
        "samples": 200,
        "iterations": 3,
        "seed": 4,
        "judge": "judged by eye",
        "repair": [
            {
                "pairs": 1,
                "valid_by_iteration": [20, 40, 60, 100],
                "violations_by_iteration": [3.0, 2.0, 1.5, 0.25],
                "valid": [0.5, 0.4, 0.6],
                "as_before": [0.25, 0.2, 0.3],
            }
        ],
        "environment": ENVIRONMENT,
    }
    head, _, row, _, note = report(results).splitlines()
    assert head == "| swapped pairs | corrupted | after 1 | after 2 | after 3 | violations | same grid after 3 |"
    shares = "10.0 % | 20.0 % | 30.0 % | 50.0 % [40.0, 60.0]"
    assert row == f"| 1 | {shares} | 3.00 to 0.25 | 25.0 % [20.0, 30.0] |"
    assert note == f"Valid boards of 200, all cells free, alpha 0.25, seed 4, intervals 95 %. Judged by eye. {MEASURED}"


def test_the_sentence_on_diversity():
    counts = {"valid": 1647, "distinct": 287, "distinct_if_uniform": 287.1, "chi_square": 385.4}
    results = {
        "boards": 2048,
        "iterations": 20,
        "one pass": counts,
        "refined": counts,
        "cells_with_another_digit": 0.033,
    }
    words = "1,647 valid boards show 287 of the 288 grids (287 expected of uniform draws; chi-square 385)"
    expected = (
        f"After one pass, {words}; after 20 iterations, {words}. 3.3 % of the cells show another digit than before."
    )
    assert report(results) == expected
    results["one pass"] = {**counts, "valid": 0, "chi_square": None}
    assert report(results).startswith(f"After one pass, no board is valid; after 20 iterations, {words}. ")


def test_the_table_of_initialisations():
    results = {
        "seed": 5,
        "sizes": {"width": 96, "depth": 5, "num_heads": 6},
        "missing": [1, 20],
        "test_boards": 200,
        "arms": {"biased": [[1000, 0.5, 0.25]], "random": [[1000, 0.125, 0.0]]},
        "environment": ENVIRONMENT,
    }
    lines = report(results).splitlines()
    assert (
        lines[0] == "| boards seen | biased, 1 missing | biased, 20 missing | random, 1 missing | random, 20 missing |"
    )
    assert lines[2] == "| 1,000 | 50 % | 25 % | 12 % | 0 % |"
    assert "width 96, 5 layers, 6 heads; one run each, seed 5." in lines[-1]


def test_other_values_are_no_measurement():
    with pytest.raises(KeyError):
        report({"idle": []})
