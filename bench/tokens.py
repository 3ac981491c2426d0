"""Tokens a second of the engine and of the loops of baselines/token_loops.py, with the same network on one device.

    python bench/tokens.py --out FILE.json     measure (half an hour of a core), print a table, write the numbers
    python bench/tokens.py --report FILE.json  print an earlier measurement

Networks have random weights; the loops call them on all positions, the engine through `HuggingFaceDenoiser`. Each round
times every arm once. A loop takes the chains in one batch, but at most MOST_BATCHED of them: its rate does not grow
beyond. The rate of the loop that takes one chain after another is that of a single chain. Checked before: both reveal
the same number of tokens in every step (LLaDA), or the same on average (ReMDM), and leave none masked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from baselines import token_loops
from baselines.token_network import Sizes, TokenNetwork, random_network
from support import script
from support.harness import Clock, interleaved, quartiles
from torch import Tensor

from ipr_fast import TokenSchedule, generate_batch, random_patches, refine_batch
from ipr_fast.evaluation.environment import measured_at
from ipr_fast.models import HuggingFaceDenoiser

RATIO = 0.25
STANDARD_ERRORS = 6.0


class Subject(NamedTuple):
    """A network, and the steps in which all its tokens are revealed; most_batched: chains in a batch of a loop."""

    sizes: Sizes
    steps: int
    chains: tuple[int, ...] = (1, 16, 256)
    most_batched: int = 64


SUBJECTS = {
    "10": Subject(Sizes(length=80, size=10, width=128, depth=6, heads=4), steps=4),
    "50,258": Subject(Sizes(length=16, size=50_258, width=128, depth=6, heads=4), steps=2, most_batched=16),
}


class Case(NamedTuple):
    """A loop, and what the engine does instead.

    refines: draw only a quarter of the positions of finished chains. most_chains: measured, since it is slow.
    """

    name: str
    loop: Callable[..., Tensor]
    schedule: Callable[[int], TokenSchedule]
    refines: bool = False
    most_chains: int = 256

    def positions(self, length: int) -> int:
        """Return how many tokens of a chain are drawn."""
        return max(1, int(RATIO * length)) if self.refines else length


def remdm_schedule(steps: int, **options: float) -> TokenSchedule:
    return TokenSchedule(steps, "independent", remask="cap", nucleus="inner", **options)


CASES = (
    Case("LLaDA", token_loops.llada, TokenSchedule),
    Case("ReMDM", token_loops.remdm, remdm_schedule),
    Case("ReMDM, top-p 0.9", partial(token_loops.remdm, top_p=0.9), partial(remdm_schedule, top_p=0.9), most_chains=16),
    Case("LLaDA, a quarter", token_loops.llada, TokenSchedule, refines=True),
)


class Work(NamedTuple):
    """One case of a network: its tokens and both sides' calls."""

    case: Case
    subject: Subject
    network: TokenNetwork
    chains: int

    @property
    def steps(self) -> int:
        """As many as positions, or the subject's: every step reveals the same number."""
        return min(self.subject.steps, self.case.positions(self.subject.sizes.length))

    def ours(self, callback: Callable[[Tensor], object] = lambda tokens: None) -> Tensor:
        sizes, schedule = self.subject.sizes, self.case.schedule(self.steps)
        model = HuggingFaceDenoiser(Watched(self.network, callback), sizes.length)
        if self.case.refines:
            return refine_batch(self.finished(self.chains), random_patches(RATIO), 1, model=model, schedule=schedule)
        return generate_batch(self.chains, model=model, schedule=schedule)

    def loop(self, chains: int, callback: Callable[[Tensor], object] = lambda tokens: None) -> Tensor:
        network = Watched(self.network, callback)
        return self.case.loop(network, self.masked(chains), self.steps, mask_id=self.subject.sizes.size - 1)

    def finished(self, chains: int) -> Tensor:
        length, size = self.subject.sizes[:2]
        return torch.randint(0, size - 1, (chains, length), generator=torch.Generator().manual_seed(0))

    def masked(self, chains: int) -> Tensor:
        length, size = self.subject.sizes[:2]
        keys = torch.rand(chains, length, generator=torch.Generator().manual_seed(1))
        return self.finished(chains).masked_fill(keys.argsort(1) < self.case.positions(length), size - 1)

    def check(self) -> None:
        """Raise AssertionError unless both sides reveal as many tokens in every step, and leave none masked."""
        mask_id, found = self.subject.sizes.size - 1, []
        batched = self._replace(chains=min(self.chains, self.subject.most_batched))
        for run in (batched.ours, partial(batched.loop, batched.chains)):
            seen: list[Tensor] = []
            tokens = run(callback=lambda tokens, seen=seen: seen.append((tokens == mask_id).sum(1)))
            assert not (tokens == mask_id).any(), "a token is still masked"
            found.append(torch.stack(seen[: self.steps]).double())  # ReMDM calls the network once more at the end
        ours, theirs = found
        wrong = f"revealed otherwise: {ours.mean(1)} and {theirs.mean(1)} are masked"
        if self.case.loop is token_loops.llada:
            assert torch.equal(ours, theirs), wrong
            return
        rounding = math.sqrt(2 * self.case.positions(self.subject.sizes.length) / 4 / batched.chains)
        apart = (ours[: len(theirs)].mean(1) - theirs.mean(1)).abs().max()
        assert apart <= STANDARD_ERRORS * rounding, (
            f"revealed otherwise: {ours.mean(1)} and {theirs.mean(1)} are masked"
        )


