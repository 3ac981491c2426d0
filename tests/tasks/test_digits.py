import gzip
import struct

import numpy as np
import pytest
import torch

from ipr_fast.tasks.digits import DigitReader, Digits, load_digits


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


def test_the_reader_reads_held_out_digits():
    reader = DigitReader(load_digits("train"))
    assert reader.accuracy(load_digits("train")) == 1.0
    assert reader.accuracy(load_digits("test")) > 0.985


def test_the_reader_keeps_leading_dimensions_and_reads_nothing():
    train = load_digits("train")
    reader = DigitReader(train)
    assert torch.equal(reader.read(train.images[:12].reshape(3, 4, 8, 8)), train.labels[:12].reshape(3, 4))
    assert reader.read(torch.zeros(0, 2, 8, 8)).shape == (0, 2)


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
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"hello")
    with pytest.raises(ValueError, match="not a readable gzip file"):
        load_digits("train", tmp_path)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        load_digits("validation")


def test_digits_move_between_devices():
    digits = Digits(torch.zeros(2, 8, 8), torch.tensor([0, 1]))
    assert digits.to("cpu").images.device.type == "cpu"
