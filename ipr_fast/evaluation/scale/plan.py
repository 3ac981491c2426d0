"""Plans of experiments: task, model, samples, seeds, arms and comparisons, as TOML files in experiments/."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ipr_fast import checks
from ipr_fast.evaluation.arms import Arm
from ipr_fast.evaluation.report import SHOWN_ITERATIONS
from ipr_fast.tasks.catalog import DIGIT_SUDOKU, TASKS, TOKEN_SUDOKU
from ipr_fast.tasks.counting_polygons import CountingPolygons

FOLDER = Path(__file__).parent / "experiments"
MOST_CHAINS, MOST_SEED = 2**32, 2**31
MOST_SHARDS = 2**20  # files in the folder of a run
ARM_FIELDS = [field.name for field in fields(Arm) if field.name != "name"]


@dataclass(frozen=True)
class Comparison:
    """Compares an arm's last samples, chain by chain, with those of another arm, or with its own start (None)."""

    arm: str
    rival: str | None = None


@dataclass(frozen=True)
class Plan:
    """An experiment: `samples` chains for each of `seeds`, on which every arm is run.

    batch: chains of a shard. model: a bundled name, a file or a hub id; config: the preset of a published checkpoint.
    mnist: folder of MNIST's files, for boards of 28x28 cells. clues: given cells a board, in digit images that no model
    has seen; each board's number is uniform in clues[0]..clues[1]. classifier: folder of the benchmark's classifier of
    polygons, which then judges. recorded: iterations after which samples are judged,
    beside 0 and an arm's last. kept: chains of each seed whose samples are stored.
    """

    name: str
    title: str
    task: str
    model: str
    samples: int
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    batch: int = 256
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    clues: tuple[int, int] = (0, 0)
    recorded: tuple[int, ...] = SHOWN_ITERATIONS
    kept: int = 64
    config: str | None = None
    mnist: str | None = None
    classifier: str | None = None

    def __post_init__(self) -> None:
        checks.integer("samples", self.samples, 1, MOST_CHAINS)
        checks.integer("batch", self.batch, 1)
        checks.integer("kept", self.kept, 0)
        for seed in _listed("seeds", self.seeds):
            checks.integer("seeds", seed, 0, MOST_SEED - 1)
        for field in ("title", "mnist", "classifier"):
            if not isinstance(getattr(self, field), str if field == "title" else str | None):
                raise ValueError(f"{field} must be text, got {getattr(self, field)!r}")
        if self.classifier is not None and self.task != CountingPolygons.name:
            raise ValueError(f"classifier: {self.task} has none")
        for field in ("recorded", "clues"):
            for value in _listed(field, getattr(self, field)):
                checks.integer(field, value, 0)
        if len(self.clues) != 2 or self.clues[0] > self.clues[1]:
            raise ValueError(f"clues must be [LOW, HIGH] with LOW <= HIGH, got {list(self.clues)}")
        names = [arm.name for arm in self.arms]
        if not names or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"there must be arms, and seeds that differ, got {names} and {list(self.seeds)}")
        most = MOST_SHARDS // len(self.seeds) * self.batch
        if self.samples > most:
            raise ValueError(
                f"samples must be at most {most} for each of {len(self.seeds)} seeds with batch {self.batch}, "
                f"got {self.samples}: a run has at most {MOST_SHARDS} shards"
            )
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        for arm in self.arms:
            if arm.policy == "violating" and self.task not in (*DIGIT_SUDOKU, *TOKEN_SUDOKU):
                raise ValueError(f"arm {arm.name}: policy violating: {self.task} has no violating_cells")
        for each in self.comparisons:
            for name in (each.arm, each.rival):
                if name not in (*names, None):
                    raise ValueError(f"compare: there is no arm {name!r}; the arms are {', '.join(names)}")

    def iterations(self, arm: Arm) -> list[int]:
        """Return the iterations that are recorded of an arm, ascending from 0."""
        return sorted({0, arm.iterations, *(r for r in self.recorded if r < arm.iterations)})

    def arm(self, name: str) -> Arm:
        """Return the arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Make a plan of what `to_dict` returned, read from JSON. Raises ValueError, KeyError or TypeError."""
        lists = {name: tuple(values[name]) for name in ("seeds", "clues", "recorded")}
        arms = tuple(Arm(**arm) for arm in values["arms"])
        comparisons = tuple(Comparison(**each) for each in values["comparisons"])
        return cls(**{**values, **lists, "arms": arms, "comparisons": comparisons})

    def changed(self, **values: Any) -> Plan:
        """Return the plan with the values that are not None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


def plan_names() -> list[str]:
    """Return the names of the experiments that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_plan(source: str) -> Plan:
    """Read an experiment of the package by its name, or one's own TOML file. Raises ValueError that names the problem.

    A table `[arms."NAME"]` holds an arm's fields; `[[compare]]` has `arm` and `with`, left out for the arm's own start.
    Without `compare`, an arm is compared with its own start, and one without iterations with the first arm.
    """
    path = FOLDER / f"{source}.toml" if source in plan_names() else Path(source)
    if path.suffix != ".toml":
        raise ValueError(f"experiment must be one of {', '.join(plan_names())}, or a .toml file, got {source!r}")
    try:
        values = tomllib.loads(path.read_text())
        return _plan(path.stem, values)
    except OSError as error:
        raise ValueError(f"experiment {source}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:  # TOMLDecodeError is a ValueError
        missing = "there is no " if isinstance(error, KeyError) else ""
        raise ValueError(f"experiment {source}: {missing}{error}") from error


def _listed(name: str, value: object) -> tuple:
    if not isinstance(value, tuple):
        raise ValueError(f"{name} must be a list, got {value!r}")
    return value


def _plan(name: str, values: dict[str, Any]) -> Plan:
    known = [field.name for field in fields(Plan) if field.name not in ("name", "arms", "comparisons")]
    if unknown := sorted(set(values) - {*known, "arms", "compare"}):
        raise ValueError(f"a plan has no {', '.join(unknown)}; it has {', '.join(known)}, arms, compare")
    if missing := [each for each in ("title", "task", "model", "samples", "arms") if each not in values]:
        raise ValueError(f"there is no {', '.join(missing)}")
    listed, compared = values.pop("arms"), values.pop("compare", None)
    if not isinstance(listed, dict) or not all(isinstance(each, dict) for each in listed.values()):
        raise ValueError(f'arms must be tables [arms."NAME"], got {listed!r}')
    if compared is not None and not (
        isinstance(compared, list)
        and all(
            isinstance(each, dict) and isinstance(each.get("arm"), str) and not set(each) - {"arm", "with"}
            for each in compared
        )
    ):
        raise ValueError(f"compare must be tables [[compare]] with arm and, optionally, with, got {compared!r}")
    arms = []
    for arm, settings in listed.items():
        unknown = sorted(set(settings) - set(ARM_FIELDS))
        if unknown:
            raise ValueError(f"arm {arm} has no {', '.join(unknown)}; an arm has {', '.join(ARM_FIELDS)}")
        arms.append(Arm(name=arm, **settings))
    if compared is None:
        own = [Comparison(arm.name) if arm.iterations else Comparison(arm.name, arms[0].name) for arm in arms]
        comparisons = tuple(each for each in own if each.arm != each.rival)
    else:
        comparisons = tuple(dict.fromkeys(Comparison(each["arm"], each.get("with")) for each in compared))
    lists: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Plan(name=name, arms=tuple(arms), comparisons=comparisons, **lists)
