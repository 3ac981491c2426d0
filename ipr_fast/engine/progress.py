"""A progress bar for a device that runs behind the host, and a bound on how far behind."""

from __future__ import annotations

from collections import deque
from types import TracebackType

import torch
from tqdm import tqdm


class Pace:
    """A progress bar of `total` steps that moves as the device finishes them.

    The host may queue at most `ahead` steps, so that an interrupt comes through soon. It waits for earlier steps only,
    so the device always has work.
    """

    ahead = 4.0

    def __init__(self, device: torch.device, total: int, name: str, unit: str, shown: bool, decimals: int = 0) -> None:
        self.device, self.total = device, total
        count = f"{{n:.{decimals}f}}/{{total_fmt}}"
        bar_format = f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {count} [{{elapsed}}<{{remaining}}, {{rate_fmt}}]"
        self._bar = tqdm(total=total, desc=name, unit=unit, bar_format=bar_format, disable=not shown)
        self._queued: deque[tuple[torch.cuda.Event, float]] = deque()
        self._ahead = 0.0

    def __enter__(self) -> Pace:
        return self

    def step(self, share: float = 1.0) -> None:
        """Count a step, or a share of one, whose work has been queued."""
        if self.device.type != "cuda":
            self._advance(share)
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._queued.append((event, share))
        self._ahead += share
        while self._ahead > self.ahead and self._queued:
            self._wait()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while kind is None and self._queued:
            self._wait()
        self._bar.close()

    def _wait(self) -> None:
        event, share = self._queued.popleft()
        event.synchronize()
        self._ahead -= share
        self._advance(share)

    def _advance(self, share: float) -> None:
        self._bar.update(min(share, self.total - self._bar.n))  # rounding: shares may add up to more
