"""CUDA graphs on a GPU: `pytest -m gpu`. The checks of engine/test_graphs.py, and those of memory, streams and time."""

import gc

import pytest
import torch
from conditioned_models import Labelled, Prepared
from small_models import TINY, randomise
from support import device_trace
from torch.profiler import ProfilerActivity, profile

import ipr_fast
from ipr_fast import Schedule, fixed_patches, random_patches, trace
from ipr_fast.engine import graph_cache, memory
from ipr_fast.engine.capture_check import CaptureError
from ipr_fast.engine.engine import Engine
from ipr_fast.engine.graphs import CudaCapture
from ipr_fast.engine.patch_lanes import PatchLanes, PatchSettings
from ipr_fast.engine.precision import float32_products
from ipr_fast.engine.runner import Runner
from ipr_fast.models import PRESETS, PatchTransformer, SRMUNet, SRMUNetConfig
from ipr_fast.sampling.schedule import Sampling
from ipr_fast.sampling.selection import make_selector

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def there():
    """The tiny transformer on the GPU, and nothing kept before or after."""
    graph_cache.drop_kept()
    yield randomise(PatchTransformer(TINY), seed=0).cuda()
    graph_cache.drop_kept()


def small_unet():
    config = SRMUNetConfig(1, 16, 4, (32, 32, 32, 32), (False, True, False, False), 1, 32, 32, 16)
    return randomise(SRMUNet(config), seed=1).cuda()


def third_row(x, iteration):
    mask = torch.zeros(len(x), 4, 4, dtype=torch.bool, device=x.device)
    mask[iteration % 3 :, iteration % 4] = True
    return mask


@pytest.mark.parametrize("network", ["transformer", "unet"])
@pytest.mark.parametrize(
    "mask_fn", [random_patches(0.3), fixed_patches([1, 2, 7]), third_row], ids=["random", "fixed", "function"]
)
def test_replays_equal_eager_runs(there, finished, ragged_known, network, mask_fn):
    model = there if network == "transformer" else small_unet()
    x, known = finished.repeat(3, 1, 1, 1).cuda(), ragged_known.repeat(3, 1).cuda()
    for seed, schedule in ((3, Schedule(10, 0.8)), (2**63 + 5, Schedule(4, 0.5)), (3, Schedule(3, 0.0))):
        runs = [
            ipr_fast.refine_batch(
                x, mask_fn, 4, model=model, known=known, seed=seed, schedule=schedule, backend=b, max_chains=most
            )
            for b, most in (("graphs", "auto"), ("graphs", 7), ("torch", "auto"))
        ]
        for run in runs[:2]:
            # A UNet's convolutions are computed in other ways for other numbers of chains.
            torch.testing.assert_close(run, runs[2], atol=2e-5 if network == "transformer" else 1e-4, rtol=0)


def test_generation_and_refinement_equal_the_reference(there, finished, ragged_known):
    runs = []
    for backend in ("graphs", "reference"):
        options = {"model": there, "known": ragged_known.cuda(), "seed": 4, "backend": backend}
        x = ipr_fast.generate_batch(12, known_values=finished.cuda(), schedule=Schedule(3, 0.5), **options)
        runs.append(ipr_fast.refine_batch(x, random_patches(), 3, **options))
    torch.testing.assert_close(*runs, atol=1e-4, rtol=0)


def test_fifty_calls_of_changing_size_leak_nothing(there, finished):
    x = finished.repeat(6, 1, 1, 1).cuda()

    def calls(number):
        for i in range(number):
            ipr_fast.refine_batch(x[: 1 + 7 * i % 71], random_patches(), 2, model=there, seed=i)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    calls(15)
    assert calls(50) <= calls(15) + 2**20
    graph_cache.drop_kept()
    before = torch.cuda.memory_allocated()
    calls(15)
    graph_cache.drop_kept()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20


def make_engine(model, finished):
    sampling = Sampling(Schedule(10, 0.8))
    patches, ids = model.grid.to_patches(finished.cuda()), torch.arange(len(finished), device="cuda")
    device = patches.device
    runner = Runner(PatchLanes(model, 16, device, PatchSettings.of(sampling)), CudaCapture(device))
    return Engine(runner, patches, ids, sampling)


