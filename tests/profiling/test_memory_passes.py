"""The bytes of a UNet's tick beside those of its products, and the table of profiling/memory_passes.py."""

import memory_passes
import pytest
from memory_passes import KINDS, PRODUCTS, REST, by_kind, tick_of
from support.counts import Operation
from support.launches import can_be_counted
from support.subjects import makers

pytestmark = pytest.mark.skipif(not can_be_counted(), reason="needs Triton, without its interpreter")

# Bytes of a tick of 64 chains of MNIST Sudoku in float32. They were 285e9 and 116e9 while norms read their maps twice,
# convolutions added their biases, and skips were concatenated. Now products add to 27e9 bytes of maps.
PASSES, PRODUCTS_WITH_SUMS = 107.4e9, 143.4e9


def test_operations_by_kind():
    operations = [
        Operation("convolution", 9, 5),
        Operation("add_", 0, 3),
        Operation("add_", 0, 4),
        Operation("x", 0, 1),
    ]
    found = by_kind(operations)
    assert list(found) == list(KINDS)
    assert (found[PRODUCTS], found["sums and biases"], found[REST]) == ((1, 5), (2, 7), (1, 1))


def test_the_passes_of_the_largest_unet_are_half_of_what_they_were():
    kinds = by_kind(tick_of(makers(smoke=False)["MNIST Sudoku"](), 64))
    assert sum(moved for kind, (_, moved) in kinds.items() if kind != PRODUCTS) < PASSES
    assert kinds[PRODUCTS][1] < PRODUCTS_WITH_SUMS


def test_the_script_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr(memory_passes, "makers", lambda smoke: makers(smoke=True))
    memory_passes.main(["--model", "Even Pixels", "--chains", "3", "--bandwidth-gbs", "1"])
    heading, _, *table = capsys.readouterr().out.splitlines()
    assert heading == "A tick of Even Pixels, 3 chains, float32, at 1 GB/s"
    assert len(table) == 2 + len(KINDS) + 2
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize("options", [["--chains", "0"], ["--bandwidth-gbs", "-1"]])
def test_options_that_make_no_sense(options):
    with pytest.raises(SystemExit):
        memory_passes.main(options)
