"""README files hold: their code runs, their links lead somewhere, their figures are those of the measurements."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import typer

import ipr_fast
from ipr_fast.evaluation.report import report
from ipr_fast.evaluation.scale.plan import plan_names
from ipr_fast.evaluation.scale.readme import read_summary, results_section
from ipr_fast.evaluation.scale.report import summary_markdown
from ipr_fast.sampling.tokens import ORDERS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SCALE = RESULTS / "scale"
FOLDERS = [*sorted(path.parent for path in ROOT.glob("ipr_fast/*/README.md")), ROOT / "kernels", ROOT / "bench"]
READMES = [ROOT, *FOLDERS, ROOT / "profiling"]
ADAPTERS = ROOT / "ipr_fast" / "models" / "adapters"
NESTED = [ROOT / "ipr_fast" / "evaluation" / "scale", SCALE, ADAPTERS]


def text(folder: str | Path) -> str:
    """Return the README of a folder."""
    return (ROOT / folder / "README.md").read_text()


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme, flags=re.DOTALL)


def anchor(title: str) -> str:
    """Return the name by which links reach a section."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def measured(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


# --------------------------------------------------------------------------------------------------------------- code

SNIPPETS = [
    pytest.param(block, id=f"{folder.name}-{i}")
    for folder in (*READMES, ADAPTERS)
    for i, block in enumerate(blocks(text(folder), "python"))
    if folder.name not in ("bench", "cli", "profiling", "tasks")  # theirs are files, run by other tests
]


@pytest.fixture
def _in_folder_with_checkpoint(tmp_path, monkeypatch):
    """A working directory with the checkpoint that README files load, of the published format and a small preset."""
    schedules = {"generate_schedule": (1, 1.0), "refine_schedule": (1, 1.0)}
    small = ipr_fast.models.SRMUNetConfig(1, 18, 2, (32, 32), (False, True), 1, 32, 32, 16, **schedules)
    monkeypatch.setitem(ipr_fast.models.PRESETS, "even_pixels", small)
    weights = ipr_fast.models.SRMUNet(small).state_dict()
    torch.save({"state_dict": {f"ema_denoiser.module.{k}": v for k, v in weights.items()}}, tmp_path / "last.ckpt")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_in_folder_with_checkpoint")
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs_by_itself(snippet):
    if "import transformers" in snippet:
        pytest.importorskip("transformers")  # of the extra `hf`
    if "import diffusers" in snippet:
        pytest.importorskip("diffusers", exc_type=ImportError)  # of the extra `diffusers`
    exec(compile(snippet, "README.md", "exec"), {"__name__": "snippet"})


@pytest.mark.usefixtures("_in_folder_with_checkpoint")
def test_the_first_snippet_improves_boards_and_draws_them(capsys):
    namespace: dict = {}
    exec(compile(blocks(text("."), "python")[0], "README.md", "exec"), namespace)
    assert namespace["x"].shape == namespace["refined"].shape == (64, 1, 32, 32)
    counts = json.loads(capsys.readouterr().out)
    assert len(counts) == 21
    assert counts[20] >= counts[0] + 6
    assert Path("boards.png").stat().st_size > 10_000


def test_the_model_of_the_readme_runs_on_the_engine_as_on_the_reference():
    namespace: dict = {}
    exec(compile(blocks(text("."), "python")[1], "README.md", "exec"), namespace)
    model, x = namespace["model"], torch.zeros(2, 3, 32, 32)
    runs = [
        ipr_fast.refine_batch(x, ipr_fast.random_patches(), 1, model=model, backend=backend)
        for backend in ("torch", "reference")
    ]
    torch.testing.assert_close(*runs, atol=1e-4, rtol=0)


def test_the_benchmark_in_the_readme_of_bench_runs():
    def measure(check, ours, **facts):
        check().hold()
        assert facts["batch"] == ours.units == len(ours.work())

    namespace: dict = {}
    (block,) = blocks(text("bench"), "python")
    exec(compile(block, "bench/README.md", "exec"), namespace)
    namespace["test_mine"](measure, torch.device("cpu"))


@pytest.mark.parametrize("library", ["diffusers", "spatialreasoners"])
def test_the_speed_of_an_adapter_is_the_measured_one(library):
    report = importlib.import_module(f"{library}_sampler").report(measured(f"{library}.json"))
    assert report in text(ADAPTERS)


def test_ci_runs_the_test_command():
    command = next(block for block in blocks(text("."), "bash") if "-m pytest" in block).strip()
    assert command in (ROOT / ".ci" / "run").read_text()


