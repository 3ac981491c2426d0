"""The report of one or more runs: tables, curves and galleries, as JSON, Markdown and one self-contained HTML file."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

from ipr_fast.evaluation.intervals import Estimate
from ipr_fast.evaluation.scale.figures import curves, gallery
from ipr_fast.evaluation.scale.folder import RunFolder
from ipr_fast.evaluation.scale.pages import Block, Heading, Picture, Table, table_lines, to_html, to_markdown
from ipr_fast.evaluation.scale.summary import compare_runs, summarise
from ipr_fast.outputs import prepare_folder, replacing, write_json

OWN_START = "its own start"


def write_report(folders: list[Path], out: Path) -> list[Path]:
    """Write the report of runs into a folder: report.html, report.md, a JSON file and pictures for each run.

    Several runs are also compared sample by sample. Returns the files. Raises ValueError for a folder of no run.
    """
    runs = [RunFolder.at(path) for path in folders]
    names = _names(folders)
    prepare_folder(out)
    written, blocks = [], list[Block]()
    for name, run in zip(names, runs, strict=True):
        summary = summarise(run)
        written.append(out / f"{name}.json")
        write_json(written[-1], summary)
        blocks += [Heading(summary["title"], 1), *page(summary, run, name)]
    for (name, run), (rival, other) in itertools.combinations(zip(names, runs, strict=True), 2):
        blocks.append(Heading(f"{name} against {rival}, sample by sample", 1))
        if found := compare_runs(run, other):
            blocks.append(comparison_table(found, f"{rival}"))
        else:
            blocks.append("The two have no chains, of the same task and clues, and arms in common.")
    for block in blocks:
        if isinstance(block, Picture):
            written.append(out / block.name)
            _write(written[-1], block.png)
    title = ", ".join(run.plan.name for run in runs)
    for file, text in (("report.md", to_markdown(blocks)), ("report.html", to_html(title, blocks))):
        written.append(out / file)
        _write(written[-1], text.encode())
    return written


def page(summary: dict[str, Any], run: RunFolder, name: str) -> list[Block]:
    """Return the blocks of one run. name: for its pictures' files."""
    blocks: list[Block] = [sentence(summary), Heading("Quality beside cost"), arm_table(summary)]
    if summary["comparisons"]:
        blocks += [Heading("Compared sample by sample"), comparison_table(summary["comparisons"])]
    blocks += [
        Heading("Over the iterations"),
        Picture(f"{name}-iterations.png", "Bands: 95 % intervals", curves(summary, "iteration", "iteration")),
        Picture(f"{name}-calls.png", "The same by cost", curves(summary, "model_calls", "model calls a sample")),
        iteration_table(summary),
        Heading("Seeds apart"),
        seed_table(summary),
    ]
    pictures = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, arm in enumerate(run.plan.arms):
            if arm.iterations and (drawn := gallery(run, arm.name, Path(scratch) / "gallery.png")):
                pictures.append(Picture(f"{name}-gallery-{number}.png", *drawn))
    return [*blocks, Heading("Fixed and broken samples"), *pictures] if pictures else blocks


def summary_markdown(summary: dict[str, Any]) -> str:
    """Return the tables of quality and of comparisons as Markdown, of a summary read from its JSON file."""
    parts = [table_lines(arm_table(summary)), table_lines(comparison_table(summary["comparisons"]))]
    return "\n\n".join([*parts, sentence(summary)])