@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_nothing_synchronises_within_an_iteration(there, finished, ragged_known, ratio):
    engine = make_engine(there, finished)
    select = make_selector(random_patches(ratio), there.grid, ~ragged_known.cuda(), engine.chain_ids, 0)

    def iterations(*numbers):
        for number in numbers:
            engine.begin(number)
            engine.regenerate(select(number, engine.iteration, None))

    iterations(1, 2)
    torch.cuda.synchronize()
    events = device_trace.record({"work": lambda: iterations(3, 4)}, engine.values.device)
    found = device_trace.waits(events, "work")
    assert found["replays"] == 2 * (1 + engine.num_steps(select.counts))
    assert found["waits"] == 0, found["of"]


@pytest.mark.parametrize(
    ("mask_fn", "callback", "looks"),
    [
        (random_patches(), None, 0),
        (fixed_patches([1, 2, 7]), lambda iteration, x: None, 0),
        (third_row, None, 1),
        (random_patches(), lambda iteration, x: x.flatten(1).amax(1) > 1e9, 1),
    ],
    ids=["policy", "callback", "mask_fn", "freezing callback"],
)
def test_python_costs_one_look_at_the_data_an_iteration(there, finished, mask_fn, callback, looks):
    def waits(iters):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            ipr_fast.refine_batch(finished.cuda(), mask_fn, iters, model=there, callback=callback)
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events()]
        synchronisations = sum(name.startswith("cudaStreamSynchronize") for name in names)
        return sum("Memcpy DtoH" in name for name in names), synchronisations

    waits(5)  # captures
    copies, synchronisations = (five - two for five, two in zip(waits(5), waits(2), strict=True))
    assert copies == 3 * looks
    assert synchronisations <= 3 * looks


@pytest.mark.parametrize("preset", ["even_pixels", "mnist_sudoku"])
def test_little_of_a_tick_is_outside_the_network(preset, monkeypatch):
    """At most 3 % at batch 64, by the time that kernels take."""
    monkeypatch.setattr(memory, "count", lambda *_: memory.Need(0, 0))  # no ticks on fewer lanes
    config = PRESETS[preset]
    with torch.device("cuda"):
        model = SRMUNet(config).eval().requires_grad_(False)
    x = torch.randn(64, config.channels, config.image_size, config.image_size, device="cuda").clamp(-1, 1)

    def run():
        options = {"model": model, "schedule": Schedule(4, 1.0), "backend": "torch", "max_chains": 64}
        ipr_fast.refine_batch(x, random_patches(), 1, **options)
        torch.cuda.synchronize()

    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, trace.tracing("torch"):
        run()
    rows = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    time = {event.key: event.device_time_total for event in rows}
    assert time["ipr_fast::denoise"] > 0
    outside = sum(time.get(f"ipr_fast::{name}", 0) for name in ("renoise", "advance", "denoise", "enter", "leave"))
    network = time["ipr_fast::network"]
    assert network > 0
    assert outside <= 0.03 * (network + outside)


def test_a_model_that_looks_at_the_data_is_named_and_the_next_call_works(there, finished):
    class Curious(PatchTransformer):
        def forward(self, patches, levels, active=None, **prepared):
            return super().forward(patches, levels, active, **prepared) if levels.max() < 2 else None

    curious = randomise(Curious(TINY), seed=0).cuda()
    with pytest.raises(CaptureError, match=r"is_nonzero.* in forward .*test_gpu_graphs.py"):
        ipr_fast.refine_batch(finished.cuda(), random_patches(), 1, model=curious)
    expected = ipr_fast.refine_batch(finished.cuda(), random_patches(), 2, model=curious, backend="torch")
    found = ipr_fast.refine_batch(finished.cuda(), random_patches(), 2, model=there)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", range(1, 9))
def test_whatever_comes_up_in_a_capture_the_next_call_works(there, finished, error, call):
    """In the counting (four calls), the warming up (two), the capture itself, and the eager first step."""

    class Failing(PatchTransformer):
        calls = 0

        def forward(self, *arguments, **prepared):
            Failing.calls += 1
            if Failing.calls == call:
                raise error("on purpose")
            return super().forward(*arguments, **prepared)

    failing = randomise(Failing(TINY), seed=0).cuda()
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        ipr_fast.refine_batch(finished.cuda(), random_patches(), 2, model=failing)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    expected = ipr_fast.refine_batch(finished.cuda(), random_patches(), 2, model=there, backend="torch")
    for model in (failing, there):
        found = ipr_fast.refine_batch(finished.cuda(), random_patches(), 2, model=model)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_on_a_stream_of_the_users(there, finished):
    x = finished.cuda()
    expected = ipr_fast.refine_batch(x, random_patches(), 3, model=there)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = ipr_fast.refine_batch(x, random_patches(), 3, model=there)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", ["transformer", "unet"])
