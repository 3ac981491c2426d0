"""`bench/report.py --compare`: the interval, what is marked, and what cancels."""

import made_up_measurements as made_up
import numpy as np
import pytest
from made_up_measurements import row
from reporting import compare
from support import records


def compared(tmp_path, old: list[dict], new: list[dict], **machine: object) -> str:
    paths = made_up.write(tmp_path / "old.json", old), made_up.write(tmp_path / "new.json", new, **machine)
    return compare.compare(*map(records.read, paths))


def plain(name: str, seconds: list[float], **facts: object) -> dict:
    return made_up.benchmark(name, "end to end", seconds, batch=1, **facts)


def test_a_constant_ratio_has_an_interval_without_width(tmp_path):
    times = [1.0] * 5
    text = compared(tmp_path, [plain("test_x", times)], [plain("test_x", [t / 1.25 for t in times])])
    cells = row(text, "end to end: test_x")[1:]
    assert cells == ["1.25", "[1.25, 1.25]", "**faster**", "seconds", "5, 5"]
    text = compared(tmp_path, [plain("test_x", times)], [plain("test_x", [t * 1.25 for t in times])])
    assert row(text, "end to end: test_x")[1:4] == ["0.800", "[0.800, 0.800]", "**slower**"]


def test_noise_is_not_marked_and_a_difference_beyond_it_is():
    generator = np.random.default_rng(0)
    old, new = (np.exp(0.05 * generator.standard_normal(25)) for _ in range(2))
    faster, low, high = compare.interval(old, new)
    assert low < 1 < high
    assert low < faster < high
    assert compare.interval(old, new) == (faster, low, high)  # the same each time
    scaled = compare.interval(2 * old, new)
    assert scaled == pytest.approx((2 * faster, 2 * low, 2 * high))
    assert scaled[1] > 1


def test_few_rounds_are_never_marked(tmp_path):
    times = [1.0] * (compare.FEWEST_MARKED - 1)
    text = compared(tmp_path, [plain("test_x", times)], [plain("test_x", [t / 2 for t in times])])
    assert row(text, "end to end: test_x") == ["end to end: test_x", "2.00", "[2.00, 2.00]", "seconds", "4, 4"]


def test_a_slower_machine_cancels_against_foreign_work_only(tmp_path):
    facts = {"unit": "bytes", "subject": "renoise"}
    rounds, slower = np.linspace(1.0, 1.2, 5), np.linspace(3.0, 4.0, 5)

    def benchmark(yardstick: str, times: np.ndarray) -> dict:
        return made_up.benchmark(yardstick, "operations", list(2 * times), against={yardstick: list(times)}, **facts)

    old, new = ([benchmark(name, times) for name in ("copy", "without graphs")] for times in (rounds, slower))
    text = compared(tmp_path, old, new, processor="Another", device="Another")
    assert row(text, "operations: copy")[1:] == ["1.00", "[1.00, 1.00]", "time over that of copy", "5, 5"]
    ours = row(text, "operations: without graphs")
    assert ours[3:] == ["**slower**", "seconds", "5, 5"]
    assert text.startswith("**Not the same machine and versions (device: A Processor and Another; processor:")


def test_against_foreign_work_faster_is_faster(tmp_path):
    old, new = (
        made_up.benchmark("test_x", "baselines", [seconds] * 5, against={"compiled": [9.0] * 5, "batched": [4.0] * 5})
        for seconds in (3.0, 2.0)
    )
    cells = ["1.50", "[1.50, 1.50]", "**faster**", "time over that of batched", "5, 5"]
    assert row(compared(tmp_path, [old], [new]), "baselines: test_x")[1:] == cells


def test_units_do_not_have_to_be_as_many(tmp_path):
    old, new = (plain("test_x", [0.1 * units] * 5, units=units) for units in (1.0, 8.0))
    assert row(compared(tmp_path, [old], [new]), "end to end: test_x")[1] == "1.00"


def test_what_cannot_be_compared_is_named(tmp_path):
    old = [plain("test_x", [1.0], subject="a"), plain("test_gone", [1.0])]
    new = [plain("test_x", [1.0], subject="b"), plain("test_new", [1.0])]
    text = compared(tmp_path, old, new)
    assert "No benchmark is in both files." in text
    assert "measure something else: test_x (subject)." in text
    assert "Only in old: test_gone." in text
    assert "Only in new: test_new." in text
    assert not text.startswith("**")
