"""Videos of a Diffusion Forcing transformer by the engine and by diffusers' own pipeline, on a CPU.

    python bench/diffusers_sampler.py --out FILE.json     measure (some minutes of a core), print a table, write it
    python bench/diffusers_sampler.py --report FILE.json  print an earlier measurement

Both sample the same random SkyReels-V2 transformer from the same noise, by as many Euler steps, in one process and
thread, in turns; first their samples are compared. Times are CPU times of the thread: another process on the machine
slows both. Needs the extra `diffusers`.
"""

from __future__ import annotations

import time

import torch
from support import script
from support.harness import quartiles

import ipr_fast
from ipr_fast.evaluation.environment import measured_at
from ipr_fast.kernels import philox
from ipr_fast.models import DiffusersDenoiser, Guided

CHANNELS, FRAMES, SIDE, TEXT, STEPS = 16, 6, 12, (16, 64), 5
CHAINS, SCALES = (1, 8), (1.0, 5.0)
CLOSE = 1e-3  # of the largest number, between the samples of both


def initial_noise(model: DiffusersDenoiser, batch: int, seed: int) -> torch.Tensor:
    """Return the noise (B, C, T, H, W) with which `generate_batch` begins."""
    n, numel = model.grid.num_patches, model.grid.patch_numel
    ids, chains = torch.arange(n).expand(batch, n), torch.arange(batch)
    noise = philox.patch_normals(seed, philox.STREAM_INITIAL, 0, torch.tensor(0), chains, ids, numel)
    return model.grid.to_images(noise)


def measure(rounds: int) -> dict:
    """Measure every number of chains, with guidance and without."""
    from baselines.diffusers_pipeline import diffusers, network, pipeline_samples

    torch.set_num_threads(1)  # the thread's time is that of all the work
    model = DiffusersDenoiser(network(3, 8, CHANNELS, TEXT[1]), FRAMES, SIDE, SIDE)
    rows = []
    for chains in CHAINS:
        prompts = torch.randn(chains, *TEXT, generator=torch.Generator().manual_seed(0))
        negative, noise = torch.zeros(TEXT), initial_noise(model, chains, seed=0)
        for scale in SCALES:
            guided = model if scale == 1 else Guided(model, scale, negative)
            options = {"schedule": ipr_fast.Schedule(STEPS, 1.0), "stochasticity": 0.0, "condition": prompts}
            both = {
                "engine": lambda guided=guided, options=options, chains=chains: ipr_fast.generate_batch(
                    chains, model=guided, **options
                ),
                "pipeline": lambda noise=noise, prompts=prompts, negative=negative, scale=scale: pipeline_samples(
                    model.model, noise, prompts, negative.expand(len(prompts), *TEXT), scale, STEPS
                ),
            }
            ours, theirs = (sample() for sample in both.values())
            apart = float((ours - theirs).abs().max() / theirs.abs().max())
            if not apart < CLOSE:
                raise RuntimeError(f"the samples differ by {apart:.2g} of the largest number: nothing was timed")
            times: dict[str, list[float]] = {name: [] for name in both}
            for _ in range(rounds):
                for name, sample in both.items():
                    start = time.thread_time()
                    sample()
                    times[name].append(time.thread_time() - start)
            ratio = [slow / fast for slow, fast in zip(times["pipeline"], times["engine"], strict=True)]
            rows.append(
                {"chains": chains, "scale": scale, "apart": apart, "faster": quartiles(ratio)}
                | {name: quartiles(each) for name, each in times.items()}
            )
    return {"rounds": rounds, "diffusers": diffusers.__version__, "rows": rows}


def report(results: dict) -> str:
    """Format a measurement as a Markdown table."""
    lines = [
        "| videos | guidance | engine, s | diffusers' pipeline, s | faster, times | samples apart |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        seconds = " | ".join(f"{row[name][1]:.3f}" for name in ("engine", "pipeline"))
        low, median, high = row["faster"]
        faster = f"{median:.2f} [{low:.2f}, {high:.2f}]"
        guidance = "none" if row["scale"] == 1 else f"{row['scale']:g}"
        lines.append(f"| {row['chains']} | {guidance} | {seconds} | {faster} | {row['apart']:.1e} |")
    note = (
        f"Medians of {results['rounds']} rounds, CPU times of a thread, with quartiles; {STEPS} steps of a random "
        f"SkyReels-V2 transformer with {FRAMES} frames. diffusers {results['diffusers']}. "
        f"{measured_at(results['environment'])}"
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    how = {"type": script.at_least(1), "default": 7, "help": "rounds (7)"}
    script.run(__doc__, measure, report, rounds=how)


if __name__ == "__main__":
    main()
