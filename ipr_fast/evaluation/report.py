"""Measurements of `ipr-fast evaluate` as Markdown: of a run just made, or of a JSON file."""

from __future__ import annotations

from collections.abc import Callable

from ipr_fast.evaluation.environment import measured_at
from ipr_fast.evaluation.intervals import Estimate
from ipr_fast.sampling.schedule import Schedule

SHOWN_ITERATIONS = (1, 2, 5, 10, 20, 50)  # of tables over the iterations


def report(results: dict) -> str:
    """Format a measurement of any experiment. Raises KeyError or TypeError for another dict."""
    if "good_by_iteration" in results:
        return experiment_table(results)
    if "steps" in results:
        return steps_table(results)
    if "repair" in results:
        return repair_table(results)
    if "budgets" in results:
        return token_table(results)
    if "multiples" in results:
        return guidance_table(results)
    return diversity_sentence(results) if "boards" in results else initialisation_table(results)


def experiment_table(results: dict) -> str:
    """Format the arms of `experiments.run_experiment`."""
    noun, good = results["noun"], results["adjective"]
    means = list(results["arms"][0]["means"])
    titles = ["arm", "NFE", "patch evaluations", f"{good} {noun}s", "gain over one pass"]
    titles += ["fixed / broken", *(name.replace("_std", " deviation") for name in means)]
    lines = [_row(titles), _row(["---", *["---:"] * (len(titles) - 1)])]
    for row in results["arms"]:
        share, gain = Estimate(*row["share"]), Estimate(*row["gain"])
        calls, evaluations = (f"{row[key]:,}" if key in row else "" for key in ("calls", "evaluations"))
        change = "" if row["name"].endswith("one pass") else f"{row['fixed']} / {row['broken']}"
        cells = [row["name"], calls, evaluations, share.percent(), gain.points() if change else "", change]
        lines.append(_row([*cells, *(Estimate(*row["means"][name]).plain() for name in means)]))
    with_clues, judged = _with_clues(results["clues"]), _judged(results["judge"])
    later = {row["commit"]: row["name"].split(":")[0] for row in results["arms"] if "commit" in row}
    again = "".join(f" Rows of {arms}: measured again at {commit}." for commit, arms in later.items())
    lines += [
        "",
        f"{results['samples']:,} {noun}s{with_clues}, seed {results['seed']}, intervals 95 %.{judged} "
        f"{measured_at(results['environment'])}{again}",
    ]
    return "\n".join(lines)


def diversity_sentence(results: dict) -> str:
    """Format the coverage of `diversity.measure_diversity`."""

    def words(name: str) -> str:
        found = results[name]
        if not found["valid"]:
            return "no board is valid"
        return (
            f"{found['valid']:,} valid boards show {found['distinct']} of the 288 grids "
            f"({found['distinct_if_uniform']:.0f} expected of uniform draws; chi-square {found['chi_square']:.0f})"
        )

    changed = 100 * results["cells_with_another_digit"]
    return (
        f"After one pass, {words('one pass')}; after {results['iterations']} iterations, {words('refined')}. "
        f"{changed:.1f} % of the cells show another digit than before."
    )


def repair_table(results: dict) -> str:
    """Format the arms of `repair.measure_repair`: the share of valid boards over the iterations."""
    count, last = results["samples"], results["iterations"]
    shown = [0, *(r for r in SHOWN_ITERATIONS if r < last), last]
    titles = ["swapped pairs", *("corrupted" if r == 0 else f"after {r}" for r in shown)]
    lines = [
        _row([*titles, "violations", f"same grid after {last}"]),
        _row(["---:"] * (len(titles) + 2)),
    ]
    for arm in results["repair"]:
        valid, violations = arm["valid_by_iteration"], arm["violations_by_iteration"]
        shares = [f"{100 * valid[r] / count:.1f} %" for r in shown[:-1]]
        change = f"{violations[0]:.2f} to {violations[-1]:.2f}"
        cells = [str(arm["pairs"]), *shares, Estimate(*arm["valid"]).percent()]
        lines.append(_row([*cells, change, Estimate(*arm["as_before"]).percent()]))
    lines += [
        "",
        f"Valid boards of {count:,}, all cells free, alpha 0.25, seed {results['seed']}, intervals 95 %."
        f"{_judged(results['judge'])} {measured_at(results['environment'])}",
    ]
    return "\n".join(lines)


