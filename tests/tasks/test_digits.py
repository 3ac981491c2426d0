import gzip
import re
import struct

import numpy as np
import pytest
import torch

from ipr_fast.tasks.digits import DigitReader, Digits, jittered, load_digits


def write_idx(path, array, *, compress=False):
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if compress else data)


def test_the_splits_are_apart_and_complete():
    train, test = load_digits("train"), load_digits("test")
    assert len(train.images) + len(test.images) == 1797
    assert train.size == test.size == 8
    assert train.images.min() == -1
    assert train.images.max() == 1
    assert (train.labels.bincount() > 100).all()
    assert (test.labels.bincount() > 30).all()
    assert torch.cdist(test.images.flatten(1), train.images.flatten(1)).min() > 0


def test_drawing_gives_images_of_the_label_and_every_one_of_them():
    digits, labels = load_digits("train"), torch.randint(0, 10, (5000,))
    drawn = digits.draw(labels, torch.Generator().manual_seed(0)).flatten(1)
    nearest = torch.cdist(drawn, digits.images.flatten(1)).argmin(1)
    assert torch.equal(digits.labels[nearest], labels)
    assert nearest.unique().numel() > 0.95 * len(digits.images)


def test_drawing_picks_an_image_of_the_label_by_a_uniform_number():
    """In the order of the data, so that a seed keeps drawing the same images."""
    digits, labels = load_digits("train"), torch.arange(60).reshape(3, 20) % 10
    drawn = digits.draw(labels, torch.Generator().manual_seed(4))
    share = torch.rand(3, 20, generator=torch.Generator().manual_seed(4))
    assert drawn.shape == (3, 20, 8, 8)
    for image, label, u in zip(drawn.flatten(0, 1), labels.flatten(), share.flatten(), strict=True):
        same = digits.images[digits.labels == label]
        assert torch.equal(image, same[int(u * len(same))])


def test_the_reader_reads_held_out_digits():
    reader = DigitReader(load_digits("train"))
    assert reader.accuracy(load_digits("train")) == 1.0
    assert reader.accuracy(load_digits("test")) > 0.985


def test_the_reader_keeps_leading_dimensions_and_reads_nothing():
    train = load_digits("train")
    reader = DigitReader(train)
    assert torch.equal(reader.read(train.images[:12].reshape(3, 4, 8, 8)), train.labels[:12].reshape(3, 4))
    assert reader.read(torch.zeros(0, 2, 8, 8)).shape == (0, 2)


def test_the_reader_reads_where_the_images_are():
    """On the meta device, for lack of a second one; the reader moves there, so it is not used again."""
    read = DigitReader(load_digits("train")).read(torch.empty(3, 2, 8, 8, device="meta"))
    assert read.device.type == "meta"
    assert read.shape == (3, 2)
    assert read.dtype == torch.int64


def test_jittered_digits_can_be_read(generator):
    train = load_digits("train")
    images = jittered(train.images.repeat(8, 1, 1), generator)
    assert (DigitReader(train).read(images) == train.labels.repeat(8)).double().mean() >= 0.999


def test_jitter_keeps_shape_type_range_and_its_input(generator):
    images = load_digits("train").images[:240].reshape(2, 4, 30, 8, 8)
    kept = images.clone()
    made = jittered(images, generator)
    assert made.shape == images.shape
    assert made.dtype == torch.float32
    assert torch.equal(images, kept)
    assert jittered(images[0, 0, 0], generator).shape == (8, 8)
    for extreme in (images, torch.ones(500, 8, 8), torch.ones(100, 28, 28)):
        made = jittered(extreme, generator)
        assert made.min() >= -1
        assert made.max() <= 1


def test_jittering_no_images_gives_none(generator):
    assert jittered(torch.zeros(0, 3, 8, 8), generator).shape == (0, 3, 8, 8)


def test_jitter_follows_the_generator():
    images = load_digits("train").images[:50]
    draw = [jittered(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_each_image_is_jittered_in_its_own_way(generator):
    images = load_digits("train").images[:1].expand(300, 8, 8)
    made = jittered(images, generator).flatten(1)
    assert len(made.unique(dim=0)) == 300
    assert (made != images.flatten(1)).any(1).all()


def test_a_blank_image_stays_blank(generator):
    blank = torch.full((20, 8, 8), -1.0)
    assert torch.equal(jittered(blank, generator), blank)


def test_jitter_shifts_by_its_largest_shift_and_no_more():
    """The centre of mass of a blob in 28x28 pixels moves uniformly by up to 0.025 * 28 = 0.7 pixels each way.

    The mean of 2,000 uniform shifts has standard deviation 0.7 / sqrt(3 * 2000); five of them are allowed.
    """
    place = torch.arange(28) - 13.5
    blob = 2 * torch.exp(-(place[:, None] ** 2 + place**2) / 18) - 1
    made = jittered(blob.expand(2000, 28, 28), torch.Generator().manual_seed(0)) + 1
    mass = made.sum((1, 2))
    for shift in ((made.sum(1) * place).sum(1) / mass, (made.sum(2) * place).sum(1) / mass):
        assert shift.abs().max() == pytest.approx(0.7, rel=0.1)
        assert shift.mean().abs() < 5 * 0.7 / 6000**0.5


@pytest.mark.parametrize("compress", [False, True])
def test_mnists_original_files(tmp_path, compress):
    rng, end = np.random.default_rng(0), ".gz" if compress else ""
    images, labels = rng.integers(0, 256, (30, 28, 28)), np.arange(30) % 10
    for stem in ("train", "t10k"):
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte{end}", images, compress=compress)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte{end}", labels, compress=compress)
    for split in ("train", "test"):
        digits = load_digits(split, tmp_path)
        assert digits.images.shape == (30, 28, 28)
        assert torch.allclose((digits.images + 1) * 127.5, torch.from_numpy(images).float(), atol=1e-4)
        assert digits.labels.tolist() == labels.tolist()


def test_broken_mnist_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no MNIST file train-images-idx3-ubyte"):
        load_digits("train", tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    write_idx(images, np.zeros((4, 28, 28)))
    write_idx(labels, np.zeros(5))
    with pytest.raises(ValueError, match=r"images \(4, 28, 28\) and labels \(5,\) do not fit"):
        load_digits("train", tmp_path)
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"idx3-ubyte: 3135 bytes of data, the header says 3136"):
        load_digits("train", tmp_path)
    images.write_bytes(b"hello")
    with pytest.raises(ValueError, match="not an IDX file of 3-dimensional bytes"):
        load_digits("train", tmp_path)
    images.unlink()
    compressed = gzip.compress(bytes(range(256)))
    for damaged in (b"hello", compressed[:10] + b"\xff" * 50 + compressed[60:]):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable gzip file"):
            load_digits("train", tmp_path)


@pytest.mark.parametrize("labels", [[], [0, 1, 2, 3, 4, 5, 6, 7, 8], list(range(11))])
def test_mnist_files_have_all_digits_and_no_others(tmp_path, labels):
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((len(labels), 28, 28)))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.array(labels))
    problem = f"MNIST files in {tmp_path}: t10k labels must be 0 to 9, each at least once, got {labels}"
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        load_digits("test", tmp_path)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        load_digits("validation")


def test_digits_move_between_devices():
    digits = Digits(torch.zeros(2, 8, 8), torch.tensor([0, 1]))
    assert digits.to("cpu").images.device.type == "cpu"
