"""What refinement does to boards of handwritten digits, and what the same compute does when it is spent otherwise.

    python bench/quality.py --out FILE.json     measure, write the numbers, print the table
    python bench/quality.py --report FILE.json  print the table of an earlier measurement

Every arm generates or refines the same chains (seed 0, chain ids 0..B-1), so that arms are compared board by board.
"""

from __future__ import annotations

import script
from torch import Tensor

import ipr_fast
from ipr_fast import Schedule, all_patches, intervals, random_patches
from ipr_fast.demo import draw_clues
from ipr_fast.masks import MaskPolicy
from ipr_fast.tasks.sudoku import DigitSudoku, clues_kept

SEED = 0
SHOWN = (1, 2, 5, 10, 20, 50)  # iterations at alpha 0.25 that get a row
COMPARED = 20  # iterations at which alphas and controls are compared
OTHER_ALPHAS = (0.1, 0.5)


class Bench:
    """Runs arms on B chains and compares each with one pass, board by board."""

    def __init__(self, model_name: str, boards: int) -> None:
        self.model = ipr_fast.load_model(model_name)
        self.task = DigitSudoku(self.model.grid.grid_h)
        self.judge, self.boards = self.task.judge(), boards
        self.num_patches = self.model.grid.num_patches
        self.plan, self.refine_plan = self.model.generate_schedule, self.model.refine_schedule
        self.one_pass = self.generate(self.plan)
        self.before = self.judge(self.one_pass).valid

    def generate(self, schedule: Schedule, **clues: Tensor) -> Tensor:
        options = {"schedule": schedule, "seed": SEED, "progress": True, **clues}
        return ipr_fast.generate_batch(self.boards, model=self.model, **options)

    def refine(
        self, x: Tensor, policy: MaskPolicy, iters: int, schedule: Schedule, known: Tensor | None = None
    ) -> list[Tensor]:
        """Validity (B,) bool after 0..iters iterations; checks that clues keep their bits."""
        valid = [self.judge(x).valid]

        def note(_: int, refined: Tensor) -> None:
            valid.append(self.judge(refined).valid)
            if known is not None and not clues_kept(refined, known, x, self.task.side).all():
                raise AssertionError("a clue cell has changed")

        options = {"schedule": schedule, "known": known, "seed": SEED, "callback": note, "progress": True}
        ipr_fast.refine_batch(x, policy, iters, model=self.model, **options)
        return valid

    def arm(self, name: str, valid: Tensor, *costs: tuple[int, int]) -> dict:
        """One row, with the sum of its costs for each board."""
        calls, evaluations = map(sum, zip(*costs, strict=True))
        return {"name": name, "calls": calls, "evaluations": evaluations, **compare(self.before, valid)}

    def cost(self, schedule: Schedule, active: int, times: int = 1) -> tuple[int, int]:
        """Denoiser calls, and patches sent through the network, of regenerating `active` patches `times` times.

        `prepare` sends all N patches through once; a call sends the active ones.
        """
        calls = schedule.steps(active)
        return times * calls, times * (self.num_patches + calls * active)

    # ------------------------------------------------------------------------------------------------- the arms

    def refinement(self, alpha: float, iters: int, shown: tuple[int, ...]) -> tuple[list[dict], list[int]]:
        """IPR at one alpha: a row for each iteration of `shown`, and the valid boards after 0..iters."""
        valid = self.refine(self.one_pass, random_patches(alpha), iters, self.refine_plan)
        active, first = max(1, int(alpha * self.num_patches)), self.cost(self.plan, self.num_patches)
        rows = [
            self.arm(
                f"IPR, alpha {alpha:g}, {r} iteration{'s' * (r > 1)}",
                valid[r],
                first,
                self.cost(self.refine_plan, active, r),
            )
            for r in shown
        ]
        return rows, [int(v.sum()) for v in valid]

    def controls(self, calls: int) -> list[dict]:
        """About as many denoiser calls as `calls`, spent on one longer pass, and on renoising everything."""
        n, once = self.num_patches, self.plan.steps(self.num_patches)
        longer, times = Schedule(round(calls / n), 0.0), round((calls - once) / once)
        valid = self.judge(self.generate(longer)).valid
        again = self.refine(self.one_pass, all_patches(), times, self.plan)[-1]
        return [
            self.arm(f"one pass, {longer.steps_per_patch} steps a patch", valid, self.cost(longer, n)),
            self.arm(f"renoise everything {times} times", again, self.cost(self.plan, n, 1 + times)),
        ]

    def clues(self) -> list[dict]:
        """One pass and IPR with 0 to N/2 clue cells a board, in digit images that the model has never seen."""
        high = self.num_patches // 2
        known, values = draw_clues(self.task, self.boards, (0, high), SEED)
        x = self.generate(self.plan, known=known, known_values=values)
        valid = self.refine(x, random_patches(), COMPARED, self.refine_plan, known)
        names = "one pass", f"IPR, alpha 0.25, {COMPARED} iterations"
        rows = [compare(valid[0], after) for after in (valid[0], valid[-1])]
        return [{"name": f"0 to {high} clues: {name}", **row} for name, row in zip(names, rows, strict=True)]


