import shutil
import struct
import zlib
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from full_disk import full_disk
from unclosed import unclosed

from ipr_fast import load_model, pictures
from ipr_fast.files import Samples, check_writable, read_array, read_samples, write_samples


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_arrays_come_back_bit_for_bit(tmp_path, suffix, dtype):
    images, path = torch.randn(3, 2, 8, 8).to(dtype), tmp_path / "new" / f"x{suffix}"
    write_samples(path, Samples(images))
    again = read_samples(path).images
    assert again.dtype == dtype
    assert torch.equal(again, images)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("channels", [1, 3])
def test_folders_of_png_keep_pixels_and_names(tmp_path, channels):
    images = torch.randint(0, 256, (4, channels, 8, 8)).float() / 127.5 - 1
    names = ("b.png", "d.png", "a.png", "c.png")
    write_samples(tmp_path / "pictures", Samples(images, names))
    again = read_samples(tmp_path / "pictures")
    assert again.names == ("a.png", "b.png", "c.png", "d.png")
    torch.testing.assert_close(again.images, images[[2, 0, 3, 1]], atol=1e-6, rtol=0)


def test_samples_outside_of_the_range_are_cut_in_pictures(tmp_path):
    write_samples(tmp_path / "pictures", Samples(torch.tensor([[[[-3.0, 3.0]]]])))
    assert read_samples(tmp_path / "pictures").images.flatten().tolist() == [-1.0, 1.0]


def test_pictures_with_nan_or_inf_are_left_out(tmp_path):
    images = torch.zeros(4, 1, 2, 2)
    write_samples(tmp_path, Samples(images + 1))
    images[1, 0, 0, 1], images[3, 0, 1, 0] = float("nan"), float("-inf")
    write_samples(tmp_path, Samples(images))
    again = read_samples(tmp_path)
    assert again.names == ("0000.png", "0002.png")
    assert again.images.abs().max() < 0.01  # the new ones


def test_bytes_and_missing_channel(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[[0, 255], [51, 204]]], dtype=np.uint8))
    images = read_samples(tmp_path / "x.npy").images
    assert images.shape == (1, 1, 2, 2)
    torch.testing.assert_close(images.flatten(), torch.tensor([-1.0, 1.0, -0.6, 0.6]))


@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_of_either_byte_order(tmp_path, order):
    array = np.random.default_rng(0).uniform(-1, 1, (2, 1, 4, 4)).astype(f"{order}f4")
    np.save(tmp_path / "x.npy", array)
    assert read_array(tmp_path / "x.npy", "x").tolist() == array.tolist()


def test_npz_by_key_or_alone(tmp_path):
    np.savez(tmp_path / "two.npz", known=np.ones(3, bool), other=np.zeros(2))
    assert read_array(tmp_path / "two.npz", "known").tolist() == [True] * 3
    with pytest.raises(ValueError, match=r"two\.npz: .*holds the arrays .*none of them 'x'"):
        read_array(tmp_path / "two.npz", "x")
    np.savez(tmp_path / "one.npz", anything=np.zeros(2))
    assert read_array(tmp_path / "one.npz", "x").shape == (2,)


