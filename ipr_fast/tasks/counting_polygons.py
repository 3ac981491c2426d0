"""Counting Polygons: images of equal polygons, and two digits that say how many there are and of how many vertices.

Task and metrics of Wewer et al. 2025, "Spatial Reasoning with Denoising Models" (their package srmbench): 128x128 RGB
images of 1 to 9 polygons with 3 to 7 vertices over a photograph, everything in the hue that the photograph has least.
The digits' order is random, so their order says nothing. See polygons/ for how images are drawn and read.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ipr_fast import checks
from ipr_fast.sampling.patches import PatchGrid
from ipr_fast.tasks.polygons.backgrounds import PLAIN, backgrounds_from, grey
from ipr_fast.tasks.polygons.classifier import load_classifier
from ipr_fast.tasks.polygons.drawing import (
    FEWEST_VERTICES,
    LARGEST,
    MOST_POLYGONS,
    MOST_VERTICES,
    SIDE,
    WINDOW,
    Scene,
    compose,
    coverage,
    draw_scenes,
    draw_scenes_in_cells,
    object_circles,
)
from ipr_fast.tasks.polygons.glyphs import STROKE
from ipr_fast.tasks.polygons.objects import find_objects, side_of
from ipr_fast.tasks.polygons.reader import DIGITS, OTHER, POLYGONS, ObjectReader, bundled_reader, held_out_accuracy

AT_A_TIME = 64  # images that are judged at once
LARGEST_SIDE = side_of(2 * LARGEST * SIDE + 2)  # of what the crop of an object shows; blurred edges add a pixel each


class PolygonsReport(NamedTuple):
    """What is seen in each image, and the benchmark's two metrics.

    numbers_match  (B,) bool: there are two digits, the number of polygons and that of their vertices, in either order
    uniform        (B,) bool: there are polygons, all with equally many vertices
    polygons       (B,) int64: number of polygons
    vertices       (B,) int64: vertices of most polygons (the fewest of equals), 0 without polygons
    numbers        (B, 2) int64: the two digits, the smaller first; 0 unless there are exactly two
    mismatch       (B,) int64: sum of the digits' distances from the numbers, in the better order; 9 without two digits
    odd_polygons   (B,) int64: polygons with other numbers of vertices than most
    strays         (B,) int64: objects that are neither polygon nor digit, or larger than any
    """

    numbers_match: Tensor
    uniform: Tensor
    polygons: Tensor
    vertices: Tensor
    numbers: Tensor
    mismatch: Tensor
    odd_polygons: Tensor
    strays: Tensor

    @property
    def good(self) -> Tensor:
        return self.numbers_match & self.uniform

    def measures(self) -> dict[str, Tensor]:
        return {
            "mismatch": self.mismatch,
            "wrong_numbers": (~self.numbers_match).long(),
            "mixed_vertices": (~self.uniform).long(),
            "odd_polygons": self.odd_polygons,
            "strays": self.strays,
        }


class CountingPolygons:
    """The task of Counting Polygons.

    backgrounds: a folder of pictures, such as FFHQ's; "plain" for one colour each; None for paintings.
    classifier: the folder of the benchmark's own classifier, which then judges; None for a reader of the package.

    As a `SymbolTask` it knows what each patch shows: a polygon of so many vertices, a digit, or background.
    """

    name, noun, adjective = "counting-polygons", "image", "consistent"
    num_symbols = OTHER + 1
    side, patch, most_polygons = SIDE, 8, MOST_POLYGONS
    stroke = STROKE  # half the thickness of the digits' strokes, in em

    def __init__(self, backgrounds: str | None = None, classifier: str | None = None) -> None:
        if backgrounds != PLAIN:
            checks.folder("backgrounds", backgrounds)
        checks.folder("classifier", classifier)
        self.name = CountingPolygons.name + {None: "", PLAIN: "-plain"}.get(backgrounds, "-pictures")
        self.grid = PatchGrid(3, self.side, self.side, self.patch)
        self._backgrounds = backgrounds_from(backgrounds, SIDE)
        self._classifier = classifier

    def sample(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw consistent images (B, 3, side, side) in [-1, 1], on the generator's device."""
        return self.sample_with_scenes(batch_size, generator)[0]

    def sample_with_scenes(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Scene]:
        """Draw the images of `sample`, and what they show."""
        scene = self.sample_scenes(batch_size, generator)
        return self.draw(scene, generator), scene

    def sample_scenes(self, batch_size: int, generator: torch.Generator) -> Scene:
        """Draw what images show, but not the images."""
        checks.integer("batch_size", batch_size, 0)
        device = generator.device
        polygons = torch.randint(1, self.most_polygons + 1, (batch_size,), generator=generator, device=device)
        vertices = torch.randint(
            FEWEST_VERTICES, MOST_VERTICES + 1, (batch_size, 1), generator=generator, device=device
        )
        return self._scenes(polygons, vertices.expand(-1, self.most_polygons), generator)

    def _scenes(self, polygons: Tensor, vertices: Tensor, generator: torch.Generator) -> Scene:
        return draw_scenes(polygons, vertices, generator)

    def sample_with_symbols(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the images of `sample`, and what each patch shows (B, N) int64: a class of polygons/reader.py."""
        images, scene = self.sample_with_scenes(batch_size, generator)
        return images, self.symbols_of(scene)

    def symbols_of(self, scene: Scene) -> Tensor:
        """Return the class of the object whose circle comes nearest to the middle of each patch: (B, N) int64.

        OTHER, which is background here, where every circle ends more than a quarter patch before the middle.
        """
        middles, radii = object_circles(scene)
        step = self.patch * (torch.arange(self.grid.grid_w, device=radii.device) + 0.5)
        places = torch.cartesian_prod(step, step).flip(1).expand(len(radii), -1, -1)  # (B, N, 2) as (x, y)
        beyond = torch.cdist(places, middles) - radii[:, None]
        beyond = torch.where(radii[:, None] > 0, beyond, torch.inf)
        nearest = beyond.min(2)
        classes = torch.cat([POLYGONS + scene.numbers - 1, scene.vertices - FEWEST_VERTICES], dim=1)
        return torch.where(nearest.values < self.patch / 4, classes.gather(1, nearest.indices), OTHER)

    def draw(self, scene: Scene, generator: torch.Generator) -> Tensor:
        """Draw scenes over backgrounds: (B, 3, side, side) in [-1, 1]."""
        covered = coverage(scene, self.stroke)[:, : self.side, : self.side]
        return compose(covered, self._backgrounds(len(scene.numbers), generator))

    def judge(self) -> PolygonsJudge | ClassifierJudge:
        """Return a judge of images."""
        return PolygonsJudge() if self._classifier is None else ClassifierJudge(self._classifier)


class CountingPolygonsSmall(CountingPolygons):
    """Counting Polygons for small models: 96x96 images of 1 to 4 polygons of one size, cyan over grey.

    Polygons and digits lie in the middles of 4x4 cells, each of four patches, and all images have the same colours
    (beside grey the rarest hue is cyan). So a processor trains a model for it in minutes. What the digits say and the
    judge are the same: neither cells, size nor colours are judged.
    """

    name = f"{CountingPolygons.name}-small"
    side, patch, most_polygons = 96, 12, 4
    cells, radius, em, stroke = 4, 10.0, 24.0, 0.055

    def __init__(self) -> None:
        super().__init__()
        self.name = CountingPolygonsSmall.name
        self._backgrounds = partial(grey, self.side)

    def _scenes(self, polygons: Tensor, vertices: Tensor, generator: torch.Generator) -> Scene:
        return draw_scenes_in_cells(polygons, vertices, generator, self.cells, self.radius, self.em)


class PolygonsJudge:
    """Judges images by the objects that a small network reads in them.

    reader: by default the package's. Images (B, 3, H, W), of any size that holds objects as large as in 128x128.
    """

    def __init__(self, reader: ObjectReader | None = None) -> None:
        self._reader = reader

    @property
    def note(self) -> str:
        if self._reader is not None:
            return "judged by a reader of your own"
        held_out = held_out_accuracy()
        right, images = round(held_out["verdicts"] * held_out["images"]), round(held_out["images"])
        return f"judged by a reader whose verdict was right on {right:,} of {images:,} held-out images"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> PolygonsReport:
        """Judge images (B, 3, H, W), clamped to [-1, 1]. Raises ValueError for another shape, and sides below 56."""
        checks.judged(self, images, 3, "H", "W", least=WINDOW)
        reports = [_report(self.count(part)) for part in images.split(AT_A_TIME)]
        return PolygonsReport(*map(torch.cat, zip(*reports, strict=True)))

    def count(self, images: Tensor) -> Tensor:
        """Count the objects of each class in images (B, 3, H, W): (B, 15) int64; see polygons/reader.py."""
        reader = self._reader or bundled_reader(images.device)
        found = find_objects(images)
        logits = reader(found.crops.flatten(0, 1), found.sides.flatten())
        classes = logits.argmax(1).view_as(found.there)
        classes = torch.where(found.sides > LARGEST_SIDE, OTHER, classes)  # such as the whole of a blank image
        counts = torch.zeros(len(images), OTHER + 1, dtype=torch.int64, device=images.device)
        return counts.scatter_add_(1, classes, found.there.long())


class ClassifierJudge:
    """Judges images as the benchmark does, by its own classifier. folder: of the classifier's files.

    It says whether all polygons are alike, not how many are not: of an image that is not uniform, one counts as odd.
    """

    note = "judged by the benchmark's classifier, whose own errors count"

    def __init__(self, folder: str) -> None:
        self._classifier = load_classifier(folder)

    def __call__(self, images: Tensor) -> PolygonsReport:
        """Judge images (B, 3, 128, 128), on their device. Raises ValueError for another shape."""
        checks.judged(self, images, 3, SIDE, SIDE)
        self._classifier.to(images.device)
        parts = [self._classifier.read(part.float()) for part in images.split(AT_A_TIME)]
        polygons, vertices, numbers, uniform = map(torch.cat, zip(*parts, strict=True))
        mismatch = _apart(numbers, torch.stack([polygons, vertices], dim=1))
        odd = (~uniform).long()
        return PolygonsReport(mismatch == 0, uniform, polygons, vertices, numbers, mismatch, odd, torch.zeros_like(odd))


def _apart(numbers: Tensor, said: Tensor) -> Tensor:
    """Return the sum of the distances of pairs of numbers (B, 2), in the better order: (B,)."""
    return torch.minimum((numbers - said).abs().sum(1), (numbers - said.flip(1)).abs().sum(1))


def _report(counts: Tensor) -> PolygonsReport:
    """Make a report of the numbers of objects of each class (B, 15)."""
    of_vertices, of_digits = counts[:, :POLYGONS], counts[:, POLYGONS : POLYGONS + DIGITS]
    polygons = of_vertices.sum(1)
    most = (of_vertices * POLYGONS + torch.arange(POLYGONS - 1, -1, -1, device=counts.device)).argmax(1)
    vertices = torch.where(polygons > 0, most + FEWEST_VERTICES, 0)
    odd = polygons - of_vertices.gather(1, most[:, None])[:, 0]
    value = torch.arange(1, DIGITS + 1, device=counts.device)
    total, two = (of_digits * value).sum(1), of_digits.sum(1) == 2
    larger = ((of_digits > 0) * value).amax(1)
    numbers = torch.stack([total - larger, larger], dim=1) * two[:, None]
    mismatch = torch.where(two, _apart(numbers, torch.stack([polygons, vertices], dim=1)), MOST_POLYGONS)
    uniform = (polygons > 0) & (odd == 0)
    return PolygonsReport(mismatch == 0, uniform, polygons, vertices, numbers, mismatch, odd, counts[:, OTHER])