def test_the_list_of_commands_is_that_of_the_command_line():
    from ipr_fast.cli.main import build_app

    listing = next(block for block in blocks(text("ipr_fast/cli"), "text") if "ipr-fast train" in block)
    commands = typer.main.get_command(build_app()).commands
    assert re.findall(r"^ipr-fast (\w+)", listing, flags=re.MULTILINE) == list(commands)
    for line in listing.splitlines():
        name, options = line.split()[1], re.findall(r"--[\w-]+", line)
        assert set(options) <= {option for parameter in commands[name].params for option in parameter.opts}


# -------------------------------------------------------------------------------------------------------------- shape

TO_BE_WRITTEN = {  # by who adds a command, a kernel, a model
    "ipr_fast/cli/count.py",
    "ipr_fast/models/my_model.py",
    "ipr_fast/models/my_model_config.py",
    "kernels/NAME.py",
    "tests/kernels/test_NAME.py",
    "tests/models/test_my_model.py",
    "tests/triton/test_NAME_kernel.py",
}


def test_the_top_readme_is_short():
    assert len(text(".").splitlines()) <= 200


@pytest.mark.parametrize("folder", [*READMES, *NESTED], ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_files_and_links_exist(folder):
    readme = text(folder)
    titles = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", readme, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        file, _, section = target.partition("#")
        if target.startswith("http"):
            continue
        assert not file or (folder / file).exists(), target
        if section and not file:
            assert section in titles, target
    for path in re.findall(r"`((?:ipr_fast|bench|profiling|tests|kernels)/[\w/.]+\.\w+)`", readme):
        assert path in TO_BE_WRITTEN or (ROOT / path).exists(), path


@pytest.mark.parametrize("folder", [*FOLDERS, *NESTED], ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_a_folders_readme_names_its_files_and_only_those(folder):
    """Every file of the folder, in its table; files of other folders are named with theirs."""
    readme = text(folder)
    if folder.name == "bench":  # with its own folders
        named = set(re.findall(r"(?<![\w/])`([\w/]+\.py)`", readme))
        files = [path for path in folder.rglob("*.py") if path.name != "__init__.py"]
        assert named == {path.relative_to(folder).as_posix() for path in files}
        return
    named = set(re.findall(r"(?<![\w/])`(\w+\.py)`", readme))
    assert named == {path.name for path in folder.glob("*.py")} - {"__init__.py"}


def test_the_table_of_folders_is_complete():
    rows = "".join(re.findall(r"^\| .*", text("."), flags=re.MULTILINE))
    linked = set(re.findall(r"\]\(([\w/]+)/README\.md\)", rows))
    assert linked == {folder.relative_to(ROOT).as_posix() for folder in READMES[1:]}


# ------------------------------------------------------------------------------------------------------------ figures


def test_tables_of_results_quote_those_of_the_folders():
    quoted = [line for line in text(".").splitlines() if re.match(r"\| .*\d \[", line)]
    sources = [*text("ipr_fast/evaluation").splitlines(), *text("bench").splitlines()]
    assert len(quoted) >= 4
    assert {row.rstrip(" |") for row in quoted} <= {row.rstrip(" |") for row in sources}  # without empty last columns


@pytest.mark.parametrize(
    ("model", "fewest"),
    [("digit-sudoku-4x4", 2048), ("digit-sudoku-9x9", 128), ("even-pixels", 256), ("counting-polygons-small", 128)],
)
def test_results_are_the_committed_ones(model, fewest):
    results = measured(f"quality-{model}.json")
    assert results["model"] == model
    assert report(results) in text("ipr_fast/evaluation")
    assert results["samples"] >= fewest
    card = (ROOT / f"ipr_fast/models/weights/{model}.md").read_text()
    rows = {row["name"]: row for row in results["arms"]}
    for name in ("one pass", next(name for name in rows if re.match(r"IPR, alpha 0.25, [2-5]0 iterations", name))):
        assert ipr_fast.evaluation.intervals.Estimate(*rows[name]["share"]).percent() in card


def test_the_other_arms_on_9x9_boards_are_the_committed_ones():
    results = measured("arms-digit-sudoku-9x9.json")
    assert report(results) in text("ipr_fast/evaluation")
    assert results["samples"] >= 128


def test_the_results_on_tokens_are_the_committed_ones():
    results = measured("quality-token-sudoku-9x9.json")
    assert results["model"] == "token-sudoku-9x9"
    assert report(results) in text("ipr_fast/evaluation")
    card = (ROOT / "ipr_fast/models/weights/token-sudoku-9x9.md").read_text()
    first = {row["name"]: row["cells"][0] for row in results["rows"]}
    for order in ORDERS:
        share = ipr_fast.evaluation.intervals.Estimate(*first[f"one pass, {order}"]["share"]).percent()
        assert re.search(rf"^\| {order} \| {re.escape(share)} \|", card, flags=re.MULTILINE)


def test_the_results_on_tokens_by_model_calls_are_the_committed_ones():
    results = measured("calls-token-sudoku-9x9.json")
    assert report(results) in text("ipr_fast/evaluation")
    assert all(cell["boards"] == 2000 for row in results["rows"] for cell in row["cells"])
    assert {81, 40, 20, 10, 5} == {cell["budget"] for cell in results["rows"][0]["cells"]}


def test_the_sentence_on_guidance_has_the_measured_shares():
    rows = {row["name"]: row["cells"][-1] for row in measured("guidance-token-sudoku-9x9.json")["rows"]}
    iterref, best = (f"{100 * rows[name]['share'][0]:.1f} %" for name in ("IterRef, T = 0.5", "best of N"))
    assert (
        f"sixteen passes' calls make {iterref} valid by IterRef, {best} by best of N"
        in (ROOT / "README.md").read_text()
    )


def test_the_repair_of_boards_of_tokens_is_the_committed_one():
    results = measured("repair-token-sudoku-9x9.json")
    assert report(results) in text("ipr_fast/evaluation")
    assert [arm["pairs"] for arm in results["repair"]] == [1, 3, 5]


def test_refinement_is_worth_it_in_the_committed_measurement():
    results = measured("quality-digit-sudoku-4x4.json")
    rows = {row["name"]: row for row in results["arms"]}
    value, low, _ = rows["IPR, alpha 0.25, 20 iterations"]["gain"]
    assert value >= 0.10
    assert low > 0.05
    curve = results["good_by_iteration"][:21]
    assert curve[0] < curve[5] < curve[20]
    assert all(later > max(curve[:r]) - 0.01 * results["samples"] for r, later in enumerate(curve) if r)


def test_every_bundled_model_has_a_card_and_measured_results():
    for model in ipr_fast.bundled_models():
        assert (ROOT / f"ipr_fast/models/weights/{model}.md").read_text().startswith(f"# {model}\n")
        assert (RESULTS / f"quality-{model}.json").exists()
        assert f"models/weights/{model}.md" in text("ipr_fast/evaluation")


@pytest.mark.parametrize("model", ["digit-sudoku-4x4", "digit-sudoku-9x9"])
def test_the_tables_of_repair_are_the_committed_ones(model):
    assert report(measured(f"repair-{model}.json")) in text("ipr_fast/evaluation")


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("digit-sudoku-4x4", 2000),
        ("token-sudoku-9x9", 2000),
        ("digit-sudoku-9x9", 2000),
        ("digit-sudoku-9x9-128", 128),
        ("violations-digit-sudoku-4x4", 2000),
        ("violations-token-sudoku-9x9", 2000),
        ("violations-digit-sudoku-9x9", 1000),
        ("coarse-digit-sudoku-4x4", 2000),
        ("coarse-digit-sudoku-9x9", 2000),
        ("others-digit-sudoku-4x4", 2000),
        ("others-token-sudoku-9x9", 2000),
        ("others-digit-sudoku-9x9", 500),
        ("others-coarse-digit-sudoku-9x9", 2000),
    ],
)
def test_the_tables_of_guidance_are_the_committed_ones(name, samples):
    results = measured(f"guidance-{name}.json")
    assert results["model"] in name
    assert results["samples"] == samples
    assert report(results) in text("ipr_fast/sampling/guidance")


