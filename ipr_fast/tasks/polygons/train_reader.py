"""Trains the reader of objects and measures it on images that it has not seen.

`python -m ipr_fast.tasks.polygons.train_reader reader.safetensors` makes the package's file again: a few minutes of one
processor core. Its crops come from images with polygons of mixed vertices and any two digits, drawn with strokes of
several thicknesses, then worn: noise, blur, other contrast, polygons that overlap, objects with a piece cut off.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from ipr_fast.outputs import replacing
from ipr_fast.tasks.counting_polygons import CountingPolygons, PolygonsJudge
from ipr_fast.tasks.polygons.backgrounds import paintings
from ipr_fast.tasks.polygons.drawing import (
    FEWEST_VERTICES,
    MOST_POLYGONS,
    MOST_VERTICES,
    SIDE,
    Scene,
    compose,
    coverage,
    draw_scenes,
    object_circles,
)
from ipr_fast.tasks.polygons.objects import CROP, Objects, find_objects
from ipr_fast.tasks.polygons.reader import OTHER, POLYGONS, ObjectReader

SEED = 20261126
IMAGES, BATCH = 5120, 64  # images, and those drawn at once
EPOCHS, CROPS_A_STEP, RATE = 10, 256, 2e-3
HELD_OUT, HELD_OUT_NOISY, NOISE = 1024, 256, 0.1
OVERLAPPING, CUT = 0.15, 0.3  # shares of images
KEPT, LOST = 0.04, 0.15  # an object that lost less is itself, one that lost more is none; between, it is left out
WARP = 0.12  # largest change of a crop's affine map
IGNORED = -1  # class of crops that are left out


class Crops(NamedTuple):
    """Crops (M, CROP, CROP), the sides (M,) of what they show in pixels, and their classes (M,)."""

    crops: Tensor
    sides: Tensor
    classes: Tensor


def mixed_scenes(batch_size: int, generator: torch.Generator) -> Scene:
    """Draw scenes whose digits say anything, half of them with polygons of mixed vertices."""

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, (batch_size, *shape), generator=generator, device=generator.device)

    vertices = integers(FEWEST_VERTICES, MOST_VERTICES, MOST_POLYGONS)
    vertices = torch.where(integers(0, 1, 1) == 0, vertices[:, :1], vertices)
    scene = draw_scenes(integers(1, MOST_POLYGONS), vertices, generator)
    return scene._replace(numbers=integers(1, MOST_POLYGONS, 2))


def worn_images(scene: Scene, generator: torch.Generator) -> tuple[Tensor, Scene, Tensor]:
    """Draw scenes with defects: images in [-1, 1], the scene drawn, and the share (B, 11) that each object has lost."""
    batch, device = len(scene.numbers), generator.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator, device=device)

    scene = _with_overlaps(scene, uniform(0, 1), uniform(0, 6.2832), uniform(0.5, 1.05))
    covered = coverage(scene, uniform(0.032, 0.06, 1, 1))
    covered, lost = _with_cuts(scene, covered, uniform(0, 1), uniform(0, 1), uniform(0, 6.2832), uniform(0, 1, 2))
    images = compose(covered * uniform(0.85, 1, 1, 1), paintings(SIDE, batch, generator))
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, uniform(0, 0.8, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.5))
    noise = torch.randn(images.shape, generator=generator, device=device)
    return images + uniform(-0.1, 0.2, 1, 1, 1).clamp(min=0) * noise, scene, lost


def _with_overlaps(scene: Scene, chance: Tensor, angle: Tensor, distance: Tensor) -> Scene:
    """Move the second polygon of some images over the first."""
    centres = scene.centres.clone()
    step = torch.stack([angle.cos(), angle.sin()], dim=1)
    apart = (distance * (scene.radii[:, 2] + scene.radii[:, 3]))[:, None]
    least, most = scene.radii[:, 3, None], SIDE - scene.radii[:, 3, None]
    moved = torch.maximum(torch.minimum(centres[:, 2] + apart * step, most), least)
    centres[:, 3] = torch.where((chance < OVERLAPPING)[:, None], moved, centres[:, 3])
    return scene._replace(centres=centres)


def _with_cuts(
    scene: Scene, covered: Tensor, chance: Tensor, which: Tensor, angle: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Cut a disc off one object of some images. Returns the cover, and the share (B, 11) that each object has lost."""
    middles, radii = object_circles(scene)
    count = 2 + scene.polygons
    chosen = (which * count).long()[:, None]
    middle, radius = middles.gather(1, chosen[..., None].expand(-1, -1, 2))[:, 0], radii.gather(1, chosen)[:, 0]
    step = torch.stack([angle.cos(), angle.sin()], dim=1)
    cut = middle + ((0.4 + 0.7 * size[:, 0]) * radius)[:, None] * step
    pixel = torch.arange(SIDE, device=covered.device) + 0.5

    def inside(centre: Tensor, reach: Tensor) -> Tensor:
        square = (pixel - centre[:, :1])[:, None].square() + (pixel - centre[:, 1:])[:, :, None].square()
        return (reach[:, None, None] - square.sqrt() + 0.5).clamp(0, 1)

    own = inside(middle, radius + 1)
    gone = own * inside(cut, (0.2 + 0.7 * size[:, 1]) * radius) * (chance < CUT)[:, None, None]
    share = (covered * gone).sum((1, 2)) / (covered * own).sum((1, 2)).clamp(min=1)
    return covered * (1 - gone), torch.zeros_like(radii).scatter_(1, chosen, share[:, None])


