"""The definitions that bench/ checks operations against, and what it measures."""

import bench_operations
import numpy as np
import pytest
import torch
from bench_operations import cases
from support import definitions, harness
from tape import Tape

CPU = torch.device("cpu")

# Of Random123 (Salmon et al. 2011), for philox4x32 with ten rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_definition_of_philox_gives_the_known_answers(counter, key, answer):
    low, high = (int(word, 16) for word in key.split())
    words = definitions.philox(tuple(int(word, 16) for word in counter.split()), high << 32 | low)
    assert [int(word[0]) for word in words] == [int(word, 16) for word in answer.split()]


def test_the_definition_of_normals_is_normal():
    patches = torch.arange(16).repeat(64, 1)
    found = definitions.normals(1, 2, 3, 4, torch.arange(64), patches, 64)
    assert found.shape == (64, 16, 64)
    assert abs(found.mean()) < 5 / found.numel() ** 0.5
    assert abs(found.var() - 1) < 5 * (2 / found.numel()) ** 0.5


@pytest.mark.parametrize("case", cases(), ids=str)
def test_each_operation_is_its_definition_and_its_twin(case):
    operation = case.make(2, CPU, 0)
    assert operation.bytes > 0
    assert operation.flops > 0
    assert (operation.plain is not None) == (case.unit == "flop")
    bench_operations.check(operation, CPU).hold()
    operation.reset()
    found = [tensor.clone() for tensor in operation.run()]
    operation.reset()
    for ours, twin in zip(found, operation.twin(), strict=True):
        assert torch.equal(ours, twin)  # on a CPU the operation is its twin


@pytest.mark.parametrize("case", cases(), ids=str)
def test_each_operation_does_something_and_can_be_restored(case):
    """Every call in a work finds what the first one found."""
    operation = case.make(6, CPU, 0)
    runs = []
    for _ in range(2):
        operation.reset()
        runs.append([tensor.clone() for tensor in operation.run()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    other = case.make(6, CPU, 1)
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], other.run(), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "renoise",
        "normals",
        "slot inputs",
        "advance",
        "denoise",
        "layer norm",
        "gated norm",
        "embedded norm",
        "partial attention",
    ],
)
@pytest.mark.parametrize("error", [1e-2, float("nan")])
def test_a_wrong_result_is_noticed(name, error):
    operation = next(case for case in cases() if case.operation == name).make(2, CPU, 0)

    def wrong():
        first, *others = operation.run()
        return [(first.double() + error).to(first.dtype) if first.is_floating_point() else first + 1, *others]

    with pytest.raises(AssertionError, match="against='definition'"):
        bench_operations.check(operation._replace(run=wrong), CPU).hold()


def test_torchs_attention_of_all_tokens_holds_that_of_the_active_ones():
    case = next(case for case in cases() if case.operation == "partial attention")
    operation = case.make(3, CPU, 0)
    (ours,), every = operation.run(), operation.plain().transpose(1, 2).flatten(2)
    for own, theirs in zip(ours, every, strict=True):
        apart = (own[:, None] - theirs[None]).abs().amax(-1)  # each active token is one of them, in the same order
        nearest = apart.argmin(1)
        assert apart.amin(1).max() < 1e-5
        assert torch.equal(nearest, nearest.sort().values)


def test_calls_take_turns_and_are_captured_once(monkeypatch):
    """On a tape in a graph's place, every operation is one that a graph can hold."""
    tapes = []
    monkeypatch.setattr("support.chains.capture_on", lambda device: tapes.append(Tape()) or tapes[-1])
    order = []
    work = bench_operations.in_turn([lambda: order.append("a"), lambda: order.append("b")], 3, CPU)
    work()
    work()
    assert "".join(order) == 3 * "aba"  # twice to warm up, once to capture; replays need no Python
    assert len(tapes) == 1
    for case in cases():
        operation = case.make(2, CPU, 0)
        bench_operations.in_turn([operation.run], 2, CPU)()
        operation.reset()
        tapes[-1].replayed.clear()
        bench_operations.check(operation, CPU).hold()


def test_a_work_on_a_cpu_lasts(monkeypatch):
    for call, number in ((0.01, 1), (0.0003, 7), (1e-9, bench_operations.MOST_CALLS)):
        with monkeypatch.context() as patched:
            patched.setattr(bench_operations, "seconds", lambda function, device, call=call: call)
            assert bench_operations.calls_in_a_work(lambda: None, CPU) == number
    arm = bench_operations.copy_arm(4096, 3, CPU)
    assert arm.units % 4096 == 0
    assert arm.units >= 3 * 4096
    assert harness.seconds(arm.work, CPU) > 0
    assert bench_operations.product_arm(torch.float32, CPU).units % (2 * 512**3) == 0


def test_an_integer_that_is_off_counts_more_than_a_rounding():
    off, allowed = bench_operations._apart(torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert (off, allowed) == (1.0, 0.0)
    off, allowed = bench_operations._apart(torch.ones(2), torch.ones(2, dtype=torch.float64) * 8)
    assert (off, allowed) == (7.0, 32 * 8 * 2.0**-24)
    with pytest.raises(AssertionError, match="shape"):
        bench_operations._apart(torch.ones(2), torch.ones(3))


def test_choices_are_of_free_patches_and_ascend():
    free = torch.tensor([[True, False, True, True], [False, True, True, True]])
    chosen = definitions.choose(free, 2, 7, 1, torch.tensor([4, 9]))
    assert chosen.shape == (2, 2)
    assert free.gather(1, chosen).all()
    assert (np.diff(chosen.numpy()) > 0).all()
