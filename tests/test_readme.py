"""The README says what is so: its code runs, its figures are those of the committed measurements."""

import json
import re
from pathlib import Path

import pytest
import torch
import typer

import ipr_fast

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def _checkpoint(tmp_path, monkeypatch):
    """The file that the README loads, in the working directory: in its format, of a preset made small for this test."""
    schedules = {"generate_schedule": (1, 1.0), "refine_schedule": (1, 1.0)}
    small = ipr_fast.models.SRMUNetConfig(1, 18, 2, (32, 32), (False, True), 1, 32, 32, 16, **schedules)
    monkeypatch.setitem(ipr_fast.models.PRESETS, "even_pixels", small)
    weights = ipr_fast.models.SRMUNet(small).state_dict()
    torch.save(
        {"state_dict": {f"ema_denoiser.module.{k}": v for k, v in weights.items()}}, tmp_path / "even_pixels.ckpt"
    )
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_checkpoint")
def test_its_python_runs_as_it_stands():
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
        if "known" in namespace and "model" not in namespace:
            x, refined, known = (namespace[name] for name in ("x", "refined", "known"))
            assert x.shape == refined.shape == (64, 1, 32, 32)
            assert torch.equal(refined[:, :, :8, :8], x[:, :, :8, :8])  # the first cell of every board is known
            assert known[:, 0].all()
    for name in ("refined", "repaired", "same_region", "same_noise", "quiet"):
        assert namespace[name].shape == (4, 1, 18, 18)

    class Network(torch.nn.Module):
        def forward(self, images, level_map):
            return torch.cat([images * level_map, images, level_map], dim=1)

    grid = ipr_fast.PatchGrid(3, 16, 16, 4)
    model = namespace["ImageDenoiser"](Network(), grid)
    assert isinstance(model, ipr_fast.Denoiser)
    runs = [
        ipr_fast.refine_batch(torch.zeros(2, 3, 16, 16), ipr_fast.random_patches(), 2, model=model, backend=backend)
        for backend in ("torch", "reference")
    ]
    torch.testing.assert_close(*runs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("model", "fewest"), [("digit-sudoku-4x4", 2048), ("digit-sudoku-9x9", 128)])
def test_its_results_are_the_committed_ones(model, fewest):
    from ipr_fast.evaluation.report import report

    measured = json.loads((ROOT / f"bench/results/quality-{model}.json").read_text())
    assert measured["model"] == model
    assert report(measured) in README
    assert measured["samples"] >= fewest
    card = (ROOT / f"ipr_fast/models/weights/{model}.md").read_text()
    rows = {row["name"]: row for row in measured["arms"]}
    for name in ("one pass", next(name for name in rows if re.match(r"IPR, alpha 0.25, [2-5]0 iterations", name))):
        assert ipr_fast.evaluation.intervals.Estimate(*rows[name]["share"]).percent() in card


def test_every_bundled_model_has_a_card_and_measured_results():
    for model in ipr_fast.bundled_models():
        assert (ROOT / f"ipr_fast/models/weights/{model}.md").read_text().startswith(f"# {model}\n")
        assert (ROOT / f"bench/results/quality-{model}.json").exists()
        assert f"ipr_fast/models/weights/{model}.md" in README


def test_the_table_of_initialisations_is_the_committed_one():
    from ipr_fast.evaluation.report import report

    measured = json.loads((ROOT / "bench/results/rules.json").read_text())
    assert report(measured) in (ROOT / "ipr_fast" / "training" / "README.md").read_text()


def test_its_section_on_performance_is_made_of_the_committed_measurements():
    import report
    from support import records

    measurements = [records.read(path) for path in sorted((ROOT / "bench/results").glob("bench-*.json"))]
    assert measurements
    assert f"<!-- performance -->\n{report.readme_section(measurements)}\n<!-- /performance -->" in README
    assert all(each.environment["sizes"] != "smoke" for each in measurements)
    ours = [record for each in measurements for record in each.of("baselines")]
    even_pixels = next(r for r in ours if r.facts["subject"] == "Even Pixels" and "one at a time" in r.facts["against"])
    assert even_pixels.facts["batch"] == 8
    assert even_pixels.ratio("one at a time")[1] >= 4