def classes_of(found: Objects, scene: Scene, lost: Tensor) -> Tensor:
    """Return the class of each object that was found: (B, MOST) int64, IGNORED where it is not clear.

    It is the object of the scene in whose circle its middle lies; none if it has lost a piece, or is larger.
    """
    middles, radii = object_circles(scene)
    apart = torch.cdist(found.middles, middles)
    apart = torch.where(radii[:, None] > 0, apart, 1e6)
    distance, nearest = apart.min(2)
    digit_classes = POLYGONS + scene.numbers - 1
    classes = torch.cat([digit_classes, scene.vertices - FEWEST_VERTICES], dim=1).gather(1, nearest)
    share = lost.gather(1, nearest)
    classes = torch.where((share > KEPT) & (share < LOST), IGNORED, classes)
    other = (share >= LOST) | (distance > 0.5 * radii.gather(1, nearest) + 1)
    area = found.crops.sum((2, 3)) * (found.sides / CROP) ** 2
    half = torch.pi / scene.vertices.clamp(min=FEWEST_VERTICES)
    whole = scene.radii[:, 2:] ** 2 * half.sin() * half.cos() * scene.vertices
    whole = torch.cat([torch.full_like(scene.radii[:, :2], torch.inf), whole], dim=1).gather(1, nearest)
    classes = torch.where(other | (area > 1.2 * whole + 6), OTHER, classes)
    return torch.where(found.there, classes, IGNORED)


def draw_crops(images: int, generator: torch.Generator) -> Crops:
    """Draw worn images and cut their objects out."""
    parts = []
    for _ in range(0, images, BATCH):
        drawn, scene, lost = worn_images(mixed_scenes(BATCH, generator), generator)
        found = find_objects(drawn)
        classes = classes_of(found, scene, lost)
        clear = classes != IGNORED
        parts.append(Crops(found.crops[clear], found.sides[clear], classes[clear]))
    return Crops(*map(torch.cat, zip(*parts, strict=True)))


def batches(crops: Crops, generator: torch.Generator) -> Iterator[Crops]:
    """Yield the crops of one epoch in random order, each slightly turned, sheared, stretched and shifted."""
    order = torch.randperm(len(crops.classes), generator=generator, device=generator.device)
    for chosen in order.split(CROPS_A_STEP):
        part = Crops(*(each[chosen] for each in crops))
        small = WARP * (2 * torch.rand(len(chosen), 2, 3, generator=generator, device=generator.device) - 1)
        grid = F.affine_grid(torch.eye(2, 3, device=small.device) + small, [len(chosen), 1, CROP, CROP], False)
        yield part._replace(crops=F.grid_sample(part.crops[:, None], grid, align_corners=False)[:, 0])