def sentence(summary: dict[str, Any]) -> str:
    """Say what was measured, on how many samples, by whom judged, where."""
    noun, left = summary["noun"], f" {said}" if (said := unfinished(summary)) else ""
    clues = f", {summary['clues'][0]} to {summary['clues'][1]} clues" if summary["clues"][1] else ""
    judge = f" {summary['judge'][0].upper()}{summary['judge'][1:]}." if summary["judge"] else ""
    of_seeds = "for each of the seeds" if len(summary["seeds"]) > 1 else "of seed"
    seeds = ", ".join(map(str, summary["seeds"]))
    return (
        f"Model {summary['model']}, {summary['samples']:,} {noun}s {of_seeds} {seeds}{clues}; "
        f"intervals 95 %.{judge}{left} "
        f"{summary['seconds']:,.0f} s, {100 * summary['outside_engine']:.1f} % of them outside the engine. Measured at "
        f"{summary['commit']} on {summary['processor']}, torch {summary['torch']}."
    )


def unfinished(summary: dict[str, Any]) -> str:
    """Return the sentence on a run of which shards are left; empty for a whole one."""
    done, total = summary["shards"]
    return "" if done == total else f"Unfinished: {done} of {total} shards are done."


def arm_table(summary: dict[str, Any]) -> Table:
    """Every arm after its last iteration: cost and quality, seeds pooled."""
    means = list(summary["arms"][0]["points"][0]["means"])
    judged = any(arm["points"][-1]["reward_calls"] for arm in summary["arms"])
    titles = ["arm", "iterations", "NFE", "patch evaluations", *(["judged"] if judged else []), "samples"]
    titles += [f"{summary['adjective']} {summary['noun']}s", *(name.replace("_std", " deviation") for name in means)]
    rows = []
    for arm in summary["arms"]:
        last = arm["points"][-1]
        cost = [f"{last['model_calls']:,.0f}", f"{last['evaluations']:,.0f}"]
        cost += [f"{last['reward_calls']:,.0f}"] if judged else []
        quality = [Estimate(*last["share"]).percent(), *(Estimate(*last["means"][name]).plain() for name in means)]
        rows.append([arm["name"], str(last["iteration"]), *cost, f"{last['samples']:,}", *quality])
    return Table(titles, rows)


def comparison_table(comparisons: list[dict[str, Any]], rival: str = OWN_START) -> Table:
    """Paired gains, samples fixed and broken, and McNemar's exact test. rival: of comparisons that name none."""
    rows = []
    for each in comparisons:
        gains = "" if "by_seed" not in each else ", ".join(f"{100 * gain[0]:+.1f}" for gain in each["by_seed"])
        changes = [f"{each['fixed']:,} / {each['broken']:,}", p_value(each["p"]), gains]
        rows.append([each["arm"], each["rival"] or rival, Estimate(*each["gain"]).points(), *changes])
    return Table(["arm", "against", "gain", "fixed / broken", "McNemar's p", "gain by seed"], rows)


def iteration_table(summary: dict[str, Any]) -> Table:
    """The share of good samples by arm and iteration, seeds pooled."""
    iterations = sorted({point["iteration"] for arm in summary["arms"] for point in arm["points"]})
    rows = []
    for arm in summary["arms"]:
        shares = {point["iteration"]: f"{100 * point['share'][0]:.1f} %" for point in arm["points"]}
        rows.append([arm["name"], *(shares.get(r, "") for r in iterations)])
    return Table(["arm", *("start" if r == 0 else f"after {r}" for r in iterations)], rows)


def seed_table(summary: dict[str, Any]) -> Table:
    """The share of good samples after the last iteration, by arm and seed."""
    rows = [[arm["name"], *(Estimate(*share).percent() for share in arm["by_seed"])] for arm in summary["arms"]]
    return Table(["arm", *(f"seed {seed}" for seed in summary["seeds"])], rows)


def p_value(p: float) -> str:
    if p < 1e-99:  # it may be too small for a float
        return "< 1e-99"
    return f"{p:.2g}" if p >= 0.001 else f"{p:.0e}"


def _names(folders: list[Path]) -> list[str]:
    """Return a name for each run's files: its folder's, with its parents' where two are equal."""
    names = [path.resolve().name for path in folders]
    if len(set(names)) < len(names):
        names = [f"{number}-{name}" for number, name in enumerate(names, 1)]
    return names


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)