def test_the_table_on_steps_has_the_measured_numbers():
    models = {"digit-sudoku-4x4": "1 step", "digit-sudoku-9x9": "2 steps", "counting-polygons-small": "1 step"}
    results = [measured(f"steps-{model}.json") for model in models]
    assert [each["iterations"] for each in results] == [20] * 3
    arms = {
        "one pass": "one pass",
        "20 iterations by the published schedule": "the model's schedule",
        "20 iterations of one call, of two on 9x9 boards, and a sweep": "{}, then a sweep of 10",
    }
    for words, name in arms.items():
        cells = []
        for each, coarse in zip(results, models.values(), strict=True):
            row = {row["name"]: row for row in each["steps"]}[name.format(coarse)]
            cells.append(f"{100 * row['share'][0]:.1f} %, {row['calls']:,.0f} calls")
        assert f"| {' | '.join([words, *cells])} |" in (ROOT / "README.md").read_text()


def test_the_words_on_steps_of_even_pixels_are_the_measured_ones():
    rows = {row["name"]: row["means"] for row in measured("steps-even-pixels.json")["steps"]}
    before, coarse, swept = (
        f"{rows[name]['saturation_std'][0]:.3g}" for name in ("one pass", "3 steps", "3 steps, then a sweep of 10")
    )
    words = text("ipr_fast/evaluation")
    assert f"saturation within an image from {float(before):.2g} to {coarse}" in words
    assert f"leaves it at {swept}" in words


