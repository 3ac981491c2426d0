"""Output files and folders: whole or absent, and one run at a time."""

import ast
from pathlib import Path

import pytest
from full_disk import full_disk

from ipr_fast.outputs import alone_in, check_no_folders, prepare_folder, replacing, write_json

ROOT = Path(__file__).parents[1]
WRITERS = {"torch.save", "np.save", "np.savez", "picture.save", "figure.savefig", "json.dump"}


def writes_otherwise(node: ast.AST) -> bool:
    """Whether a call writes a file by its path, and not into the file of `with replacing(path) as file`."""
    if not isinstance(node, ast.Call):
        return False
    function, values = ast.unparse(node.func), [*node.args, *(keyword.value for keyword in node.keywords)]
    if function in WRITERS:
        return "file" not in map(ast.unparse, values)
    if function.endswith("open"):
        modes = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        return any(set(mode) & set("wx+") for mode in modes) and "os.devnull" not in map(ast.unparse, values)
    return function.endswith((".write_text", ".write_bytes"))


def test_every_file_is_written_whole_or_not_at_all():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for folder in ("ipr_fast", "kernels", "bench", "profiling")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / "ipr_fast" / "outputs.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if writes_otherwise(node)
    ]
    assert found == []


def test_json_on_a_full_disk_leaves_the_earlier_file(tmp_path):
    write_json(tmp_path / "x.json", {"count": 1})
    with full_disk(10), pytest.raises(OSError, match=r"File too large: .*x\.json"):
        write_json(tmp_path / "x.json", {"count": list(range(100))})
    assert (tmp_path / "x.json").read_text() == '{\n  "count": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_block_that_raises_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.write(b"new" + None)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(tmp_path, exists):
    path, target = tmp_path / "link", tmp_path / "elsewhere" / "x"
    target.parent.mkdir()
    if exists:
        target.write_bytes(b"old")
    path.symlink_to(target)
    with replacing(path) as file:
        file.write(b"new")
    assert path.is_symlink()
    assert target.read_bytes() == b"new"
    assert [p.name for p in target.parent.iterdir()] == ["x"]


def test_folders_in_the_place_of_files_and_files_in_that_of_folders_are_refused(tmp_path):
    prepare_folder(tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="b: is a folder, in the place of a file"):
        check_no_folders([tmp_path / "a" / "b"])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: cannot be made a folder"):
        prepare_folder(tmp_path / "file")


def test_a_folder_is_locked_until_the_block_ends(tmp_path):
    with alone_in(tmp_path), pytest.raises(ValueError, match="another run is at work there"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass
