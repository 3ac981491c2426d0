"""Tokens a second of the engine and of the loops of baselines/token_loops.py, with the same network on one device.

    python bench/tokens.py --out FILE.json     measure (half an hour of a core), print a table, write the numbers
    python bench/tokens.py --report FILE.json  print an earlier measurement

Networks have random weights, and the loops call them on all positions. That of 10 ids is a TokenTransformer of the
bundled model's sizes, which the engine calls on active positions alone; that of 50,258 is called through
`HuggingFaceDenoiser`. Each round times every arm once. A loop takes the chains in one batch, but at most `most_batched`
of them: its rate does not grow beyond. The rate of the loop that takes one chain after another is that of a single
chain. Checked before: both reveal the same number of tokens in every step (LLaDA), or the same on average (ReMDM), and
leave none masked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from baselines import token_loops
from baselines.token_network import Sizes, random_network
from support import script
from support.harness import Clock, interleaved, quartiles
from torch import Tensor

from ipr_fast import (
    ActivePatches,
    TokenDenoiser,
    TokenPrediction,
    TokenSchedule,
    generate_batch,
    random_patches,
    refine_batch,
)
from ipr_fast.evaluation.environment import measured_at
from ipr_fast.models import HuggingFaceDenoiser, TokenTransformer, TokenTransformerConfig

RATIO = 0.25
STANDARD_ERRORS = 6.0


class Pair(NamedTuple):
    """A model as the engine calls it, and the logits (B, N, V) that a loop takes from it.

    network: of the positions (B, N) bool that are masked at first.
    """

    model: TokenDenoiser
    network: Callable[[Tensor], token_loops.Network]


def live_model(sizes: Sizes) -> Pair:
    """Return a network in plain torch."""
    network = random_network(sizes)
    return Pair(HuggingFaceDenoiser(network, sizes.length), lambda masked: network)


def own_model(sizes: Sizes) -> Pair:
    """Return a TokenTransformer over a square board."""
    side, mask_id = math.isqrt(sizes.length), sizes.size - 1
    layers = {"width": sizes.width, "depth": sizes.depth, "num_heads": sizes.heads}
    config = TokenTransformerConfig(
        **layers, vocabulary_size=sizes.size, mask_id=mask_id, rows=side, columns=sizes.length // side
    )
    model, generator = TokenTransformer(config), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    model.token_out.bias.data[mask_id] = -100.0  # the loops may draw it
    model.eval().requires_grad_(False)

    def network(masked: Tensor) -> token_loops.Network:
        return lambda tokens: model.predict(tokens, masked).logits

    return Pair(model, network)


class Subject(NamedTuple):
    """A model; at most how many steps a regeneration takes; most_batched: chains in a batch of a loop."""

    make: Callable[[Sizes], Pair]
    sizes: Sizes
    steps: int
    chains: tuple[int, ...] = (1, 16, 256)
    most_batched: int = 64


SUBJECTS = {
    "10": Subject(own_model, Sizes(length=81, size=10, width=128, depth=6, heads=4), steps=4),
    "50,258": Subject(live_model, Sizes(length=16, size=50_258, width=128, depth=6, heads=4), steps=2, most_batched=16),
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
    """One case of a model: both sides' calls."""

    case: Case
    subject: Subject
    pair: Pair
    chains: int

    @property
    def positions(self) -> int:
        return self.case.positions(self.subject.sizes.length)

    @property
    def steps(self) -> int:
        """As many as the subject's or fewer, so that every step reveals the same number."""
        return max(steps for steps in range(1, self.subject.steps + 1) if self.positions % steps == 0)

    def ours(self) -> Tensor:
        schedule = self.case.schedule(self.steps)
        if self.case.refines:
            finished, policy = self.finished(self.chains), random_patches(RATIO)
            return refine_batch(finished, policy, 1, model=self.pair.model, schedule=schedule)
        return generate_batch(self.chains, model=self.pair.model, schedule=schedule)

    def loop(self, chains: int) -> Tensor:
        mask_id, x = self.subject.sizes.size - 1, self.masked(chains)
        return self.case.loop(self.pair.network(x == mask_id), x, self.steps, mask_id=mask_id)

    def finished(self, chains: int) -> Tensor:
        length, size = self.subject.sizes[:2]
        return torch.randint(0, size - 1, (chains, length), generator=torch.Generator().manual_seed(0))

    def masked(self, chains: int) -> Tensor:
        length, size = self.subject.sizes[:2]
        keys = torch.rand(chains, length, generator=torch.Generator().manual_seed(1))
        return self.finished(chains).masked_fill(keys.argsort(1) < self.positions, size - 1)

    def check(self) -> None:
        """Raise AssertionError unless both sides reveal as many tokens in every step, and leave none masked."""
        mask_id, seen = self.subject.sizes.size - 1, ([], [])
        told = Pair(Told(self.pair.model, seen[0]), told_network(self.pair.network, seen[1]))
        work = self._replace(chains=min(self.chains, self.subject.most_batched), pair=told)
        for tokens in (work.ours(), work.loop(work.chains)):
            assert not (tokens == mask_id).any(), "a token is still masked"
        # ReMDM calls the network once more at the end
        ours, theirs = (torch.stack([(x == mask_id).sum(1) for x in each[: self.steps]]).double() for each in seen)
        wrong = f"revealed otherwise: {ours.mean(1)} and {theirs.mean(1)} are masked"
        if self.case.loop is token_loops.llada:
            assert torch.equal(ours, theirs), wrong
            return
        rounding = math.sqrt(2 * self.positions / 4 / work.chains)
        apart = (ours[: len(theirs)].mean(1) - theirs.mean(1)).abs().max()
        assert apart <= STANDARD_ERRORS * rounding, wrong