def test_its_table_of_idle_lanes_is_the_committed_one():
    import waves

    measured = json.loads((ROOT / "bench/results/waves.json").read_text())
    assert waves.report(measured) in README
    assert waves.count() == measured["idle"]
    assert all(row["idle"][2] < 0.05 for row in measured["idle"])
    assert all(row["ratio"][0] > 1.1 for row in measured["timed"])


def test_the_engines_table_of_chains_at_a_time_is_the_committed_one():
    import lanes

    measured = json.loads((ROOT / "bench/results/lanes.json").read_text())
    assert lanes.report(measured) in (ROOT / "ipr_fast/engine/README.md").read_text()


FOLDERS = [*sorted(path.parent for path in ROOT.glob("ipr_fast/*/README.md")), ROOT / "kernels", ROOT / "bench"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folders_readme_names_its_files_and_only_those(folder):
    """Every file of the folder, in its table; files of other folders are named with theirs."""
    text = (folder / "README.md").read_text()
    if folder.name == "bench":  # with its own folders
        named = set(re.findall(r"(?<![\w/])`([\w/]+\.py)`", text))
        files = [path for path in folder.rglob("*.py") if path.name != "__init__.py"]
        assert named == {path.relative_to(folder).as_posix() for path in files}
        return
    named = set(re.findall(r"(?<![\w/])`(\w+\.py)`", text))
    there = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert named == there


def test_the_benchmark_in_the_readme_of_bench_runs():
    def measure(check, ours, **facts):
        check().hold()
        assert facts["batch"] == ours.units == len(ours.work())

    namespace = {}
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "bench" / "README.md").read_text(), flags=re.DOTALL)
    exec(compile(block, "bench/README.md", "exec"), namespace)
    namespace["test_mine"](measure, torch.device("cpu"))


def test_its_table_of_presets_is_what_they_are():
    for name, config in ipr_fast.models.PRESETS.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in ipr_fast.models.SRMUNet(config).parameters())
        patches = (config.image_size // config.patch_size) ** 2
        sample = f"{config.channels}x{config.image_size}x{config.image_size}"
        generate, refine = ipr_fast.Schedule(*config.generate_schedule), ipr_fast.Schedule(*config.refine_schedule)
        calls = f"{generate.steps(patches)} + 50 x {refine.steps(patches // 4)}"
        row = rf"\| `{name}` \| {sample} \| {patches} \| {parameters:,} \| [\d.]+ \| {re.escape(calls)} \|"
        assert re.search(row, README)


def test_its_words_on_diversity_are_the_committed_ones():
    from ipr_fast.evaluation.report import report

    measured = json.loads((ROOT / "bench/results/diversity-digit-sudoku-4x4.json").read_text())
    assert report(measured) in README


def test_refinement_is_worth_it_in_the_committed_measurement():
    measured = json.loads((ROOT / "bench/results/quality-digit-sudoku-4x4.json").read_text())
    rows = {row["name"]: row for row in measured["arms"]}
    value, low, _ = rows["IPR, alpha 0.25, 20 iterations"]["gain"]
    assert value >= 0.10
    assert low > 0.05
    curve = measured["good_by_iteration"][:21]
    assert curve[0] < curve[5] < curve[20]
    assert all(later > max(curve[:r]) - 0.01 * measured["samples"] for r, later in enumerate(curve) if r)


def test_ci_runs_its_test_command():
    test_command = next(block for block in blocks("bash") if block.endswith("-m pytest\n")).strip()
    assert test_command in (ROOT / ".ci" / "run").read_text()


def test_its_files_and_links_exist():
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        if target.startswith("#"):
            assert f"## {target[1:].replace('-', ' ').capitalize()}\n" in README, target
        else:
            assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:ipr_fast|bench|profiling)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


def test_its_commands_are_those_of_the_command_line():
    from ipr_fast.cli.main import build_app

    listing = next(block for block in blocks("text") if "ipr-fast train" in block)
    commands = typer.main.get_command(build_app()).commands
    assert re.findall(r"^ipr-fast (\w+)", listing, flags=re.MULTILINE) == list(commands)
    for line in listing.splitlines():
        name, options = line.split()[1], re.findall(r"--[\w-]+", line)
        assert set(options) <= {option for parameter in commands[name].params for option in parameter.opts}
