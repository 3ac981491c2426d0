import pytest
import torch
from norms import types

from ipr_fast.kernels import categorical as file
from ipr_fast.kernels.categorical import Drawn
from ipr_fast.kernels.launch import runs_kernel
from ipr_fast.kernels.logits import LOWEST
from ipr_fast.kernels.philox import seed_tensor

# Of rows of NaN and infinity, which numpy warns of under the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def slots(batch, number, device, generator):
    index = torch.randint(0, 2**16, (batch, number), generator=generator).int()
    index[0, 0] = -1
    counters = {
        "step": torch.randint(-1, 2**16 - 1, (batch,), generator=generator).to(device),
        "iteration": torch.tensor(2**31 + 5, device=device),
        "chain_ids": torch.randint(0, 2**32, (batch,), generator=generator).to(device),
        "seed": seed_tensor(2**63 + 11, device),
    }
    return {"index": index.to(device), **counters}


def poisoned(batch, number, device):
    """Buffers in which what is not written shows."""
    drawn = Drawn.empty(batch, number, device)
    return drawn._replace(token=drawn.token.fill_(-99))


def both(logits, options, **restrictions):
    """What the kernel draws, and the twin."""
    found, expected = (poisoned(*logits.shape[:2], logits.device) for _ in range(2))
    file.categorical(logits, out=found, **options, **restrictions)
    given = {"temperature": 1.0, "threshold": None, "forbidden": None, "keep": False} | restrictions
    counters = tuple(options[name] for name in ("seed", "step", "iteration", "chain_ids"))
    file._categorical(logits, options["index"], counters, expected, *given.values())
    return found, expected


def assert_same(found, expected, spread):
    """The same tokens. Statistics apart by the roundings of differences up to `spread`, of exp, and of sums."""
    assert torch.equal(found.token, expected.token)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=(spread + 16) * 2**-22, atol=16 * 2**-22, equal_nan=True)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 5, 127, 128, 256, 257, 1000, 2500])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("restricted", [False, True])
def test_tokens_are_those_of_the_twin(vocabulary, temperature, restricted, device, generator):
    for dtype in types(device):
        batch, number = (3, 2) if vocabulary < 200 else (1, 3)
        logits = (3 * torch.randn(batch, number, vocabulary, generator=generator)).to(device, dtype)
        restrictions = {"temperature": temperature}
        if restricted:
            forbidden = torch.rand(vocabulary, generator=generator) < 0.3
            forbidden[vocabulary // 2] = False
            allowed = logits.float().masked_fill(forbidden.to(device), LOWEST)
            threshold = torch.minimum(allowed.amax(-1), torch.tensor(-0.5, device=device))
            restrictions |= {"threshold": threshold, "forbidden": forbidden.to(device)}
        found, expected = both(logits, slots(batch, number, device, generator), **restrictions)
        assert_same(found, expected, 40)
        assert found.token[0, 0] == -1
        if restricted:
            kept = allowed.gather(2, found.token.clamp(min=0)[..., None])[..., 0] >= threshold
            assert kept.flatten()[1:].all()


@pytest.mark.parametrize("keep", [False, True])
def test_many_rows_of_few_ids(keep, device, generator):
    logits = torch.randn(41, 7, 10, generator=generator).to(device)
    options = slots(41, 7, device, generator)
    options["index"][5:30] = -1
    found, expected = both(logits, options, keep=keep)
    assert_same(found, expected, 8)
    assert all(each[5:30].isnan().all() == keep for each in found[1:])  # what was there before


def test_the_largest_vocabulary(device, generator):
    logits = torch.randn(1, 2, 2**18, generator=generator).to(device)
    assert_same(*both(logits, slots(1, 2, device, generator)), 12)


@pytest.mark.parametrize("vocabulary", [40, 1500])
def test_rows_apart_and_not_aligned(vocabulary, device, generator):
    wider = torch.randn(2, 3, vocabulary + 7, generator=generator).to(device)
    logits = wider[:, 1:, 3 : vocabulary + 3]
    options = slots(2, 2, device, generator)
    found, expected = both(logits, options)
    assert_same(found, expected, 12)
    again, _ = both(logits.contiguous(), options)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, again, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_token_does_not_depend_on_how_many_ids_are_read_at_once(temperature, device, generator, monkeypatch):
    logits, options = torch.randn(1, 2, 6000, generator=generator).to(device), slots(1, 2, device, generator)
    drawn = []
    for unrolled in (1, 2, 4, 8):
        monkeypatch.setattr(file, "UNROLLED", unrolled)
        drawn.append(both(logits, options, temperature=temperature)[0])
    assert all(torch.equal(ours, theirs) for other in drawn for ours, theirs in zip(drawn[0], other, strict=True))


def test_a_token_does_not_depend_on_its_batch(device, generator):
    for vocabulary in (10, 300):
        logits, options = torch.randn(6, 5, vocabulary, generator=generator).to(device), slots(6, 5, device, generator)
        whole, _ = both(logits, options)
        few = {name: each if each.ndim == 0 else each[3:5] for name, each in options.items()}
        alone, _ = both(logits[3:5], few)
        assert all(torch.equal(ours, theirs[3:5]) for ours, theirs in zip(alone, whole, strict=True))


@pytest.mark.parametrize("vocabulary", [6, 700])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_ties_and_rows_without_a_law(vocabulary, temperature, device, generator):
    logits = torch.randint(0, 3, (1, 8, vocabulary), generator=generator).float()
    forbidden = torch.zeros(vocabulary, dtype=torch.bool)
    forbidden[2] = True
    logits[0, 1, 3], logits[0, 2, 4], logits[0, 3], logits[0, 4, 1] = torch.nan, torch.inf, -torch.inf, -torch.inf
    logits[0, 5], logits[0, 5, 2] = -torch.inf, 1.0
    logits[0, 6, 2], logits[0, 7, 2] = torch.nan, torch.inf
    restrictions = {"temperature": temperature, "forbidden": forbidden.to(device)}
    found, expected = both(logits.to(device), slots(1, 8, device, generator), **restrictions)
    assert_same(found, expected, 4)
    assert (found.token[0] >= 0).tolist() == [False, False, False, False, True, False, True, True]


def test_no_slots_and_the_choice_of_the_kernel(device, generator):
    for shape in ((0, 3), (2, 0)):
        options = {"index": torch.zeros(shape, dtype=torch.int32, device=device)}
        counters = {name: torch.zeros(shape[0], dtype=torch.int64, device=device) for name in ("step", "chain_ids")}
        one = {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("iteration", "seed")}
        drawn = file.categorical(
            torch.zeros(*shape, 5, device=device), out=Drawn.empty(*shape, device), **options, **counters, **one
        )
        assert drawn.token.shape == shape
    assert runs_kernel(file.categorical_kernel, torch.zeros(1, device=device))
