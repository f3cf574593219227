"""The site in one command: a source folder put together of what is committed, then Sphinx over it.

    python site/build.py build/site

Nothing is executed and nothing fetched. Notebooks are read as they are committed; where their widgets stand, which
show nothing without a kernel, come the scenes of SCENES.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx_build

from warp_lite.notebooks.__main__ import address, paths

SITE = Path(__file__).resolve().parent
ROOT = SITE.parent
SOURCE_NAME = ".site-source"  # beside the pages, which it makes
# Words of the section that a notebook's scene stands in, at the section's widget or else at its end; the scene; and
# the committed numbers of another world that it waits for, where it does.
SCENES = {"00": ("can buy", "tilt"), "01": ("idea in a picture", "anchor"), "02": ("two vectors", "arc"),
          "03": ("turn the dial", "dial"), "04": ("explorer", "explorer"),
          "07": ("explorer", "explorer", "smollm2")}
WIDGET = "application/vnd.jupyter.widget-view+json"
FOR_KERNELS = {"setup", "parameters", "about-parameters"}  # tags of cells that mean nothing on a page
WINGS = {"averaging": "Averaging: the three stages as arithmetic", "training": "Training: the M runs",
         "policies": "Policies: models as samplers", "rewards": "Rewards", "evaluation": "Evaluation",
         "worlds": "Worlds to train in", "viewing": "Pictures and the explorer", "scale": "Scale: adapters, TRL, Ray",
         "storage": "Storage"}


def build(out: Path, *options: str) -> int:
    """Write the site to a folder; returns Sphinx's exit code."""
    source = out.parent / SOURCE_NAME
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(SITE, source, ignore=shutil.ignore_patterns("__pycache__", "build.py"))
    (source / "pictures").mkdir()
    for picture in (ROOT / ".github").glob("*.png"):
        shutil.copy(picture, source / "pictures")
    for path in paths():
        notebook = placed(json.loads(path.read_text(encoding="utf-8")), path.stem)
        (source / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    glossary = (ROOT / "notebooks" / "glossary.md").read_text(encoding="utf-8")
    (source / "glossary.md").write_text(linked(glossary), encoding="utf-8")
    write_api(source / "api")
    shutil.rmtree(out, ignore_errors=True)
    code = sphinx_build(["-q", "-b", "html", "-d", str(source / ".doctrees"), *options, str(source), str(out)])
    for template in (out / "_static").glob("*.html"):  # the theme's own, no pages
        template.unlink()
    return code


def placed(notebook: dict, name: str) -> dict:
    """A notebook as the site shows it: links that hold here, no widgets, its scene. Raises ValueError where the
    scene's place is not there."""
    cells = [{**cell, "id": f"{name[:2]}-{n}"} for n, cell in enumerate(notebook["cells"])]
    for cell in cells:
        cell["source"] = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = linked(cell["source"])
    words, scene, *front = SCENES.get(name[:2], ("", ""))
    if scene and all((SITE / "fronts" / f"{world}.json").is_file() for world in front):
        source = "\n".join([f"```{{scene}} {scene}", *(f":front: {world}" for world in front), "```"])
        cells.insert(place(cells, words, name), {"cell_type": "markdown", "id": "scene", "metadata": {},
                                                 "source": source})
    for cell in cells:
        tags = cell["metadata"].get("tags", [])
        cell["metadata"] = {"tags": ["remove-cell"] if {*tags} & FOR_KERNELS else ["hide-input"] * ("start" in tags)}
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if WIDGET not in output.get("data", {})]
    metadata = {key: value for key, value in notebook["metadata"].items() if key != "widgets"}
    return {**notebook, "nbformat_minor": 5, "metadata": metadata, "cells": cells}


def place(cells: list[dict], words: str, name: str) -> int:
    """Where a scene goes: after the first widget of the section whose heading has those words, or at its end."""
    levels = {n: match for n, cell in enumerate(cells) if cell["cell_type"] == "markdown"
              and (match := re.search(r"^## .*", cell["source"], re.MULTILINE))}
    for n, heading in levels.items():
        if words in heading[0].lower():
            end = min((m for m in levels if m > n), default=len(cells))
            widgets = [m for m in range(n, end) if any(WIDGET in output.get("data", {})
                                                       and "%|" not in str(output["data"].get("text/plain"))
                                                       for output in cells[m].get("outputs", ()))]
            return widgets[0] + 1 if widgets else end
    raise ValueError(f"notebook {name} has no section {words!r} for its scene; name another in SCENES of site/build.py")


def linked(text: str) -> str:
    """Markdown whose links to modules lead to their page here where they have one, and to the repository as those to
    other files do; badges, which are pictures from another host, become words."""
    text = re.sub(r"\[!\[([^]]*)\]\([^)]*\)\]\(([^)]*)\)", r"[\1](\2)", text)
    described = rf"warp_lite/(?:(?:{'|'.join(WINGS)})/[\w/]+|\w+)"
    text = re.sub(rf"\[`?([^]`]+)`?\]\((?:\.\./)+({described})\.py\)",
                  lambda m: f"{{py:mod}}`{m[1]} <{m[2].replace('/', '.')}>`", text)
    return re.sub(r"\]\((?:\.\./)+([^)]*)\)", rf"]({address()}/blob/main/\1)", text)


def write_api(folder: Path) -> None:
    """A page a wing, with every module of it; the modules that belong to none stand on a page of their own."""
    folder.mkdir()
    files = [path for path in sorted((ROOT / "warp_lite").rglob("*.py")) if not path.name.startswith("__")]
    modules = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in files]
    alone = [module for module in modules if module.count(".") == 1]
    first = [f"warp_lite.{name}" for name in ("warp", "launch", "config", "task", "result", "reopen", "experiment")]
    pages = {"loop": ("The loop: Algorithm 1", sorted(alone, key=lambda m: (first + [m]).index(m)))}
    pages |= {wing: (title, [module for module in modules if module.startswith(f"warp_lite.{wing}.")])
              for wing, title in WINGS.items()}
    for page, (title, members) in pages.items():
        text = [title, "=" * len(title), ""]
        for module in members:
            name = module.removeprefix("warp_lite.")
            text += [name, "-" * len(name), "",
                     f".. automodule:: {module}", "   :members:", "   :ignore-module-all:", ""]
        (folder / f"{page}.rst").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]).resolve(), *sys.argv[2:]))