class Watched(torch.nn.Module):
    """A network that tells the tokens of each call."""

    def __init__(self, network: TokenNetwork, callback: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.network, self.config, self.callback = network, network.config, callback
        self.eval()

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.network.head

    def forward(self, input_ids: Tensor) -> Tensor:
        self.callback(input_ids)
        return self.network(input_ids)


def measure(rounds: int, subjects: Sequence[str] = ()) -> dict:
    """Measure every subject, or some."""
    rows = [row for name in subjects or SUBJECTS for row in measure_subject(name, rounds)]
    return {"rounds": rounds, "rows": rows}


def measure_subject(name: str, rounds: int) -> list[dict]:
    """Return the tokens a second of each case, and the speed-ups over the loop in batches and alone."""
    subject = SUBJECTS[name]
    network, rows = random_network(subject.sizes), []
    for chains in subject.chains:
        works = [Work(case, subject, network, chains) for case in CASES if chains <= case.most_chains]
        arms, units = {}, {}
        for work in works:
            batched = min(chains, subject.most_batched)
            sides = {
                "ours": (work.ours, chains),
                "batched": (partial(work.loop, batched), batched),
                "alone": (partial(work.loop, 1), 1),
            }
            for side, (run, number) in sides.items():
                arms[f"{work.case.name}/{side}"] = run
                units[f"{work.case.name}/{side}"] = number * work.case.positions(subject.sizes.length)
            work.check()
        seconds = interleaved(arms, torch.device("cpu"), rounds, Clock(math.inf))
        for work in works:
            rates = {
                side: [units[f"{work.case.name}/{side}"] / each for each in seconds[f"{work.case.name}/{side}"]]
                for side in ("ours", "batched", "alone")
            }
            faster = {
                side: quartiles([ours / theirs for ours, theirs in zip(rates["ours"], rates[side], strict=True)])
                for side in ("batched", "alone")
            }
            medians = {side: statistics.median(rate) for side, rate in rates.items()}
            rows.append({"ids": name, "chains": chains, "case": work.case.name, "rates": medians, "faster": faster})
    return rows


def report(results: dict) -> str:
    """Format the measurement as Markdown."""
    lines = [
        "| ids | loop | chains | tokens/s | its loop, batched | its loop, alone | faster than batched | than alone |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(results["rows"], key=lambda row: (len(row["ids"]), [c.name for c in CASES].index(row["case"]))):
        rates = " | ".join(f"{row['rates'][side]:,.3g}" for side in ("ours", "batched", "alone"))
        faster = " | ".join("{1:.2f} [{0:.2f}, {2:.2f}]".format(*row["faster"][side]) for side in ("batched", "alone"))
        lines.append(f"| {row['ids']} | {row['case']} | {row['chains']} | {rates} | {faster} |")
    networks = " and ".join(
        f"{subject.sizes.length} tokens of {name} ids in {subject.steps} steps" for name, subject in SUBJECTS.items()
    )
    sizes = SUBJECTS["10"].sizes
    lines += [
        "",
        f"Tokens drawn a second, {networks}, by a transformer of width {sizes.width} and depth {sizes.depth} with "
        f"random weights. *A quarter*: of the positions of finished chains, at random. {results['rounds']} rounds "
        f"in turns, quartiles of ratios. {measured_at(results['environment'])}",
    ]
    return "\n".join(lines)


def main() -> None:
    rounds = {"type": script.at_least(2), "default": 5, "help": "at least 2 (default 5)"}
    subjects = {"nargs": "*", "choices": list(SUBJECTS), "default": (), "help": "vocabularies (default: all)"}
    script.run(__doc__, measure, report, rounds=rounds, subjects=subjects)


if __name__ == "__main__":
    main()
