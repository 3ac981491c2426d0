"""The style of bench/'s plots: that of ipr_fast/evaluation/plots.py, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ipr_fast.evaluation.plots import GREEN, GREY, INK, RED, load_pyplot, save_figure

LOOKS = (
    ("#0969da", "o"),
    (RED, "s"),
    (GREEN, "D"),
    ("#8250df", "^"),
    ("#bf5700", "v"),
    ("#0a7b83", "P"),
    ("#9a6700", "X"),
    ("#bf3989", "*"),
)


def panels(number: int, *, beside: float = 0.0, shared: bool = True) -> tuple[Any, Any]:
    """Return a figure of panels side by side, with `beside` inches for a legend."""
    return load_pyplot().subplots(
        1, number, figsize=(2.2 + 4.4 * number + beside, 3.9), layout="constrained", sharey=shared, squeeze=False
    )


def style(axis: Any, xlabel: str, ylabel: str, tick: Callable[[float], str], base: int = 10) -> None:
    """Style an axis: logarithmic, with vertical ticks at powers of `base`, formatted by `tick`."""
    axis.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    axis.set_yscale("log", base=base)
    axis.xaxis.label.set(color=INK, fontsize=9)
    axis.yaxis.label.set(color=INK, fontsize=9)
    axis.yaxis.set_major_formatter(lambda value, _: tick(value))
    axis.grid(True, which="major", color=GREY, alpha=0.2, linewidth=0.6)
    axis.minorticks_off()
    axis.tick_params(colors=INK, labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return a colour and marker for each name, another pair for each of the first 64."""
    colours, markers = zip(*LOOKS, strict=True)
    return {
        name: (colours[i % len(LOOKS)], markers[(i + i // len(LOOKS)) % len(LOOKS)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def finish(figure: Any, path: Path, title: str = "") -> Path:
    """Write the figure, with a legend in each panel unless there is one beside them."""
    if title:
        figure.suptitle(title, fontsize=10, color=INK)
    if not figure.legends:
        for axis in figure.axes:
            axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
    return path


def device_name(device: str) -> str:
    """Shorten a processor's name."""
    for noise in ("(R)", "(TM)", " Processor", " CPU"):
        device = device.replace(noise, "")
    return device.split(" @")[0].strip()


def si(value: float, unit: str) -> str:
    """Format a number with an SI prefix."""
    for scale, letter in (
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1, ""),
        (1e-3, "m"),
        (1e-6, "u"),
    ):
        if value >= 0.999 * scale:
            return f"{value / scale:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}"
