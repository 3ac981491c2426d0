"""The count of bytes before lanes are allocated, and the errors for lanes that do not fit."""

import pytest
import torch
from small_models import TINY, randomise

import ipr_fast
from ipr_fast import random_patches
from ipr_fast.engine import graph_cache, memory
from ipr_fast.engine.patch_lanes import PatchSettings
from ipr_fast.models import PatchTransformer, SRMUNet, SRMUNetConfig

CPU, SETTINGS = torch.device("cpu"), PatchSettings(0.5, 1.0)


def test_the_peak_is_of_what_is_alive_at_a_time():
    outside = torch.zeros(1000)
    with memory.PeakBytes() as counted:
        a = torch.zeros(1000)
        b = a + 1
        view = b[10:]
        del b
        assert counted.now == 8000
        del view
        assert counted.now == 4000
        for _ in range(5):
            a = a * 2  # two at a time
        outside.add_(a)
        outside.view(10, 100).mul_(2)
    assert (counted.now, counted.peak) == (4000, 8000)


@pytest.mark.parametrize("inference", [False, True])
def test_the_count_is_right_for_any_number_of_lanes(model, inference):
    """The line through one and three lanes predicts the peak of ten within 3 %."""
    unet = randomise(SRMUNet(SRMUNetConfig(1, 16, 4, (32, 64), (False, True), 1, 32, 32, 16)), seed=0)
    for denoiser in (model, unet):
        with torch.inference_mode(inference):
            need = graph_cache.need_of(denoiser, 4, CPU, SETTINGS)
            with memory.PeakBytes() as counted:
                made = graph_cache._make(denoiser, CPU, SETTINGS, 10)
                graph_cache._run(4, made)
                lasting = counted.now
                del made
            twice = graph_cache.need_of(denoiser, 4, CPU, SETTINGS, graphs=True)
        assert counted.peak == pytest.approx(need.of(10), rel=0.03)
        assert 2 * counted.peak - lasting == pytest.approx(twice.of(10), rel=0.03)
        assert need.each > 4 * 16 * 16  # the patches alone


def test_a_library_workspace_does_not_hide_what_a_lane_costs(monkeypatch):
    """Peaks of the allocator and counted ones have a line each; the need takes the larger slope."""
    peaks = {1: [4e6, 61e6], 3: [12e6, 63e6]}
    monkeypatch.setattr(memory, "_peaks", lambda make, run, lanes, *_: ([0, 0], [int(n) for n in peaks[lanes]]))
    need = memory.count(None, None, CPU)
    assert need.each == 4e6
    assert need.of(1) == 61e6


@pytest.mark.parametrize(
    ("most", "free", "lanes"),
    [
        (4096, 10**9, [1, 3, 64]),
        (20, 10**9, [1, 3, 20]),
        (4096, 2 * 10**7, [1, 3, 50]),  # by what three take, a quarter of the free bytes holds so many
        (4096, 10**6, [1, 3]),
        (2, 10**9, [1, 2]),
        (1, 10**9, [1]),
    ],
)
def test_a_workspace_that_only_many_lanes_take_is_counted(monkeypatch, most, free, lanes):
    """On a GPU, of as many lanes as are wanted and fit."""
    counted = []

    def peaks(make, run, number, device, times):
        counted.append(number)
        return [0, 0], [number * 10**5, number * (10**6 if number > 8 else 10**5)]

    monkeypatch.setattr(memory, "_peaks", peaks)
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    need = memory.count(lambda number: None, lambda made: None, torch.device("cuda"), most=most)
    assert counted == lanes
    assert 1 <= need.each / (10**6 if lanes[-1] > 8 else 10**5) <= 1.2
    assert all(need.of(number) >= number * (10**6 if number > 8 else 10**5) for number in lanes)


@pytest.mark.parametrize("fits", [1, 3])
def test_lanes_that_do_not_fit_while_they_are_counted_are_left_out(monkeypatch, fits):
    def peaks(make, run, number, device, times):
        if number > fits:
            raise torch.OutOfMemoryError("on purpose")
        return [0, 0], [number * 10**5, number * 10**5]

    monkeypatch.setattr(memory, "_peaks", peaks)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**9)
    need = memory.count(lambda number: None, lambda made: None, torch.device("cuda"))
    assert need == memory.Need(0, 10**5, 0)


def test_tables_do_not_hide_what_a_lane_costs():
    """Tables of the bundled model take more bytes, while they are allocated, than one lane."""
    bundled = ipr_fast.load_model("digit-sudoku-4x4")
    need = graph_cache.need_of(bundled, 4, CPU, SETTINGS)
    with memory.PeakBytes() as counted:
        graph_cache._run(4, graph_cache._make(bundled, CPU, SETTINGS, 200))
    assert counted.peak == pytest.approx(need.of(200), rel=0.03)


def test_lanes_within():
    need = memory.Need(fixed=100, each=30)
    assert [need.lanes_within(n) for n in (0, 100, 129, 130, 1000)] == [0, 0, 0, 1, 30]
    assert need.of(3) == 190


