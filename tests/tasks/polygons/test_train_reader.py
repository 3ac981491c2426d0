"""Training the reader: its crops' classes, a short run of the command, and the package's file."""

import json

import torch
from safetensors import safe_open

from ipr_fast.tasks.polygons import train_reader
from ipr_fast.tasks.polygons.backgrounds import paintings
from ipr_fast.tasks.polygons.drawing import SIDE, compose, coverage
from ipr_fast.tasks.polygons.objects import find_objects
from ipr_fast.tasks.polygons.reader import OTHER, POLYGONS, WEIGHTS, ObjectReader, bundled_reader
from ipr_fast.tasks.polygons.train_reader import (
    IGNORED,
    classes_of,
    draw_crops,
    main,
    mixed_scenes,
    true_counts,
    worn_images,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_whole_objects_have_their_classes():
    generator = seeded(0)
    scene = mixed_scenes(40, generator)
    found = find_objects(compose(coverage(scene), paintings(SIDE, 40, generator)))
    classes = classes_of(found, scene, torch.zeros_like(scene.radii))
    counts = torch.stack([each[each != IGNORED].bincount(minlength=OTHER + 1) for each in classes])
    assert (counts == true_counts(scene)).all(1).float().mean() > 0.9
    assert (counts - true_counts(scene)).abs().sum() < 0.02 * true_counts(scene).sum()


def test_cut_objects_have_none():
    scene = mixed_scenes(20, seeded(1))
    found = find_objects(compose(coverage(scene), paintings(SIDE, 20, seeded(2))))
    cut = classes_of(found, scene, torch.full_like(scene.radii, 0.5))
    assert (cut[found.there] == OTHER).all()
    unclear = classes_of(found, scene, torch.full_like(scene.radii, 0.1))
    assert (unclear[found.there] == IGNORED).float().mean() > 0.95


def test_worn_images_say_what_was_lost():
    images, scene, lost = worn_images(mixed_scenes(64, seeded(3)), seeded(4))
    assert images.shape == (64, 3, SIDE, SIDE)
    assert lost.shape == scene.radii.shape
    assert lost.min() >= 0
    assert lost.max() <= 1
    assert ((lost > 0).sum(1) <= 1).all()
    assert 0.05 < (lost > train_reader.LOST).any(1).float().mean() < train_reader.CUT + 0.2


def test_crops_are_of_all_classes():
    crops = draw_crops(128, seeded(5))
    counts = crops.classes.bincount(minlength=OTHER + 1)
    assert len(counts) == OTHER + 1
    assert counts.min() > 0
    assert len(crops.crops) == len(crops.sides) == len(crops.classes)
    assert counts[:POLYGONS].sum() > counts[POLYGONS:OTHER].sum()


def test_the_packages_reader_reads_worn_crops():
    """Some classes of worn crops are wrong or a matter of taste: a cut of 16 %, noise that hides a corner."""
    crops = draw_crops(128, seeded(6))
    right = bundled_reader(torch.device("cpu"))(crops.crops, crops.sides).argmax(1) == crops.classes
    assert right.float().mean() > 0.97


def test_a_short_run_learns_and_is_reproducible(tmp_path, monkeypatch, capsys):
    for name, value in {"IMAGES": 64, "BATCH": 32, "EPOCHS": 30, "HELD_OUT": 4, "HELD_OUT_NOISY": 2}.items():
        monkeypatch.setattr(train_reader, name, value)
    files = [tmp_path / name for name in ("one.safetensors", "two.safetensors")]
    for file in files:
        main(str(file))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "trained" in capsys.readouterr().out
    with safe_open(files[0], "pt") as file:
        assert json.loads(file.metadata()["measured"])["held_out"]["images"] == 4
        reader = ObjectReader()
        reader.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    crops = draw_crops(32, seeded(7))
    right = reader.eval()(crops.crops, crops.sides).argmax(1) == crops.classes
    assert right.float().mean() > 0.3  # of 15 classes


def test_the_packages_file_is_small_and_says_its_accuracy():
    assert WEIGHTS.stat().st_size < 2**20
    with safe_open(WEIGHTS, "pt") as file:
        measured = json.loads(file.metadata()["measured"])
    for found in (measured["held_out"], measured["noisy"]):
        assert set(found) == {"images", "verdicts", "exact", "false_good", "false_bad"}
        assert 0.98 < found["verdicts"] <= 1
