import pytest
import torch
from norms import types

from ipr_fast.kernels import threshold as file
from ipr_fast.kernels.launch import runs_kernel
from ipr_fast.kernels.logits import LOWEST

NAN = float("nan")
WAYS = [(None, 0.9, "covering"), (None, 0.4, "inner"), (7, 1.0, "covering"), (20, 0.7, "inner"), (20, 0.7, "covering")]


# Of rows of NaN and infinity, which numpy warns of under the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def both(logits, index, temperature, top_k, top_p, nucleus, forbidden=None):
    """Which ids (B, A, V) the kernel keeps, and the twin."""
    found, expected = torch.full((2, *logits.shape[:2]), NAN, device=logits.device)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "nucleus": nucleus, "forbidden": forbidden}
    file.threshold(logits, index=index, out=found, **options)
    k = None if top_k is None or top_k >= logits.shape[2] else top_k
    part = None if top_p == 1 else round(top_p * 2**30)
    file._threshold(logits, index, expected, 1 / temperature, k, part, nucleus == "inner", forbidden)
    values = logits.float().clamp(min=LOWEST)
    return values >= found[..., None], values >= expected[..., None]


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 100, 128, 1500])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_kept_ids_are_those_of_the_twin(vocabulary, way, device, generator):
    for dtype in types(device):
        logits = (3 * torch.randn(2, 2, vocabulary, generator=generator)).to(device, dtype)
        logits[0, 1] = logits[0, 1].round()  # ties
        index = torch.tensor([[0, 5], [-1, 7]], dtype=torch.int32, device=device)
        found, expected = both(logits, index, 0.7, *way)
        assert torch.equal(found, expected)
        assert found[1, 0].all()
        assert 0 < found[0, 0].sum() <= max(1, vocabulary // 2) or vocabulary < 4


def test_rows_apart_with_forbidden_ids(device, generator):
    logits = torch.randn(2, 3, 77, generator=generator).to(device)[:, 1:, 3:73]
    forbidden = (torch.rand(70, generator=generator) < 0.5).to(device)
    index = torch.zeros(2, 2, dtype=torch.int32, device=device)
    for way in WAYS:
        found, expected = both(logits, index, 1.0, *way, forbidden=forbidden)
        assert torch.equal(found[..., ~forbidden], expected[..., ~forbidden])


def test_extremes(device):
    """Ends of the range of float32, zeros of both signs, subnormals."""
    row = [-3e38, -1e30, -1.0, -1e-40, -0.0, 0.0, 1e-40, 3.0, 1e30, 3e38]
    logits = torch.tensor([[row, row[::-1]]], device=device)
    for top_k in range(1, 10):
        found, expected = both(logits, torch.zeros(1, 2, dtype=torch.int32, device=device), 1.0, top_k, 1.0, "covering")
        assert torch.equal(found, expected)
    for top_p in (1e-9, 0.5, 1 - 1e-9):
        for nucleus in ("covering", "inner"):
            index = torch.zeros(1, 2, dtype=torch.int32, device=device)
            found, expected = both(logits, index, 1.0, None, top_p, nucleus)
            assert torch.equal(found, expected)


def test_rows_without_a_law_end(device):
    logits = torch.tensor([[[NAN, 1.0, 2.0], [float("inf"), 1.0, 2.0], [-float("inf")] * 3]], device=device)
    for way in WAYS:
        both(logits, torch.zeros(1, 3, dtype=torch.int32, device=device), 1.0, *way)


def test_no_slots_and_the_choice_of_the_kernel(device):
    for shape in ((0, 3), (2, 0)):
        index, out = torch.zeros(shape, dtype=torch.int32, device=device), torch.zeros(shape, device=device)
        assert file.threshold(torch.zeros(*shape, 5, device=device), index=index, out=out, top_k=2).shape == shape
    assert runs_kernel(file.threshold_kernel, torch.zeros(1, device=device))
