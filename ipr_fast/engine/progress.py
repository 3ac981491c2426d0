"""Progress of a device that runs behind the host, and a bound on how far behind."""

from __future__ import annotations

from collections import deque

import torch
from tqdm import tqdm


class Pace:
    """A progress bar of `total` steps, which moves as the device does them, or shares of them.

    The host may be a few steps ahead, never more: the device always has work queued, and an interrupt is not long in
    coming through. It waits for work that lies behind, so the device never waits for it.
    """

    ahead = 4.0  # steps

    def __init__(self, device: torch.device, total: int, name: str, unit: str, shown: bool, decimals: int = 0) -> None:
        self.device = device
        count = f"{{n:.{decimals}f}}/{{total_fmt}}"
        bar_format = f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {count} [{{elapsed}}<{{remaining}}, {{rate_fmt}}]"
        self._bar = tqdm(total=total, desc=name, unit=unit, bar_format=bar_format, disable=not shown)
        self._queued: deque[tuple[torch.cuda.Event, float]] = deque()
        self._ahead = 0.0

    def __enter__(self) -> Pace:
        self._bar.__enter__()
        return self

    def step(self, share: float = 1.0) -> None:
        """The work of a step, or of a share of one, has been queued."""
        if self.device.type != "cuda":
            self._advance(share)
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._queued.append((event, share))
        self._ahead += share
        while self._ahead > self.ahead and self._queued:
            self._done()

    def __exit__(self, *exception: object) -> None:
        while exception[0] is None and self._queued:
            self._done()
        self._bar.__exit__(*exception)

    def _done(self) -> None:
        event, share = self._queued.popleft()
        event.synchronize()
        self._ahead -= share
        self._advance(share)

    def _advance(self, share: float) -> None:
        self._bar.update(min(share, self._bar.total - self._bar.n))  # shares need not add up to the last bit