def compare(before: Tensor, after: Tensor) -> dict:
    """Who is valid (B,) bool after, and what became of those that were and were not before."""
    return {
        "valid": int(after.sum()),
        "share": intervals.share(after),
        "gain": intervals.paired_gain(before, after),
        "fixed": int((after & ~before).sum()),
        "broken": int((before & ~after).sum()),
    }


def measure(model: str, boards: int) -> dict:
    """All arms: about forty minutes of one core for 2,048 boards of 4x4."""
    bench = Bench(model, boards)
    rows, curve = bench.refinement(0.25, max(SHOWN), SHOWN)
    compared_calls = next(row["calls"] for r, row in zip(SHOWN, rows, strict=True) if r == COMPARED)
    arms = [bench.arm("one pass", bench.before, bench.cost(bench.plan, bench.num_patches)), *rows]
    for alpha in OTHER_ALPHAS:
        arms += bench.refinement(alpha, COMPARED, (COMPARED,))[0]
    arms += bench.controls(compared_calls)
    arms += bench.clues()
    return {
        "model": model,
        "boards": boards,
        "seed": SEED,
        "reader_accuracy": bench.judge.reader_accuracy,
        "generate_schedule": [bench.plan.steps_per_patch, bench.plan.overlap],
        "refine_schedule": [bench.refine_plan.steps_per_patch, bench.refine_plan.overlap],
        "arms": arms,
        "valid_by_iteration": curve,
    }


def report(results: dict) -> str:
    """The results as a Markdown table."""
    lines = [
        "| arm | denoiser calls | patches through the network | valid boards | gain over one pass | fixed / broken |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["arms"]:
        share, gain = intervals.Estimate(*row["share"]), intervals.Estimate(*row["gain"])
        calls, evaluations = (f"{row[key]:,}" if key in row else "" for key in ("calls", "evaluations"))
        change = f"{row['fixed']} / {row['broken']}" if row["fixed"] or row["broken"] else ""
        cells = [row["name"], calls, evaluations, share.percent(), gain.points() if change else "", change]
        lines.append(f"| {' | '.join(cells)} |")
    about = results["environment"]
    lines.append("")
    lines.append(
        f"{results['boards']:,} boards, seed {results['seed']}, intervals 95 %. The reader that judges reads "
        f"{100 * results['reader_accuracy']:.1f} % of held-out digits right. Measured at {about['commit']} on "
        f"{about['device']}, torch {about['torch']}, threads: {about['threads']}."
    )
    return "\n".join(lines)


def main() -> None:
    boards = {"type": script.at_least(1), "default": 2048, "help": "default 2048"}
    script.run(__doc__, measure, report, boards=boards, model={"default": "digit-sudoku-4x4"})


if __name__ == "__main__":
    main()
