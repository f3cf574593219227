"""Keep the notebooks: the cells they share, their badges, their execution in full mode; and the site's numbers.

    python -m warp_lite.notebooks link           # from the address in pyproject.toml, into every notebook
    python -m warp_lite.notebooks run [NAME…]    # full mode; outputs written back; time and peak memory printed

    python -m warp_lite.notebooks scenes         # site/scenes.json, from a seeded run of the tiny world; some minutes
    python -m warp_lite.notebooks scenes DIR…    # site/fronts/, from run folders, named as these, or from that of
                                                 # warp-lite claims --world smollm2

All work on a checkout of the repository. Three leading code cells are the same in
all notebooks and are found by their tags: `setup`, `parameters`, `start`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..storage.files import whole

ROOT = Path(__file__).resolve().parents[2]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)")
TIME_LIMIT = 3600  # seconds a cell
SETUP = """\
# Setup: installs the package where it is missing (on Colab) and does nothing elsewhere.
import importlib.util

if importlib.util.find_spec("warp_lite") is None:
    %pip install --quiet "warp-lite[notebooks,hub] @ git+{address}"
"""
PARAMETERS = """\
MODEL = "tiny-gpt2"
FAST = False
SEED = 0
DEVICE = "cpu"
OUT = ""
"""
RETRAIN = "RETRAIN = False\n"  # a parameter of those that share the running example
GPU_PARAMETERS = """\
MODEL = "gpt2-imdb"
FAST = False
SEED = 0
DEVICE = "auto"
OUT = ""
"""
REAL_PARAMETERS = PARAMETERS.replace("tiny-gpt2", "smollm2")
FOR_GPU = ("06",)  # notebooks on real models; here they are executed in fast mode, on small ones
REAL_MODEL = ("07",)  # on a real model that a CPU carries; a tiny one takes its place where it is not installed
SHARING = ("00", "01", "02", "03", "04")  # those that share the running example
START = """\
from warp_lite.notebooks import figures
from warp_lite.notebooks.start import begin

lab = begin("{stem}", MODEL, FAST, SEED, DEVICE, OUT{more})
"""


def address(root: Path = ROOT) -> str:
    """The repository's address, from pyproject.toml. Raises OSError where that is not there."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def badge(name: str, root: Path = ROOT) -> str:
    """The markdown of a notebook's Colab badge, by its file name."""
    repository = address(root).removeprefix("https://github.com/")
    return ("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
            f"(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name})")


def shared_cells(name: str = "", root: Path = ROOT) -> dict[str, str]:
    """The source of the cells that all notebooks share, by tag; `name` is the notebook's, as its parameters differ."""
    parameters, more = PARAMETERS, ""
    if name.startswith(SHARING):
        parameters, more = PARAMETERS + RETRAIN, ", RETRAIN"
    elif name.startswith(FOR_GPU):
        parameters = GPU_PARAMETERS
    elif name.startswith(REAL_MODEL):
        parameters, more = REAL_PARAMETERS, ", stand_in=True"
    cells = {"setup": SETUP.format(address=address(root)), "parameters": parameters,
             "start": START.format(stem=Path(name).stem, more=more)}
    return {tag: source.rstrip("\n") for tag, source in cells.items()}


def paths(names: Sequence[str] = (), root: Path = ROOT) -> list[Path]:
    """All notebooks, or those whose file names begin with one of `names`. Raises ValueError for none."""
    notebooks = [path for path in sorted((root / "notebooks").glob("[0-9]*.ipynb"))
                 if not names or any(path.name.startswith(Path(name).name) for name in names)]
    if not notebooks:
        raise ValueError(f"there is no notebook {' or '.join(names)} in {root / 'notebooks'}")
    return notebooks