def steps_table(results: dict) -> str:
    """Format the arms of `steps.measure_steps`."""
    noun, good, before = results["noun"], results["adjective"], results["steps"][0]
    titles = ["steps", "iterations", "NFE", f"{good} {noun}s", "gain over one pass"]
    titles += ["fixed / broken", *before["means"], "distance of patches"]
    lines = [_row(titles), _row(["---", *["---:"] * (len(titles) - 1)])]
    for row in results["steps"]:
        share, gain = Estimate(*row["share"]), Estimate(*row["gain"])
        change = ["", ""] if row is before else [gain.points(), f"{row['fixed']} / {row['broken']}"]
        means = (Estimate(*mean).plain() for mean in row["means"].values())
        calls, distance = f"{row['calls']:,.0f}", f"{row['distance']:.3g}"
        lines.append(_row([row["name"], str(row["iterations"]), calls, share.percent(), *change, *means, distance]))
    lines += [
        "",
        f"{results['samples']:,} {noun}s{_with_clues(results['clues'])}, alpha 0.25, seed {results['seed']}, intervals "
        "95 %. Distance: Fréchet's, squared, of Gaussians fitted to the pixels of patches and of the data's; of other "
        f"data {results['data_distance']:.2g}.{_judged(results['judge'])} {measured_at(results['environment'])}",
    ]
    return "\n".join(lines)


def initialisation_table(results: dict) -> str:
    """Format the arms of `initialisation.compare_initialisations`."""
    names = list(results["arms"])
    titles = [f"{name}, {missing} missing" for name in names for missing in results["missing"]]
    lines = [_row(["boards seen", *titles]), _row(["---:"] * (1 + len(titles)))]
    for rows in zip(*results["arms"].values(), strict=True):
        shares = [f"{100 * share:.0f} %" for row in rows for share in row[1:]]
        lines.append(_row([f"{rows[0][0]:,}", *shares]))
    sizes = results["sizes"]
    lines += [
        "",
        f"Cells filled right, of {results['test_boards']} boards; width {sizes['width']}, {sizes['depth']} layers, "
        f"{sizes['num_heads']} heads; one run each, seed {results['seed']}. {measured_at(results['environment'])}",
    ]
    return "\n".join(lines)


def token_table(results: dict) -> str:
    """Format the rows of `tokens.run_token_experiment`: shares of valid boards by the calls of a board."""
    titles, samples = {budget: f"{budget} calls" for budget in results["budgets"]}, results["samples"]
    boards = {cell.get("boards", samples) for row in results["rows"] for cell in row["cells"]}
    if boards == {min(boards)} and boards != {samples}:
        note = f" These are the first of {samples:,} chains."
        return _budget_table({**results, "samples": min(boards)}, titles, note)
    note = " Cells with fewer boards name their number." if min(boards) < samples else ""

    def share(cell: dict) -> str:
        count = cell.get("boards", samples)
        return _share(cell) + (f" of {count:,}" if count < samples else "")

    return _budget_table(results, titles, note, share)


def guidance_table(results: dict) -> str:
    """Format the rows of `guidance.run_guidance_experiment`: shares of valid boards by budget."""
    titles = {budget: f"{budget} x {results['pass_calls']:.4g} calls" for budget in results["multiples"]}
    last = {row["name"]: row["cells"][-1] for row in results["rows"]}
    calls = [f"{name} {cell['calls']:,.0f} and {cell['reward_calls']:,.0f}" for name, cell in last.items()]
    note = " The reward is minus the violations. Calls of the model and of the reward for a board, at the last budget: "
    for name, what in (("refine_schedule", "iteration"), ("generate_schedule", "pass")):
        if name in results:
            note = f" Each {what} by {_schedule(results[name])}.{note}"
    return _budget_table(results, titles, f"{note}{'; '.join(calls)}.")


def _schedule(values: list[float]) -> str:
    return f"`{Schedule(*values)}`"  # type: ignore[arg-type]


def _budget_table(
    results: dict, titles: dict[int, str], note: str = "", shown: Callable[[dict], str] = lambda cell: _share(cell)
) -> str:
    """Format a column for each budget. note: a sentence on the samples, after a space. shown: formats a cell."""
    lines = [_row([f"{results['adjective']} {results['noun']}s", *titles.values()])]
    lines.append(_row(["---", *["---:"] * len(titles)]))
    for row in results["rows"]:
        cells = {cell["budget"]: shown(cell) for cell in row["cells"]}
        lines.append(_row([row["name"], *(cells.get(budget, "") for budget in titles)]))
    lines += [
        "",
        f"{results['samples']:,} {results['noun']}s{_with_clues(results['clues'])}, seed {results['seed']}, intervals "
        f"95 %.{note}{_judged(results['judge'])} {measured_at(results['environment'])}",
    ]
    return "\n".join(lines)


def _share(cell: dict) -> str:
    return Estimate(*cell["share"]).percent()


def _with_clues(clues: list[int]) -> str:
    return f", {clues[0]} to {clues[1]} clues" if clues[1] else ""


def _judged(note: str) -> str:
    return f" {note[0].upper()}{note[1:]}." if note else ""


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
