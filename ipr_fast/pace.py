"""Progress of a device that runs behind the host, and a bound on how far behind."""

from __future__ import annotations

from collections import deque

import torch
from tqdm import tqdm


class Pace:
    """A progress bar of `total` steps, each shown once the device has done it.

    The host may be a few steps ahead, never more: the device always has work queued, and an interrupt is not long in
    coming through. It waits for a step that lies behind, so the device never waits for it.
    """

    ahead = 4

    def __init__(self, device: torch.device, total: int, name: str, unit: str, shown: bool) -> None:
        self.device = device
        self._bar = tqdm(total=total, desc=name, unit=unit, disable=not shown)
        self._queued: deque[torch.cuda.Event] = deque()

    def __enter__(self) -> Pace:
        self._bar.__enter__()
        return self

    def step(self) -> None:
        """The work of a step has been queued."""
        if self.device.type != "cuda":
            self._bar.update()
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._queued.append(event)
        if len(self._queued) > self.ahead:
            self._done()

    def __exit__(self, *exception: object) -> None:
        while exception[0] is None and self._queued:
            self._done()
        self._bar.__exit__(*exception)

    def _done(self) -> None:
        self._queued.popleft().synchronize()
        self._bar.update()
