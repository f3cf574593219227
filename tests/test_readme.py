"""The README's map of the package: every file is there, nothing else is, and notebooks lead to modules."""

import re

from warp_lite.notebooks.__main__ import paths
from warp_lite.storage.provenance import PACKAGE

ROOT = PACKAGE.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree() -> dict[str, str]:
    """What the README's file tree says of each path below warp_lite/."""
    block = re.search(r"^ {4}warp_lite/\n((?: {6,}\S.*\n)+)", README, re.M)[1]
    said, above = {}, []
    for line in block.splitlines():
        name, words = line.split(maxsplit=1)
        depth = (len(line) - len(line.lstrip()) - 6) // 2
        above = [*above[:depth], name.rstrip("/")]
        said["/".join(above) + "/" * name.endswith("/")] = words
    return said


def test_the_tree_names_every_file_of_the_package_and_nothing_that_is_not_there():
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*")
             if path.suffix in (".py", ".html") and path.name != "__init__.py"}
    folders = {f"{'/'.join(file.split('/')[:depth])}/" for file in files for depth in range(1, file.count("/") + 1)}
    assert set(tree()) == files | folders


def test_each_of_them_has_one_short_line_of_its_own():
    said = tree()
    assert all(words and len(words) <= 80 for words in said.values())
    assert len(set(said.values())) == len(said)


def test_the_algorithm_comes_first_and_its_stages_next():
    order = list(tree())
    assert order[0] == "warp.py" and order[1:5] == [
        "averaging/", "averaging/ema.py", "averaging/slerp.py", "averaging/liti.py"]


def test_every_notebook_has_a_row_with_the_modules_that_it_explains():
    for path in paths():
        row = next(line for line in README.splitlines() if line.startswith(f"| [{path.stem}]"))
        modules = re.findall(r"\]\((warp_lite/[\w/]+\.py)\)", row)
        assert modules and f"(notebooks/{path.name})" in row


def test_every_link_to_a_file_leads_to_one():
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / link).exists(), link
