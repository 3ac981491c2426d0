"""Watch finds operations that a CUDA graph cannot hold, and does not stop torch.compile from compiling later."""

import pytest
import torch

from ipr_fast.engine import memory
from ipr_fast.engine.capture_check import CaptureError, Watch, without_compile


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "look",
    [
        lambda x: int(x[0]),
        lambda x: torch.where(x > 0),
        lambda x: torch.argwhere(x),
        lambda x: torch.allclose(x, x),
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, 1.0),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: bool(x[0] > 0),
        lambda x: torch.repeat_interleave(torch.tensor([1, 2])),
        lambda x: x.to("meta"),
    ],
)
def test_the_watch_finds_what_a_graph_cannot_hold(look, inference):
    with torch.inference_mode(inference):  # in which the mode sees other operations
        with Watch("this"):
            torch.where(torch.randn(3) > 0, torch.ones(3), 0.0) + 1
        with pytest.raises(CaptureError, match="this cannot be captured"), Watch("this"):
            look(torch.randn(3))


@pytest.mark.parametrize(
    ("look", "why"),
    [
        (lambda x: x[torch.tensor([0, 1])], "indices are copied"),
        (lambda x: x.index_put_((torch.tensor([0, 1]),), x[0]), "indices are copied"),
        (lambda x: x.copy_(torch.ones(3)), "copies between"),
        (lambda x: x[x > 0], "bool mask"),
        (lambda x: x.__setitem__(x > 0, torch.ones(3, device=x.device)), "bool mask"),
    ],
)
def test_the_watch_over_a_device_finds_copies_to_it(look, why):
    device = torch.device("meta")
    with pytest.raises(CaptureError, match=why), Watch("this", device):
        look(torch.zeros(3, device=device))


def test_the_watch_over_a_device_lets_the_host_do_what_it_likes():
    device = torch.device("meta")
    with Watch("this", device):
        assert torch.ones(3).sum().item() == 3
        assert torch.ones(3)[torch.tensor([True, False, True])].shape == (2,)
        x = torch.zeros(3, device=device)
        x.index_put_((x > 0,), torch.tensor(1.0))  # x[x > 0] = 1 on a GPU, which is masked_fill
        torch.where(x > 0, x, 1.0)


def test_what_torch_compiles_still_compiles_after_the_first_run():
    """Modes such as ours make torch.compile give a function up for good, if they see its first call."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x.sin() + 1, backend=backend, fullgraph=True)
    with without_compile(), Watch("this"):
        function(torch.ones(3))
    with without_compile(), memory.PeakBytes():
        function(torch.ones(3))
    assert not compiled
    function(torch.ones(3))
    assert len(compiled) == 1
