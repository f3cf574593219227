"""What is written beside its place takes it whole or not at all, whoever else writes there."""

import ast
import errno
import os

import pytest

from warp_lite.storage.files import CannotWrite, beside, whole
from warp_lite.storage.model_folders import appearing_whole
from warp_lite.storage.provenance import PACKAGE
from warp_lite.worlds import reviews


def fill(folder, text):
    """A folder of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text(text)


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_or_folder_takes_its_place_at_the_end_and_leaves_nothing_beside_it(before, tmp_path):
    if before:
        fill(tmp_path / "folder", before)
        (tmp_path / "text").write_text(before)
    with beside(tmp_path / "folder") as made:
        fill(made, "new")
        assert (tmp_path / "folder").is_dir() == bool(before)
    with beside(tmp_path / "text") as made:
        made.write_text("new")
    assert (tmp_path / "folder" / "file").read_text() == (tmp_path / "text").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "text"]


@pytest.mark.parametrize("how", [beside, whole, appearing_whole])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_on_any_error_what_was_there_stays_and_nothing_is_left_beside_it(how, error, tmp_path):
    if how is appearing_whole:
        (tmp_path / "out").mkdir()
    else:
        fill(tmp_path / "out", "old")
    before = list(tmp_path.rglob("*"))
    with pytest.raises(error):
        with how(tmp_path / "out") as made:
            fill(made, "new")
            raise error
    assert list(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("how", [beside, whole])
def test_what_was_there_stays_where_nothing_was_written_in_its_place(how, tmp_path):
    fill(tmp_path / "out", "old")
    with pytest.raises(OSError, match="No such file"):
        with how(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_of_two_who_write_one_place_at_once_the_first_stays_where_it_is_to_stay(tmp_path):
    with beside(tmp_path / "world", stays=lambda path: (path / "file").is_file()) as slow:
        fill(slow, "slow")
        with beside(tmp_path / "world", stays=lambda path: (path / "file").is_file()) as quick:
            fill(quick, "quick")
    assert (tmp_path / "world" / "file").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_torso_is_replaced_and_a_world_that_is_whole_is_kept(tmp_path):
    (tmp_path / "world" / "sft").mkdir(parents=True)
    for text in ("first", "second"):
        with beside(tmp_path / "world", stays=reviews.is_built) as made:
            fill(made, text)
            (made / "world.json").write_text("{}")
    assert (tmp_path / "world" / "file").read_text() == "first" and not (tmp_path / "world" / "sft").exists()


def test_a_merge_takes_an_empty_folder_and_refuses_one_that_another_has_filled_meanwhile(tmp_path):
    (tmp_path / "out").mkdir()
    with appearing_whole(tmp_path / "out") as made:
        fill_inside(made)
    assert (tmp_path / "out" / "file").read_text() == "new"
    with pytest.raises(ValueError, match="out exists and is not an empty folder"):
        with appearing_whole(tmp_path / "out") as made:
            fill_inside(made)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fill_inside(folder):
    (folder / "file").write_text("new")


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    with pytest.raises(CannotWrite, match="cannot write .*text: No space left"):
        with whole(tmp_path / "text"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_nothing_else_in_the_package_writes_beside_and_renames():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of_a_path = node.func.attr == "replace" and len(node.args) == 1 and not node.keywords
                if of_a_path or node.func.attr == "rename":
                    assert path == PACKAGE / "storage" / "files.py", f"{path}: {ast.unparse(node)}"
