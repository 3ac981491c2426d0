"""The command line: ipr-fast demo | generate | refine | train | convert | info."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import ipr_fast
from ipr_fast import checks, files
from ipr_fast.cli.chunks import Work, content_hash, refine_in_chunks, run_folder
from ipr_fast.engine.capture_check import CaptureError
from ipr_fast.errors import BrokenExtra, MissingExtra
from ipr_fast.evaluation.demo import DemoSettings, run_demo
from ipr_fast.evaluation.evaluate import describe, evaluate
from ipr_fast.kernels.philox import MAX_CHAIN_ID
from ipr_fast.models.files.checkpoints import bundled_model_for, load_model, model_info, save_model
from ipr_fast.models.files.sources import NoSuchModel, bundled_models
from ipr_fast.models.srm_unet_config import PRESETS
from ipr_fast.refine import BACKENDS, DEFAULT_MODEL, generate_batch
from ipr_fast.sampling.policies import random_patches
from ipr_fast.sampling.schedule import Schedule
from ipr_fast.tasks.catalog import TASKS, make_task, task_of
from ipr_fast.tasks.sudoku import DigitSudoku
from ipr_fast.training.checkpoint import read_checkpoint
from ipr_fast.training.configs import config_of
from ipr_fast.training.run import CHECKPOINT, EVALUATION, LOG, MODEL, train
from ipr_fast.training.trainer import DTYPES as TRAIN_DTYPES
from ipr_fast.training.trainer import END, TrainSettings

A_MODEL = "a bundled model's name, a .safetensors file or a Hugging Face hub id"
DTYPES = ("float32", "bfloat16", "float16")
MANY, FEW = 512, 32  # samples of a demo
# What the user can do something about: told in one line.
EXPECTED = (
    ValueError,
    ArithmeticError,
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
    MissingExtra,
    BrokenExtra,
    CaptureError,
)
CHUNKS = 256, 4096  # samples that `refine` saves together, on a CPU and on a GPU
SCHEDULE = {"nargs": 2, "metavar": ("STEPS_PER_PATCH", "OVERLAP")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the command failed, 2 wrong usage, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    try:
        with _warnings_in_one_line(arguments.command):
            arguments.run(arguments)
        _flush_output()
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        _drop_output()
        return 1
    except EXPECTED as error:
        print(f"ipr-fast {arguments.command}: error: {_printable(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how torch's CPU allocator says it
            raise
        print(f"ipr-fast {arguments.command}: error: out of memory ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        hint = "--resume goes on from the last checkpoint" if arguments.command == "train" else str(error)
        print(f"ipr-fast {arguments.command}: interrupted{hint and f' ({hint})'}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _warnings_in_one_line(command: str) -> Iterator[None]:
    """Show a warning as the message alone, without the line of code that it comes from."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"ipr-fast {command}: warning: {_printable(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _flush_output() -> None:
    """Write out what was printed: into a full disk that fails, and must not be tried again at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        raise


def _drop_output() -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the interpreter's last flush


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ipr-fast", description="Refine samples of sequential diffusion models by Iterative Partial Refinement."
    )
    parser.add_argument("--version", action="version", version=f"ipr-fast {ipr_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_generate, _add_refine, _add_train, _add_convert, _add_info):
        add(commands)
    return parser


# ----------------------------------------------------------------------------------------------------------- demo


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "demo", _demo, "generate samples, refine them, count the good ones and draw pictures")
    parser.add_argument(
        "--count",
        "--boards",
        type=_count,
        help=f"samples to generate (default {MANY}; {FEW} of a larger model without a GPU)",
    )
    parser.add_argument("--iters", type=_count, default=20, help="iterations of refinement (default 20)")
    parser.add_argument("--ratio", type=float, default=0.25, help="alpha, the share of patches renoised (default 0.25)")
    parser.add_argument(
        "--clues",
        type=int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="clue cells a board (default 0 0; 0 26 on 9x9 cells)",
    )
    parser.add_argument(
        "--out", type=_path, default=Path("demo"), help="folder for pictures and numbers (default demo)"
    )
    parser.add_argument("--mnist", help="folder of MNIST's original files, for a model of 28x28 cells")
    _add_model(parser, f"default {DEFAULT_MODEL}")
    _add_run_options(parser)


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out: {arguments.out} is not a folder")
    policy, device = random_patches(arguments.ratio), _device(arguments)
    model = _load(arguments, DEFAULT_MODEL, device)
    task = task_of(model.grid, arguments.mnist)
    is_small = model.grid.num_patches <= 16 or device.type == "cuda"
    clues = arguments.clues or ((0, 26) if isinstance(task, DigitSudoku) and task.side == 9 else (0, 0))
    settings = DemoSettings(
        arguments.count or (MANY if is_small else FEW), arguments.iters, policy.ratio, tuple(clues), arguments.seed
    )
    run_demo(task, model, settings, arguments.out, say=print, progress=not arguments.quiet)


# ------------------------------------------------------------------------------------------- generate and refine


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "generate", _generate, "generate samples from noise in one pass")
    parser.add_argument("--count", type=_count, default=64, help="samples to generate (default 64)")
    parser.add_argument("--out", type=_path, required=True, help=".npy, .npz, .pt, or a folder for PNG files")
    parser.add_argument("--known-values", type=_path, help="samples that hold the values of the known patches")
    _add_sampling(parser, "default the model's schedule to generate")
    _add_model(parser, f"default {DEFAULT_MODEL}")
    _add_run_options(parser)


def _generate(arguments: argparse.Namespace) -> None:
    device = _device(arguments)
    model = _load(arguments, DEFAULT_MODEL, device)
    files.check_writable(arguments.out, (arguments.count, *model.grid.sample_shape))
    if (arguments.known is None) != (arguments.known_values is None):
        raise ValueError("--known and --known-values must be given together")
    values = None if arguments.known_values is None else files.read_samples(arguments.known_values).images.to(device)
    x = generate_batch(
        arguments.count,
        model=model,
        known_values=values,
        **_sampling(arguments, device, arguments.count),
    )
    files.write_samples(arguments.out, files.Samples(x))
    print(f"wrote {len(x)} samples to {arguments.out}")


def _add_refine(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "refine", _refine, "refine samples that a model has made")
    parser.add_argument("input", type=_path, help=".npy, .npz, .pt (images (B, C, H, W)), or a folder of PNG files")
    parser.add_argument("--out", type=_path, required=True, help=".npy, .npz, .pt, or a folder for PNG files")
    parser.add_argument("--iters", type=_count_or_zero, default=50, help="iterations (default 50)")
    parser.add_argument("--first-iteration", type=_count, default=1, help="number of the first one (default 1)")
    parser.add_argument("--ratio", type=float, default=0.25, help="alpha, the share of patches renoised (default 0.25)")
    parser.add_argument("--fixed-region", action="store_true", help="renoise the same random patches every iteration")
    parser.add_argument(
        "--noise", choices=("random", "fixed"), default="random", help="fixed: renoise with the initial noise each time"
    )
    on_cpu, on_gpu = CHUNKS
    parser.add_argument(
        "--chunk", type=_count, help=f"samples that are saved together (default {on_cpu} on a CPU, {on_gpu} on a GPU)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from what an ended run has left in OUT.partial")
    _add_sampling(parser, "default the model's schedule to refine")
    _add_model(parser, "default the bundled model whose sample shape fits")
    _add_run_options(parser)


def _refine(arguments: argparse.Namespace) -> None:
    device, samples = _device(arguments), files.read_samples(arguments.input)
    images = samples.images
    files.check_writable(arguments.out, tuple(images.shape), samples.names)
    with _model_from("--model"):
        default = arguments.model or bundled_model_for(tuple(images.shape[1:]))
    model = _load(arguments, default, device)
    chunk = arguments.chunk or CHUNKS[device.type != "cpu"]
    options = _sampling(arguments, device, len(images))
    work = Work(len(images), chunk, arguments.first_iteration, arguments.iters)
    settings = _settings(arguments, images, model, options) | {"chunk": chunk}
    partial = Path(f"{arguments.out}.partial")
    with run_folder(partial, settings, work, resume=arguments.resume) as folder:
        x = refine_in_chunks(
            images,
            random_patches(arguments.ratio, fixed=arguments.fixed_region),
            folder=folder,
            device=device,
            model=model,
            noise=arguments.noise,
            **options,
        )
        files.write_samples(arguments.out, files.Samples(x, samples.names, samples.depth))
    print(f"wrote {len(x)} refined samples to {arguments.out}")


def _settings(arguments: argparse.Namespace, images: torch.Tensor, model: torch.nn.Module, options: dict) -> dict:
    """What decides the result of `refine`, as JSON values: contents as their hashes."""
    names = ("iters", "first_iteration", "ratio", "fixed_region", "noise", "stochasticity", "temperature", "seed")
    known = options["known"]
    return {
        "input": content_hash(images),
        "model": content_hash(str(model.config), *(part for pair in model.state_dict().items() for part in pair)),
        "known": None if known is None else content_hash(known),
        **{name.replace("_", "-"): getattr(arguments, name) for name in names},
        "first-chain": arguments.first_chain,
        "schedule": str(options["schedule"] or model.refine_schedule),
        "dtype": arguments.dtype or "as stored",
        "tf32": arguments.tf32,
    }


def _add_sampling(parser: argparse.ArgumentParser, schedule: str) -> None:
    parser.add_argument("--known", type=_path, help=".npy, .npz or .pt with a bool mask (B, N) of given patches")
    parser.add_argument("--schedule", **SCHEDULE, help=schedule)
    parser.add_argument("--stochasticity", type=float, default=0.5, help="eta in [0, 1] (default 0.5)")
    parser.add_argument("--temperature", type=float, default=1.0, help="factor on the posterior noise (default 1)")
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="auto", help="default auto")
    parser.add_argument(
        "--max-chains", type=_max_chains, default="auto", help="samples at a time (default auto: the fastest that fits)"
    )
    parser.add_argument(
        "--first-chain",
        type=_count_or_zero,
        default=0,
        help="chain id of the first sample, on which its random numbers depend (default 0)",
    )
    parser.add_argument("--tf32", action="store_true", help="let a GPU multiply float32 in TF32")


def _sampling(arguments: argparse.Namespace, device: torch.device, count: int) -> dict:
    known = None if arguments.known is None else files.read_array(arguments.known, "known").to(device)
    first = checks.integer("--first-chain", arguments.first_chain, 0, MAX_CHAIN_ID + 1 - count)
    return {
        "known": known,
        "chain_ids": torch.arange(first, first + count, device=device),
        "schedule": _schedule("--schedule", arguments.schedule),
        "stochasticity": arguments.stochasticity,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "progress": not arguments.quiet,
        "backend": arguments.backend,
        "max_chains": arguments.max_chains,
        "tf32": arguments.tf32,
    }


def _schedule(name: str, pair: list[str] | None) -> Schedule | None:
    if pair is None:
        return None
    try:
        return Schedule(int(pair[0]), float(pair[1]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


# ---------------------------------------------------------------------------------------------------------- train


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "train", _train, "train a model of a task; a killed run can be resumed")
    defaults = TrainSettings()
    parser.add_argument("--task", choices=TASKS, default="digit-sudoku-4x4", help="default digit-sudoku-4x4")
    parser.add_argument("--mnist", help="folder of MNIST's original files: 28x28 cells in place of 8x8")
    parser.add_argument("--out", type=_path, required=True, help="folder for the checkpoint, the log and the model")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    for name in ("width", "depth", "num_heads"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=_count, help="of the network (default the task's)")
    steps = f"end after so many (default {defaults.steps:,}; with --minutes, no such end; with --resume, the run's end)"
    parser.add_argument("--steps", type=_count, help=steps)
    parser.add_argument("--minutes", type=float, help="end after so many; the learning rate falls to 0 until then")
    for name, parse in (
        ("batch_size", _count),
        ("learning_rate", float),
        ("warmup", _count_or_zero),
        ("weight_decay", float),
        ("ema_decay", float),
        ("clip_norm", float),
        ("save_every", _count),
    ):
        default = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=parse, default=default, help=f"default {default:g}")
    parser.add_argument("--dtype", choices=TRAIN_DTYPES, default=defaults.dtype, help="of products (default float32)")
    parser.add_argument("--compile", action="store_true", help="fuse network and losses; the first step is not timed")
    parser.add_argument(
        "--evaluate", type=_count_or_zero, default=256, help="samples to judge in the end, 0 for none (default 256)"
    )
    parser.add_argument("--iters", type=_count, default=10, help="iterations of their refinement (default 10)")
    _add_run_options(parser)


def _train(arguments: argparse.Namespace) -> None:
    names = [field.name for field in dataclasses.fields(TrainSettings)]
    settings = TrainSettings(**{name: getattr(arguments, name) for name in names} | _end(arguments))
    task, device, progress = make_task(arguments.task, arguments.mnist), _device(arguments), not arguments.quiet
    given = {name: getattr(arguments, name) for name in ("width", "depth", "num_heads")}
    sizes = {name: size for name, size in given.items() if size is not None}
    task.config = dataclasses.replace(config_of(task), **sizes)
    files.check_no_folders(arguments.out / name for name in (CHECKPOINT, LOG, MODEL, EVALUATION))
    path = train(task, settings, arguments.out, resume=arguments.resume, device=device, progress=progress)
    print(f"wrote {path}")
    if arguments.evaluate:
        model = load_model(path, device=device)
        results = evaluate(task, model, arguments.evaluate, arguments.iters, seed=arguments.seed, progress=progress)
        for line in describe(results, task, arguments.iters):
            print(line)
        numbers = arguments.out / EVALUATION
        files.write_json(numbers, {"iters": arguments.iters, "seed": arguments.seed, **results})
        print(f"wrote {numbers}")


def _end(arguments: argparse.Namespace) -> dict[str, float | None]:
    """The steps and minutes that end the training, where no option says: those of the run that is resumed, if any."""
    if arguments.steps is not None or arguments.minutes is not None:
        return {}
    checkpoint = arguments.out / CHECKPOINT
    if not arguments.resume or not checkpoint.exists():
        return {"steps": TrainSettings.steps}
    settings = read_checkpoint(checkpoint)["settings"]
    return {name: settings.get(name) for name in END}


# -------------------------------------------------------------------------------------------------------- convert


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "convert", _convert, "write a published checkpoint as .safetensors, with its configuration"
    )
    parser.add_argument("source", help=f"a .ckpt or .pt of an SRM UNet, or {A_MODEL}")
    parser.add_argument("out", type=_path, help="the .safetensors file to write")
    parser.add_argument("--preset", choices=PRESETS, help="the network's published configuration")
    for name, meaning in (
        ("image_size", "pixels of a sample's side"),
        ("patch_size", "pixels of a patch's side"),
        ("num_head_channels", "channels of an attention head"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=_count, help=f"{meaning}, where there is no preset")
    for name in ("generate", "refine"):
        parser.add_argument(f"--{name}-schedule", **SCHEDULE, help=f"the model's default to {name}")
    parser.add_argument("--dtype", choices=DTYPES, help="default as stored")


def _convert(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix != ".safetensors":
        raise ValueError(f"{arguments.out}: must end in .safetensors")
    given = {name: getattr(arguments, name) for name in ("image_size", "patch_size", "num_head_channels")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.preset is not None and given:
        raise ValueError(f"--preset says already what {', '.join(given)} is")
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    model = load_model(arguments.source, config=arguments.preset or given or None, dtype=dtype)
    for name in ("generate_schedule", "refine_schedule"):
        schedule = _schedule(f"--{name.replace('_', '-')}", getattr(arguments, name))
        if schedule is not None:
            pair = (schedule.steps_per_patch, schedule.overlap)
            model.config = dataclasses.replace(model.config, **{name: pair})
    files.prepare_folder(arguments.out.parent)
    save_model(model, arguments.out, **_kept_metadata(arguments.source), source=_printable(Path(arguments.source).name))
    print(f"wrote {arguments.out}")


def _kept_metadata(source: str) -> dict[str, str]:
    """What a file says of itself beside what `save_model` writes; of a checkpoint, which weights were taken."""
    metadata = model_info(source)["metadata"]
    if "architecture" not in metadata:
        return {"weights": metadata["weights"]}
    return {key: value for key, value in metadata.items() if key not in ("format", "architecture", "config", "source")}


# ----------------------------------------------------------------------------------------------------------- info


def _add_info(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("info", help="versions, devices, bundled models; or one model", description="")
    parser.description = "Print versions, devices and the bundled models; with a model, what its file says of it."
    parser.add_argument("model", nargs="?", help=f"{A_MODEL}, or a .ckpt or .pt of an SRM UNet")
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> None:
    if arguments.model is not None:
        with _model_from("model"):
            lines = _model_lines(arguments.model)
        for key, value in lines:
            print(f"{_printable(key):13} {_printable(value)}")
        return
    print(f"ipr-fast     {ipr_fast.__version__}")
    print(f"python       {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "numpy", "nvtx", "safetensors", "scikit-learn", "matplotlib", "pillow"):
        print(f"{package:12} {_version(package)}")
    print(f"cpu          {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        print(f"cuda:{i}       {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("cuda         no device: everything runs on the CPU")
    print("bundled models")
    for name in bundled_models():
        info = model_info(name)
        print(f"  {name}  {info['architecture']}, samples {info['sample_shape']}, {info['parameters']:,} parameters")


def _model_lines(source: str) -> list[tuple[str, object]]:
    info = model_info(source)
    metadata = info.pop("metadata")
    info["sample_shape"] = info["sample_shape"] or "not told by the file"
    return [
        *info.items(),
        *((key, value) for key, value in sorted(metadata.items()) if key not in ("format", "architecture")),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --------------------------------------------------------------------------------------------------------- shared


def _command(commands: argparse._SubParsersAction, name: str, run, description: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=description, description=description[0].upper() + description[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--model", help=f"{A_MODEL} ({default})")
    parser.add_argument("--dtype", choices=DTYPES, help="in which the network computes (default as stored)")


def _load(arguments: argparse.Namespace, default: str, device: torch.device) -> torch.nn.Module:
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with _model_from("--model"):
        return load_model(default if arguments.model is None else arguments.model, device=device, dtype=dtype)


@contextmanager
def _model_from(argument: str) -> Iterator[None]:
    """Errors of a model's name speak of the argument that it comes from."""
    try:
        yield
    except NoSuchModel as error:
        raise ValueError(f"{argument} {error.problem}") from error


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers, in [0, 2**64) (default 0)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"default {default}")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _device(arguments: argparse.Namespace) -> torch.device:
    checks.integer("--seed", arguments.seed, 0, 2**64 - 1)
    return checks.usable_device("--device", arguments.device)


def _printable(value: object) -> str:
    """As one line without control characters: a name or a note in a file may be anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def _path(text: str) -> Path:
    if not text:  # which Path takes for the working directory
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return Path(text)


def _count(text: str) -> int:
    return _integer_from(text, 1)


def _max_chains(text: str) -> int | str:
    return text if text == "auto" else _integer_from(text, 1)


def _count_or_zero(text: str) -> int:
    return _integer_from(text, 0)


def _integer_from(text: str, low: int) -> int:
    if not text.lstrip("-").isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"must be an integer >= {low}, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