@pytest.mark.parametrize("model", ["digit-sudoku-4x4", "digit-sudoku-9x9", "counting-polygons-small"])
def test_the_tables_of_steps_are_the_committed_ones(model):
    results = measured(f"steps-{model}.json")
    assert results["model"] == model
    assert report(results) in text("ipr_fast/evaluation")


def test_the_words_on_diversity_are_the_committed_ones():
    assert report(measured("diversity-digit-sudoku-4x4.json")) in text("ipr_fast/evaluation")


def test_the_table_of_initialisations_is_the_committed_one():
    assert report(measured("initialisation.json")) in text("ipr_fast/training")


def test_the_results_of_experiments_are_those_of_their_reports():
    """What `ipr-fast report $(ls -r bench/results/scale/*.json) --readme README.md` writes, and of the folder's own."""
    summaries = [read_summary(path) for path in sorted(SCALE.glob("*.json"), reverse=True)]
    names = {summary["experiment"] for summary in summaries}
    assert {path.stem for path in SCALE.glob("*.json")} == names <= set(plan_names())
    assert len(names) >= 7
    assert f"<!-- results -->\n{results_section(summaries)}\n<!-- /results -->" in text(".")
    for summary in summaries:
        name = summary["experiment"]
        assert f"<!-- {name} -->\n{summary_markdown(summary)}\n<!-- /{name} -->" in text(SCALE)
        assert f"ipr-fast evaluate {name} --count {summary['samples']} --out " in text(SCALE)
        assert (SCALE / f"{name}-iterations.png").exists()
        assert summary["shards"][0] == summary["shards"][1]
        assert summary["seeds"] == [0, 1, 2, 3, 4]
        assert summary["outside_engine"] <= 0.03


def test_the_results_of_bench_are_made_of_the_committed_measurements():
    from report import readme_section
    from support import records

    measurements = [records.read(path) for path in sorted(RESULTS.glob("bench-*.json"))]
    assert measurements
    assert f"<!-- performance -->\n{readme_section(measurements)}\n<!-- /performance -->" in text("bench")
    assert all(each.environment["sizes"] != "smoke" for each in measurements)
    ours = [record for each in measurements for record in each.of("baselines")]
    even_pixels = next(r for r in ours if r.facts["subject"] == "Even Pixels" and "one at a time" in r.facts["against"])
    assert even_pixels.facts["batch"] == 8
    assert even_pixels.ratio("one at a time")[1] >= 4


def test_the_table_of_idle_lanes_is_the_committed_one():
    import waves

    results = measured("waves.json")
    assert waves.report(results) in text("ipr_fast/engine")
    assert waves.count() == results["idle"]
    assert all(row["idle"][2] < 0.05 for row in results["idle"])
    assert all(row["ratio"][0] > 1.1 for row in results["timed"])


def test_the_table_of_chains_at_a_time_is_the_committed_one():
    import lanes

    assert lanes.report(measured("lanes.json")) in text("ipr_fast/engine")


def test_the_cost_of_acceptance_is_the_committed_one():
    import acceptance

    results = measured("acceptance.json")
    assert acceptance.report(results) in text("ipr_fast/sampling")
    assert all(row["share"][1] <= 0.02 for row in results["rows"])


def test_the_table_of_tokens_is_the_committed_one():
    import tokens

    results = measured("tokens.json")
    assert tokens.report(results) in text("bench")
    faster = {(row["ids"], row["case"], row["chains"]): row["faster"]["batched"][1] for row in results["rows"]}
    assert set(faster) == {
        (name, case.name, chains)
        for name, subject in tokens.SUBJECTS.items()
        for case in tokens.CASES
        for chains in subject.chains
        if chains <= case.most_chains
    }
    assert all(faster["50,258", case.name, 16] >= 4 for case in tokens.CASES)


def test_the_table_of_presets_is_what_they_are():
    for name, config in ipr_fast.models.PRESETS.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in ipr_fast.models.SRMUNet(config).parameters())
        patches = (config.image_size // config.patch_size) ** 2
        sample = f"{config.channels}x{config.image_size}x{config.image_size}"
        generate, refine = ipr_fast.Schedule(*config.generate_schedule), ipr_fast.Schedule(*config.refine_schedule)
        calls = f"{generate.steps(patches)} + 50 x {refine.steps(patches // 4)}"
        row = rf"\| `{name}` \| {sample} \| {patches} \| {parameters:,} \| [\d.]+ \| {re.escape(calls)} \|"
        assert re.search(row, text("ipr_fast/models"))