def train_reader(crops: Crops, generator: torch.Generator) -> ObjectReader:
    """Train a reader: AdamW with a one-cycle learning rate."""
    torch.manual_seed(SEED)
    with torch.device("cpu"):
        reader = ObjectReader().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = EPOCHS * -(-len(crops.classes) // CROPS_A_STEP)
    optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for part in batches(crops, generator):
            loss = F.cross_entropy(reader(part.crops, part.sides), part.classes, label_smoothing=0.02)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate.step()
    return reader.eval().requires_grad_(False)


def spoiled(scene: Scene, generator: torch.Generator) -> tuple[Scene, Tensor]:
    """Spoil half of some consistent scenes. Returns them, and whether each is still consistent (B,).

    A spoiled one has one of its two digits changed, that of the polygons or that of the vertices, or one polygon with
    another number of vertices.
    """
    batch, device = len(scene.numbers), generator.device

    def integers(high: int) -> Tensor:
        return torch.randint(high, (batch,), generator=generator, device=device)

    how, other = integers(6), 1 + integers(4)
    numbers, vertices = scene.numbers.clone(), scene.vertices.clone()
    row = torch.arange(batch, device=device)
    numbers[:, 0] = torch.where(how == 0, (numbers[:, 0] - 1 + other) % MOST_POLYGONS + 1, numbers[:, 0])
    turned = (vertices[:, 0] - FEWEST_VERTICES + other) % POLYGONS + FEWEST_VERTICES
    numbers[:, 1] = torch.where(how == 1, turned, numbers[:, 1])
    chosen = torch.where(how == 2, integers(MOST_POLYGONS) % scene.polygons, 0)
    vertices[row, chosen] = torch.where(how == 2, turned, vertices[row, chosen])
    numbers_said = numbers.sort(1).values
    true = torch.stack([scene.polygons, scene.vertices[:, 0]], dim=1)
    alone = scene.polygons == 1  # a single polygon of other vertices is uniform
    seen = torch.where((alone & (how == 2))[:, None], torch.stack([scene.polygons, turned], dim=1), true)
    good = (numbers_said == seen.sort(1).values).all(1) & ((how != 2) | alone)
    return scene._replace(numbers=numbers, vertices=vertices), good


def measure(
    reader: ObjectReader | None,
    images: int,
    generator: torch.Generator,
    noise: float = 0.0,
    task: CountingPolygons | None = None,
) -> dict[str, float]:
    """Measure a reader (None: the package's) on images of a task (None: over paintings) of which half are spoiled.

    Returns the number of images, and the shares of them with the right verdict, with every object read right, and of
    those called good though they are not and not though they are.
    """
    task, judge = task or CountingPolygons(), PolygonsJudge(reader)
    right = exact = false_good = false_bad = 0
    for first in range(0, images, BATCH):
        count = min(BATCH, images - first)
        scene, good = spoiled(task.sample_with_scenes(count, generator)[1], generator)
        drawn = task.draw(scene, generator)
        drawn += noise * torch.randn(drawn.shape, generator=generator, device=drawn.device)
        verdict = judge(drawn).good
        right += int((verdict == good).sum())
        false_good += int((verdict & ~good).sum())
        false_bad += int((~verdict & good).sum())
        exact += int((judge.count(drawn) == true_counts(scene)).all(1).sum())
    shares = {"verdicts": right, "exact": exact, "false_good": false_good, "false_bad": false_bad}
    return {"images": images, **{name: value / images for name, value in shares.items()}}


def true_counts(scene: Scene) -> Tensor:
    """Return the number of objects of each class in scenes: (B, 15) int64."""
    digits = F.one_hot(scene.numbers - 1 + POLYGONS, OTHER + 1).sum(1)
    polygons = F.one_hot((scene.vertices - FEWEST_VERTICES).clamp(min=0), OTHER + 1) * (scene.vertices > 0)[..., None]
    return digits + polygons.sum(1)


def main(path: str) -> None:
    """Train a reader, measure it, and write its weights with the measurements in the file's metadata."""
    generator, since = torch.Generator("cpu").manual_seed(SEED), time.perf_counter()

    def say(words: str) -> None:
        print(f"{time.perf_counter() - since:.0f} s: {words}", flush=True)

    crops = draw_crops(IMAGES, generator)
    say(f"{len(crops.classes)} crops, {crops.classes.bincount().tolist()} of each class")
    reader = train_reader(crops, generator)
    say("trained")
    held_out = measure(reader, HELD_OUT, torch.Generator("cpu").manual_seed(SEED + 1))
    say(f"held out {held_out}")
    noisy = measure(reader, HELD_OUT_NOISY, torch.Generator("cpu").manual_seed(SEED + 2), NOISE)
    say(f"with noise {noisy}")
    metadata = {"measured": json.dumps({"held_out": held_out, "noisy": noisy})}  # one entry: their order varies
    weights = save({name: value.contiguous() for name, value in reader.state_dict().items()}, metadata)
    with replacing(Path(path)) as file:
        file.write(weights)


if __name__ == "__main__":
    main(sys.argv[1])