class Told:
    """A model that notes the tokens of each call; it computes all positions."""

    def __init__(self, model: TokenDenoiser, seen: list[Tensor]) -> None:
        self.model, self.vocabulary, self.length, self.seen = model, model.vocabulary, model.length, seen

    def __call__(self, tokens: Tensor, active: ActivePatches) -> TokenPrediction:
        self.seen.append(tokens.clone())
        return self.model(tokens, active)


def told_network(
    network: Callable[[Tensor], token_loops.Network], seen: list[Tensor]
) -> Callable[[Tensor], token_loops.Network]:
    def of_masked(masked: Tensor) -> token_loops.Network:
        logits_of = network(masked)

        def told(tokens: Tensor) -> Tensor:
            seen.append(tokens.clone())
            return logits_of(tokens)

        return told

    return of_masked


def measure(rounds: int, subjects: Sequence[str] = ()) -> dict:
    """Measure every subject, or some."""
    rows = [row for name in subjects or SUBJECTS for row in measure_subject(name, rounds)]
    return {"rounds": rounds, "rows": rows}


def measure_subject(name: str, rounds: int) -> list[dict]:
    """Return the tokens a second of each case, and the speed-ups over the loop in batches and alone."""
    subject = SUBJECTS[name]
    pair, rows = subject.make(subject.sizes), []
    for chains in subject.chains:
        works = [Work(case, subject, pair, chains) for case in CASES if chains <= case.most_chains]
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
                units[f"{work.case.name}/{side}"] = number * work.positions
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
        f"{subject.sizes.length} tokens of {name} ids in at most {subject.steps} steps"
        for name, subject in SUBJECTS.items()
    )
    sizes = SUBJECTS["10"].sizes
    lines += [
        "",
        f"Tokens drawn a second, {networks}, by transformers of width {sizes.width} and depth {sizes.depth} with "
        f"random weights. *A quarter*: of the positions of finished chains, at random. A loop takes at most "
        f"{' and '.join(str(subject.most_batched) for subject in SUBJECTS.values())} chains in a batch. "
        f"{results['rounds']} rounds in turns, quartiles of ratios. {measured_at(results['environment'])}",
    ]
    return "\n".join(lines)


def main() -> None:
    rounds = {"type": script.at_least(2), "default": 5, "help": "at least 2 (default 5)"}
    subjects = {"nargs": "*", "choices": list(SUBJECTS), "default": (), "help": "vocabularies (default: all)"}
    script.run(__doc__, measure, report, rounds=rounds, subjects=subjects)


if __name__ == "__main__":
    main()