def test_bad_files_are_named(tmp_path):
    def refused(path, message):
        with pytest.raises(ValueError, match=rf"(?s){path.name}: .*{message}"):
            read_samples(path)

    refused(tmp_path / "absent.npy", "no such file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no PNG files")
    (tmp_path / "x.jpg").write_bytes(b"")
    refused(tmp_path / "x.jpg", "must end in one of .npy, .npz, .pt")
    for suffix in (".npy", ".npz", ".pt"):
        path = tmp_path / f"garbage{suffix}"
        path.write_bytes(b"not an array")
        refused(path, "not a readable")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    refused(tmp_path / "objects.npy", "not a readable .npy file")
    np.save(tmp_path / "flat.npy", np.zeros(5))
    refused(tmp_path / "flat.npy", r"got shape \(5,\)")
    np.save(tmp_path / "ints.npy", np.zeros((1, 1, 4, 4), dtype=np.int64))
    refused(tmp_path / "ints.npy", "got torch.int64")
    (tmp_path / "empty" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a\.png: not a readable PNG file"):
        read_samples(tmp_path / "empty")


def test_pictures_of_different_sizes_are_refused(tmp_path):
    write_samples(tmp_path / "p", Samples(torch.zeros(1, 1, 4, 4), ("a.png",)))
    write_samples(tmp_path / "q", Samples(torch.zeros(1, 1, 4, 5), ("b.png",)))
    (tmp_path / "q" / "b.png").rename(tmp_path / "p" / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: has the shape \(1, 4, 5\), the folder's first image \(1, 4, 4\)"):
        read_samples(tmp_path / "p")


def test_where_it_cannot_write_it_says_so_beforehand(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for name in ("folder.npy", "file", "x.jpg", "file/x.npy"):
        with pytest.raises(ValueError, match=name):
            check_writable(tmp_path / name, (2, 1, 8, 8))
    with pytest.raises(ValueError, match="PNG files hold 1 or 3 channels, not 4"):
        check_writable(tmp_path / "pictures", (2, 4, 8, 8))
    check_writable(tmp_path / "x.npy", (2, 4, 8, 8))


@pytest.mark.parametrize(("dtype", "takes"), [(torch.float32, 512), (torch.float64, 1024)])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_a_disk_without_room_is_told_beforehand(tmp_path, monkeypatch, suffix, dtype, takes):
    path = tmp_path / "new" / f"x{suffix}"
    monkeypatch.setattr(shutil, "disk_usage", lambda of: SimpleNamespace(free=takes if of == tmp_path else 0))
    check_writable(path, (2, 1, 8, 8), dtype=dtype)
    monkeypatch.setattr(shutil, "disk_usage", lambda of: SimpleNamespace(free=takes - 1))
    with pytest.raises(ValueError, match=rf"x{suffix}: takes {takes:,} bytes, and the disk has room for {takes - 1:,}"):
        check_writable(path, (2, 1, 8, 8), dtype=dtype)


def test_pictures_of_another_run_are_not_left_among_the_new(tmp_path):
    write_samples(tmp_path / "p", Samples(torch.zeros(3, 1, 4, 4)))
    with pytest.raises(ValueError, match=r"holds other PNG files \(0002\.png\)"):
        write_samples(tmp_path / "p", Samples(torch.zeros(2, 1, 4, 4)))
    write_samples(tmp_path / "p", Samples(torch.ones(3, 1, 4, 4)))
    assert (read_samples(tmp_path / "p").images == 1).all()


def test_pictures_of_16_bits_and_of_other_modes(tmp_path):
    from PIL import Image

    grey = np.array([[0, 65535], [13107, 52428]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    expected = torch.tensor([[-1.0, 1.0], [-0.6, 0.6]])
    torch.testing.assert_close(read_samples(tmp_path).images[0, 0], expected, atol=1e-6, rtol=0)
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[..., 1], rgba[..., 3] = 255, 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert read_samples(tmp_path).images[0, :, 0, 0].tolist() == [-1.0, 1.0, -1.0]


def png_of_depth_16(path, colour_type, rows):
    """Write rows (H, W * channels) of 16-bit numbers as PNG, which pillow can for grey alone."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    header = struct.pack(">IIBBBBB", rows.shape[1] // channels, len(rows), 16, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_pictures_of_16_bits_come_back_exactly(tmp_path):
    from PIL import Image

    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    (tmp_path / "a").mkdir()
    png_of_depth_16(tmp_path / "a" / "x.png", 0, grey)
    Image.fromarray((grey >> 8).astype(np.uint8)).save(tmp_path / "a" / "y.png")  # becomes one of 16 bits as well
    samples = read_samples(tmp_path / "a")
    assert samples.depth == 16
    write_samples(tmp_path / "b", samples)
    for name, expected in (("x.png", grey), ("y.png", (grey >> 8) * 257)):
        with Image.open(tmp_path / "b" / name) as image:
            assert image.mode.startswith("I;16")
            assert np.array_equal(np.array(image), expected)


@pytest.mark.parametrize("colour_type", [2, 4, 6])
def test_colours_of_16_bits_are_refused_by_name(tmp_path, colour_type):
    png_of_depth_16(tmp_path / "x.png", colour_type, np.zeros((2, 24), dtype=np.uint16))
    with pytest.raises(ValueError, match=r"x\.png: has 16 bits a channel.*save it with 8 bits"):
        read_samples(tmp_path)


def test_a_folder_may_have_a_number_behind_a_dot(tmp_path):
    for name in ("run_0.25", "run.1e", "run._"):
        write_samples(tmp_path / name, Samples(torch.zeros(1, 1, 4, 4)))
        assert [p.name for p in (tmp_path / name).iterdir()] == ["0000.png"]
    for name in ("x.jpg", "x.png", "x.tiff", "x.NPY", "x_0.25.jpeg"):
        with pytest.raises(ValueError, match=r"must end in one of \.npy, \.npz, \.pt, or be a folder"):
            write_samples(tmp_path / name, Samples(torch.zeros(1, 1, 4, 4)))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_a_full_disk_leaves_the_earlier_samples_whole(tmp_path, suffix):
    path, earlier = tmp_path / f"x{suffix}", torch.randn(2, 1, 4, 4)
    write_samples(path, Samples(earlier))
    with full_disk(1000), pytest.raises(OSError, match=rf"File too large: .*x\{suffix}"):
        write_samples(path, Samples(torch.randn(20, 1, 16, 16)))
    assert torch.equal(read_samples(path).images, earlier)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_pictures_on_a_full_disk_are_whole_or_absent(tmp_path):
    plain, noise = torch.zeros(1, 32, 32), torch.rand(1, 32, 32) * 2 - 1  # PNG makes few bytes of the former
    with full_disk(600), pytest.raises(OSError, match=r"File too large: .*b\.png"):
        write_samples(tmp_path, Samples(torch.stack([plain, noise]), ("a.png", "b.png")))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert read_samples(tmp_path).images.shape == (1, 1, 32, 32)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pt", "pictures"])
def test_reading_leaves_no_file_open(tmp_path, monkeypatch, name):
    write_samples(tmp_path / name, Samples(torch.randn(1, 1, 8, 8)))
    path = tmp_path / name if "." in name else tmp_path / name / "0000.png"
    whole = path.read_bytes()
    with unclosed(monkeypatch) as found:
        for length in (len(whole), len(whole) - 1, len(whole) // 2, 60, 3, 0):
            path.write_bytes(whole[:length])
            with suppress(ValueError):
                read_samples(tmp_path / name)
    assert found == []


# ---------------------------------------------------------------------------------------------- sequences and video


@pytest.mark.parametrize("shape", [(2, 12), (1, 12), (3, 4, 6, 8), (1, 4, 6, 8), (1, 6, 8), (3, 6, 8)])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_samples_of_any_shape_come_back_with_it(tmp_path, shape, suffix):
    x, path = torch.randn(3, *shape), tmp_path / f"x{suffix}"
    write_samples(path, Samples(x))
    assert torch.equal(read_samples(path).fitting("x", shape).images, x)
    if shape[0] == 1:
        write_samples(path, Samples(x.squeeze(1)))  # one channel may be left out
        assert torch.equal(read_samples(path).fitting("x", shape).images, x)


def test_samples_of_another_shape_are_refused_by_the_shape_of_their_file(tmp_path):
    samples = Samples(torch.zeros(2, 3, 4, 4))
    assert samples.fitting("x", (3, 4, 4)) is samples
    for shape in ((3, 5, 4), (4, 4), (1, 4, 4), (3, 4)):
        with pytest.raises(ValueError, match=r"^x must have shape \(B, .*\) to fit the model, got \(2, 3, 4, 4\)"):
            samples.fitting("x", shape)
    np.save(tmp_path / "sequence.npy", np.zeros((2, 2, 96), dtype=np.float32))
    with pytest.raises(ValueError, match=r"^x must have shape \(B, 1, 4, 4, 6\) to fit the model, got \(2, 2, 96\)"):
        read_samples(tmp_path / "sequence.npy").fitting("x", (1, 4, 4, 6))


def test_pictures_of_sequences_are_not_read_as_samples(tmp_path):
    write_samples(tmp_path / "plots", Samples(torch.zeros(1, 2, 12)))
    with pytest.raises(
        ValueError, match=r"^x must be one of .npy, .npz, .pt: PNG files of sequences and video are pictures"
    ):
        read_samples(tmp_path / "plots").fitting("x", (2, 12))


def picture(path):
    return torch.from_numpy(np.atleast_3d(np.array(PIL.Image.open(path)))).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_video_is_a_row_of_its_frames(tmp_path, channels):
    video = torch.randint(0, 256, (2, channels, 5, 4, 6), dtype=torch.uint8)
    write_samples(tmp_path / "pictures", Samples(video.float() / 127.5 - 1))
    found = picture(tmp_path / "pictures" / "0001.png")
    assert found.shape == (channels, 4, 5 * 6 + 4)
    for frame in range(5):
        assert torch.equal(found[:, :, 7 * frame : 7 * frame + 6], video[1, :, frame])
    assert (found[:, :, 6::7] == 255).all()


def test_latents_are_shown_in_the_range_that_is_given(tmp_path):
    images = torch.tensor([-8.0, -3.0, 2.0, 7.0, 12.0]).view(1, 1, 1, 5)
    write_samples(tmp_path / "pictures", Samples(images, shown=(-3.0, 7.0)))
    assert picture(tmp_path / "pictures" / "0000.png").flatten().tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("shape", "trained", "expected"),
    [
        ((1, 1, 2, 2), (-1.0, 1.0), (-1.0, 1.0)),  # what a model makes outside of its range is cut
        ((1, 1, 2, 2), None, (-2.0, 5.0)),
        ((1, 1, 2, 1, 2), (0.0, 9.0), (0.0, 9.0)),
        ((1, 2, 2), (0.0, 9.0), (-2.0, 9.0)),  # an axis has room for all
        ((1, 2, 2), None, (-2.0, 5.0)),
    ],
)
def test_the_range_of_pictures(shape, trained, expected):
    samples = torch.tensor([-2.0, 5.0, float("nan"), 1.0]).view(shape)
    assert pictures.range_of(samples, trained) == expected


def test_a_range_is_never_empty():
    assert pictures.range_of(torch.full((2, 1, 3), 4.0), None) == (3.0, 5.0)
    assert pictures.range_of(torch.full((2, 1, 3), float("nan")), None) == (-1.0, 1.0)


def test_a_sequence_is_a_line_for_each_channel(tmp_path):
    up = torch.linspace(-2, 3, 40)
    write_samples(tmp_path / "pictures", Samples(torch.stack([up, -up])[None], shown=(-3.0, 3.0)))
    found = picture(tmp_path / "pictures" / "0000.png").long()
    height, width = found.shape[1:]
    red = (found - torch.tensor(pictures.LINES[1])[:, None, None]).abs().sum(0) == 0
    blue = (found - torch.tensor(pictures.LINES[0])[:, None, None]).abs().sum(0) == 0
    rows = torch.arange(height, dtype=torch.float32)[:, None]
    for line, values in ((blue, up), (red, -up)):
        column = torch.arange(pictures.PLOT_MARGIN + 2, width - pictures.PLOT_MARGIN - 2)
        of_line = line[:, column]
        drawn = of_line.any(0)
        assert drawn.float().mean() > 0.9  # but where the other one crosses
        middle = (rows * of_line).sum(0)[drawn] / of_line.sum(0)[drawn]
        place = (column[drawn] - pictures.PLOT_MARGIN) / (width - 1 - 2 * pictures.PLOT_MARGIN)
        expected = (
            pictures.PLOT_MARGIN + pictures.PLOT_HEIGHT * (3 - (values[0] + place * (values[-1] - values[0]))) / 6
        )
        assert (middle - expected).abs().max() < 3  # pixels: the line's width, and a step of the line


def test_a_sequence_of_one_number_is_drawn(tmp_path):
    write_samples(tmp_path / "pictures", Samples(torch.zeros(2, 1, 1)))
    assert (picture(tmp_path / "pictures" / "0001.png") < 255).any()


def test_what_cannot_be_drawn_is_named(tmp_path):
    for shape in ((2, 4, 3, 3), (2, 2, 4, 3, 3)):
        with pytest.raises(ValueError, match=rf"PNG files hold 1 or 3 channels, not {shape[1]}; choose .npy"):
            write_samples(tmp_path / "pictures", Samples(torch.zeros(shape)))


def test_a_file_of_code_is_refused_without_the_advice_to_run_it(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros(3, dtype=np.float32))
    samples = path.rename(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: not a readable \.pt file of numbers \(Unsupported operand \d+\)$"):
        read_array(samples, "x")
    with pytest.raises(ValueError, match=r"x\.pt: not a readable checkpoint of torch \(Unsupported operand \d+\)$"):
        load_model(samples)