def test_where_nobody_knows_what_is_free_everything_fits(model, finished, monkeypatch):
    """Machines without /proc/meminfo."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: float("inf"))
    assert lanes_of(model, 100) == 100
    x = ipr_fast.generate_batch(65, model=model, schedule=ipr_fast.Schedule(1, 1.0))
    assert x.shape == (65, 1, 16, 16)


def test_a_sparse_tensor_in_a_model_is_no_obstacle(model, finished):
    class Sparse(PatchTransformer):
        def forward(self, *arguments, **prepared):
            torch.eye(4).to_sparse()
            return super().forward(*arguments, **prepared)

    sparse = randomise(Sparse(TINY), seed=0)
    x = finished[:1].repeat(70, 1, 1, 1)
    options = {"schedule": ipr_fast.Schedule(1)}
    found, expected = (ipr_fast.refine_batch(x, random_patches(), 1, model=m, **options) for m in (sparse, model))
    torch.testing.assert_close(found, expected)


@pytest.fixture
def small(monkeypatch):
    """A machine on which ten chains of the model fit, and four more bytes."""

    def set_up(model, chains, batch):
        need = graph_cache.need_of(model, 4, CPU, SETTINGS)
        around = 16 * batch * 16 * 16
        monkeypatch.setattr(
            memory, "available_bytes", lambda device: (need.fixed + chains * need.each + around + 4) / memory.SHARE
        )

    return set_up


def lanes_of(model, batch, **options):
    with graph_cache.runner_for(graph_cache.Request(model, batch, 4, CPU, SETTINGS, **options)) as runner:
        return runner.lanes.num_lanes


def test_auto_takes_what_fits(model, small):
    small(model, chains=40, batch=100)
    assert lanes_of(model, 100) == 32  # a power of two
    assert lanes_of(model, 64) == 64  # few are not counted on a CPU
    small(model, chains=100, batch=100)
    assert lanes_of(model, 100) == 100
    assert lanes_of(model, 100, max_chains=7) == 7
    assert lanes_of(model, 5, max_chains=7) == 5


def test_auto_takes_no_more_on_a_cpu_than_are_fast(model, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: float("inf"))
    assert lanes_of(model, 20_000) == graph_cache.CPU_PATCHES // 16
    assert lanes_of(model, 20_000, max_chains=1000) == 1000


def test_where_nothing_fits_the_error_says_so(model, small, finished):
    small(model, chains=0, batch=65)
    with pytest.raises(ValueError, match=r"max_chains: 65 chains at a time need .* on cpu, .* not even one fits"):
        ipr_fast.refine_batch(finished[:1].repeat(65, 1, 1, 1), random_patches(), 1, model=model)


def test_what_is_asked_for_and_does_not_fit_names_what_would(model, small, monkeypatch):
    small(model, chains=10, batch=65)
    need = graph_cache.need_of(model, 4, CPU, SETTINGS)
    device = torch.device("meta")  # which stands for a GPU here: the number of chains is counted whoever asks
    monkeypatch.setattr(memory, "count", lambda *_: need)
    with pytest.raises(ValueError, match=r"max_chains: 65 chains .* pass max_chains=10 or \"auto\""):
        graph_cache.Request(model, 65, 4, device, SETTINGS, 65).allocate()


def test_memory_that_is_kept_for_later_calls_is_given_back_when_needed(model, monkeypatch):
    dropped = []
    monkeypatch.setattr(graph_cache, "drop_kept", lambda: dropped.append(graph_cache._kept.clear()))
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1e12 if dropped else 0.0)
    graph_cache._kept["other"] = None
    assert lanes_of(model, 100) == 100
    assert len(dropped) == 1


def test_results_do_not_depend_on_how_many_run_at_a_time(model, finished, ragged_known):
    x, known = finished.repeat(6, 1, 1, 1), ragged_known.repeat(6, 1)
    expected = ipr_fast.refine_batch(x, random_patches(), 2, model=model, known=known)
    for most in (1, 7, 71, 72, 1000):
        found = ipr_fast.refine_batch(x, random_patches(), 2, model=model, known=known, max_chains=most)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    shuffle = torch.randperm(72, generator=torch.Generator().manual_seed(0))
    options = {"model": model, "known": known[shuffle], "chain_ids": shuffle, "max_chains": 20}
    found = ipr_fast.refine_batch(x[shuffle], random_patches(), 2, **options)
    torch.testing.assert_close(found, expected[shuffle], atol=1e-5, rtol=0)


def test_a_generation_of_more_chains_than_run_at_a_time(model, ragged_known, finished):
    options = {"model": model, "known": ragged_known, "known_values": finished, "seed": 2}
    expected = ipr_fast.generate_batch(12, **options)
    for most in (1, 5):
        torch.testing.assert_close(ipr_fast.generate_batch(12, max_chains=most, **options), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "many", True, None])
def test_max_chains_is_checked(model, finished, wrong):
    with pytest.raises(ValueError, match="max_chains must be"):
        ipr_fast.refine_batch(finished, random_patches(), 1, model=model, max_chains=wrong)
    with pytest.raises(ValueError, match="max_chains must be"):
        ipr_fast.generate_batch(2, model=model, max_chains=wrong)


def test_binary():
    assert [memory.binary(n) for n in (0, 1023, 2048, 3.5 * 2**20, 130 * 2**30)] == [
        "0 bytes",
        "1023 bytes",
        "2 KiB",
        "3.5 MiB",
        "130 GiB",
    ]


def test_a_batch_of_a_thousand_is_counted_on_the_cpu(finished):
    counted = []
    model = randomise(PatchTransformer(TINY), seed=0)
    model.register_forward_pre_hook(lambda module, inputs: counted.append(len(inputs[0])))
    ipr_fast.refine_batch(finished[:1].repeat(1000, 1, 1, 1), random_patches(), 1, model=model)
    assert counted[:2] == [1, 3]
    most = graph_cache.CPU_PATCHES // 16
    assert set(counted[2:]) == {most, 1000 - most}
