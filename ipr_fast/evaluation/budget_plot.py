"""A picture of shares against the model calls of a sample, of measurements with a budget of calls."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

from ipr_fast.evaluation.plots import GREEN, GREY, INK, load_pyplot, save_figure

STYLES = {  # of methods by a word in their name, the first that is in it
    "IPR": (GREEN, "--"),
    "ReMDM": ("#bc4c00", "-"),
    "IterRef": ("#bc4c00", "-"),
    "one pass": ("#0969da", "-"),
    "best of N": ("#0969da", "-"),
    "FK steering": ("#8250df", "-."),
}
MARKERS = "osD^vP"


def plot_budgets(path: str | Path, results: dict) -> None:
    """Draw the share of good samples of each method against its budget, with 95 % intervals.

    results: of `tokens.run_token_experiment`, or of `guidance.run_guidance_experiment`, whose budgets are passes.
    """
    figure, axis = load_pyplot().subplots(figsize=(8.6, 4.6), layout="constrained")
    budgets = sorted({cell["budget"] for row in results["rows"] for cell in row["cells"]})
    markers = {word: cycle(MARKERS) for word in (*STYLES, "")}
    for number, row in enumerate(results["rows"]):
        word = next((word for word in STYLES if word in row["name"]), "")
        colour, line = STYLES.get(word, (GREY, ":"))
        cells = sorted(row["cells"], key=lambda cell: cell["budget"])
        shift = 1.012 ** (number - len(results["rows"]) / 2)  # so that intervals do not hide each other
        value, low, high = ([100 * cell["share"][i] for cell in cells] for i in range(3))
        errors = [[max(0.0, v - b) for v, b in zip(value, low, strict=True)]]  # 0 of 0 % is rounded
        errors.append([max(0.0, t - v) for v, t in zip(value, high, strict=True)])
        axis.errorbar(
            [cell["budget"] * shift for cell in cells],
            value,
            errors,
            color=colour,
            linestyle=line,
            marker=next(markers[word]),
            markersize=4,
            linewidth=1,
            elinewidth=0.7,
            label=row["name"],
        )
    axis.set_xscale("log")
    axis.set_xlim(budgets[0] / 1.3, budgets[-1] * 1.3)
    axis.set_xticks(budgets, [str(budget) for budget in budgets])
    axis.minorticks_off()
    calls = f"passes of {results['pass_calls']:.4g} model calls" if "multiples" in results else "model calls"
    axis.set(
        xlabel=f"{calls} of a {results['noun']} at most",
        ylabel=f"{results['adjective']} {results['noun']}s (%)",
        ylim=(-2, None),
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=7.5, loc="outside right center", labelcolor=INK)
    save_figure(figure, path)
