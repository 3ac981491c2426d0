"""A capture for machines without a GPU: it records the operations, and replays them without Python."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipr_fast.engine.capture_check import Watch, without_compile


class _Recorder(TorchDispatchMode):
    def __init__(self, entries):
        super().__init__()
        self.entries = entries

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.entries.append((func, args, kwargs or {}, out))
        return out


class Tape:
    """Captures as CudaCapture does: two warm-up runs, then one whose operations are recorded.

    A replay repeats them on the same tensors without Python, so values that the host computed are constants.
    """

    def __init__(self, device=None):
        self.captured, self.replayed, self.fail_at = [], [], None

    def start_over(self):
        """Do nothing: a tape has no memory pool."""

    def __call__(self, name, function):
        if self.fail_at == len(self.captured):
            raise KeyboardInterrupt
        with without_compile(), Watch(name):
            function()
        function()
        entries = []
        with torch.inference_mode(), _Recorder(entries):
            function()
        number = len(self.captured)
        self.captured.append(name)

        def replay():
            self.replayed.append(number)
            with torch.inference_mode():
                for func, args, kwargs, out in entries:
                    _overwrite(out, func(*args, **kwargs))

        return replay


def _overwrite(old, new):
    for before, after in zip(tree_leaves(old), tree_leaves(new), strict=True):
        if isinstance(before, torch.Tensor) and before.data_ptr() != after.data_ptr():
            before.copy_(after)