def link(path: Path, root: Path = ROOT) -> bool:
    """Write the shared cells and the badge into a notebook; returns whether anything changed."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    before = nbformat.writes(notebook)
    title = notebook.cells[0]
    if BADGE.search(title.source):
        title.source = BADGE.sub(badge(path.name, root), title.source)
    else:
        first, _, rest = title.source.partition("\n")
        title.source = f"{first}\n\n{badge(path.name, root)}\n{rest}"
    for tag, source in shared_cells(path.name, root).items():
        for cell in notebook.cells:
            if tag in cell.metadata.get("tags", ()):
                cell.source = source
    notebook.metadata.kernelspec = KERNEL
    changed = nbformat.writes(notebook) != before
    if changed:
        with whole(path) as made:
            nbformat.write(notebook, made)
    return changed


def execute(path: Path) -> None:
    """Run a notebook in its own folder and write the outputs into it. Raises at the first error."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=TIME_LIMIT, kernel_name="python3", record_timing=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:  # a bar that has gone leaves "0%" behind on a page without a kernel
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_progress(output)]
    # what differs by machine stays out of the file
    notebook.metadata = nbformat.from_dict({
        "kernelspec": KERNEL, "language_info": {"name": "python"},
        **({"widgets": notebook.metadata["widgets"]} if "widgets" in notebook.metadata else {})})
    nbformat.validate(notebook)
    with whole(path) as made:
        nbformat.write(notebook, made)


def is_progress(output: Mapping) -> bool:
    """Whether an output of a cell is a progress bar, a widget whose text has a per cent in it."""
    data = output.get("data", {})
    return "application/vnd.jupyter.widget-view+json" in data and "%|" in data.get("text/plain", "")


def widget_errors(notebook: Mapping) -> list[dict]:
    """The errors inside a notebook's widgets: what a callback raises ends there and stops nothing."""
    content = notebook["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    outputs = [out for widget in content.get("state", {}).values() for out in widget["state"].get("outputs", ())]
    return [output for output in outputs if output["output_type"] == "error"]


def run(path: Path) -> int:
    """Execute a notebook in a process of its own and print its run time and peak memory; the exit code."""
    start = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "WARP_LITE_FAST"}
    if path.name.startswith(FOR_GPU):
        environment["WARP_LITE_FAST"] = "1"
    child = subprocess.Popen([sys.executable, "-m", "warp_lite.notebooks", "execute", str(path)], env=environment)
    memory = "not measured on this system"
    if hasattr(os, "wait4"):  # counts the kernel too, which the child waits for
        _, status, usage = os.wait4(child.pid, 0)
        code = child.returncode = os.waitstatus_to_exitcode(status)
        memory = f"{usage.ru_maxrss / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GiB"
    else:
        code = child.wait()
    seconds = time.perf_counter() - start
    print(f"{path.name}: {'failed after ' if code else ''}{seconds:.0f} s, peak memory {memory}", flush=True)
    return code


def write_numbers(folders: Sequence[str]) -> int:
    """The site's numbers: of the tiny world, or of run folders. Returns the exit code: 0 done, 2 no run folder."""
    from ..reopen import load_result
    from .scenes import write_front, write_real_front, write_scenes

    if not folders:
        write_scenes(ROOT / "site" / "scenes.json")
    for folder in map(Path, folders):
        try:
            if (folder / "smollm2.json").is_file():
                write_real_front(folder, ROOT / "site" / "fronts")
            else:
                write_front(load_result(folder), folder.resolve().name, ROOT / "site" / "fronts")
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of those arguments, or of the process's; returns its exit code: 0 done, 2 no such notebook."""
    parser = argparse.ArgumentParser(prog="python -m warp_lite.notebooks", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("link", "run", "execute", "scenes"))
    parser.add_argument("names", nargs="*", help="beginnings of file names; all notebooks by default")
    given = parser.parse_args(arguments)
    if given.what == "execute":
        execute(Path(given.names[0]).resolve())
        return 0
    if given.what == "scenes":
        return write_numbers(given.names)
    try:
        notebooks = paths(given.names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if given.what == "link":
        for path in notebooks:
            print(f"{path.name}: {'written' if link(path) else 'as it was'}")
        return 0
    return max([run(path) for path in notebooks])


if __name__ == "__main__":
    sys.exit(main())