def test_half_precision_is_near_float32(there, finished, dtype, network):
    """State, statistics and softmax stay float32: at most twice the error that rounding the weights makes alone."""
    model = there if network == "transformer" else small_unet()
    half = (randomise(PatchTransformer(TINY), seed=0) if network == "transformer" else small_unet()).to("cuda", dtype)
    rounded = randomise(PatchTransformer(TINY), seed=0) if network == "transformer" else small_unet()
    rounded = rounded.to(dtype).to("cuda", torch.float32)
    options = {"schedule": Schedule(4, 1.0), "stochasticity": 0.0}
    runs = [
        ipr_fast.refine_batch(finished.cuda(), random_patches(), 1, model=m, **options) for m in (model, rounded, half)
    ]
    assert runs[2].dtype == torch.float32
    scale = runs[0].abs().max() * torch.finfo(dtype).eps
    assert (runs[2] - runs[0]).abs().max() <= 2 * (runs[1] - runs[0]).abs().max() + 16 * scale


@pytest.fixture
def _switches():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("_switches")
def test_tf32_only_where_it_is_asked_for():
    torch.manual_seed(0)
    a, b = torch.randn(2, 256, 256, device="cuda")
    exact = (a.double() @ b.double()).float()

    def error():
        return ((a @ b) - exact).abs().max().item()

    for before in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = before
        torch.backends.cudnn.allow_tf32 = True
        with float32_products(a.device, tf32=False):
            assert error() < 1e-3
            assert not torch.backends.cudnn.allow_tf32
        with float32_products(a.device, tf32=True):
            assert error() > 1e-3
        assert torch.backends.cuda.matmul.allow_tf32 is before
        assert torch.backends.cudnn.allow_tf32


def test_what_does_not_fit_is_said_and_auto_takes_less(there, finished, monkeypatch):
    x = finished.repeat(6, 1, 1, 1).cuda()
    expected = ipr_fast.refine_batch(x, random_patches(), 1, model=there)
    graph_cache.drop_kept()
    settings = PatchSettings.of(Sampling(Schedule(10, 0.8)))
    with torch.inference_mode():
        need = graph_cache.need_of(there, 4, x.device, settings, graphs=True)
    around = 16 * 72 * 16 * 16
    monkeypatch.setattr(memory, "available_bytes", lambda device: (1.1 * need.of(20) + around) / memory.SHARE)
    with pytest.raises(ValueError, match=r"max_chains: 72 chains at a time need .* pass max_chains=\d+ or"):
        ipr_fast.refine_batch(x, random_patches(), 1, model=there, max_chains=72)
    found = ipr_fast.refine_batch(x, random_patches(), 1, model=there)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_the_count_of_bytes_covers_what_is_taken():
    """A UNet's lanes, eager and captured, within what was counted and the share that is left for libraries."""
    model = small_unet()
    device = next(model.parameters()).device
    settings = PatchSettings.of(Sampling(Schedule(1)))
    with torch.inference_mode():
        need = graph_cache.need_of(model, 4, device, settings, graphs=True)
    graph_cache.drop_kept()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ipr_fast.refine_batch(torch.zeros(4096, 1, 16, 16, device=device), random_patches(), 1, model=model)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= need.of(4096) / memory.SHARE + 16 * 4096 * 256


@pytest.mark.parametrize("network", [Labelled, Prepared])
def test_replays_give_each_chain_its_condition(finished, ragged_known, network):
    """Sixteen labels on ragged chains, in lanes that chains leave: each equals its run alone."""
    model, labels = network().cuda(), torch.arange(12, device="cuda").flip(0)
    known, values = ragged_known.cuda(), finished.cuda()

    def run(rows, **options):
        ids = torch.arange(12, device="cuda")[rows]
        common = {
            "model": model,
            "known": known[rows],
            "chain_ids": ids,
            "condition": labels[rows],
            **options,
        }
        x = ipr_fast.generate_batch(
            len(ids), known_values=values[rows], schedule=Schedule(3, 0.5), device="cuda", **common
        )
        return ipr_fast.refine_batch(x, random_patches(0.5), 3, schedule=Schedule(4, 0.8), **common)

    alone = torch.cat([run([chain], backend="torch") for chain in range(12)])
    for options in ({}, {"max_chains": 5}, {"max_chains": 5}):
        torch.testing.assert_close(run(slice(None), **options), alone, atol=2e-5, rtol=0)
