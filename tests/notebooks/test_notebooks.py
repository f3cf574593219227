"""Every notebook runs in fast mode, from an empty folder, with the package installed as Colab installs it; and a
second time in the same kernel, which must show the same."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from warp_lite.notebooks.__main__ import FOR_GPU, REAL_MODEL, paths, widget_errors
from warp_lite.viewing.labels import label_end

CPU_SECONDS = 90  # of one notebook in fast mode, run twice; CPU time, which other work on the machine does not change
VARIES = "varies"  # the tag of cells that print times or free memory
ONCE = {"setup", "parameters"}  # the tags of cells that are not run again: papermill writes after them
WATCH = """\
import IPython.display
import matplotlib.figure
import matplotlib.pyplot as plt
from warp_lite.viewing.labels import struck_labels

def watched(*arguments, shown=plt.show, **options):
    for number in plt.get_fignums():
        say_struck(plt.figure(number))
    shown(*arguments, **options)

def say_struck(figure):
    for label in struck_labels(figure):
        print("struck through:", label)

def display(*objects, shown=IPython.display.display, **options):
    for figure in objects:
        if isinstance(figure, matplotlib.figure.Figure):
            say_struck(figure)
    return shown(*objects, **options)

plt.show = watched
"""
NOTEBOOKS = {path.stem: path for path in paths()}
# Beside the default model: one notebook with each other kind of MODEL, the rest in `make test-all`.
OTHER_MODELS = {("tiny-gemma", "01_ema_anchor"), ("folder", "00_kl_and_reward"), ("gpt2-imdb", "03_liti")}
NBVAL = ("00_kl_and_reward", "01_ema_anchor", "02_slerp")


def cases():
    for name in NOTEBOOKS:
        usual, *others = ("tiny-gpt2", "tiny-gemma", "folder", "gpt2-imdb", "gemma-imdb")
        if name.startswith(FOR_GPU):
            usual, others = "gpt2-imdb", ["gemma-imdb"]
        if name.startswith(REAL_MODEL):
            usual, others = "smollm2", []
        yield pytest.param(name, usual, id=f"{name}-{usual}", marks=pytest.mark.slow)
        for model in others:
            marks = [pytest.mark.slow] if (model, name) in OTHER_MODELS else [pytest.mark.slow, pytest.mark.all]
            yield pytest.param(name, model, id=f"{name}-{model}", marks=marks)


def twice(path: Path) -> int:
    """Write into a notebook its code cells once more, behind the others; returns how many there were.

    A cell in front says of every figure, shown by `plt.show` or by `display`, which of its labels are struck through.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    start = next(i for i, cell in enumerate(cells) if "start" in cell["metadata"].get("tags", ()))
    cells.insert(start, {"cell_type": "code", "id": "watch", "metadata": {"tags": ["setup"]}, "source": WATCH,
                         "outputs": [], "execution_count": None})
    again = [copy.deepcopy(cell) for cell in cells if cell["cell_type"] == "code"
             and not ONCE & {*cell["metadata"].get("tags", ())}]
    for cell in again:
        cell["id"] += "-again"
    notebook["cells"] = cells + again
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return len(again)


def test_the_cell_that_watches_sees_what_is_shown_either_way(capsys):
    """By `plt.show` as by `display`, which shows what belongs to no window: the explorer's picture."""
    names, window, lone = {}, plt.figure(), Figure()
    before = plt.show
    try:
        exec(WATCH, names)
        for figure, word in ((window, "one"), (lone, "two")):
            axes = figure.subplots()
            label_end(axes, [0.5], [0.5], word, "C0")
            axes.plot([0, 1], [0.5, 0.5])
        names["plt"].show(block=False)
        names["display"](lone)
    finally:
        plt.show = before
        plt.close("all")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["struck through: one", "struck through: two"]


def shown(cell: dict) -> list:
    """What a cell shows that must be the same a second time: texts and pictures, but for progress and widgets."""
    outputs = [output for output in cell["outputs"] if output.get("name") != "stderr"
               and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})]
    texts = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    kinds = ("text/markdown", "text/html", "image/png")
    return [texts, *("".join(output["data"][kind]) for output in outputs for kind in kinds
                     if kind in output.get("data", {}))]


@pytest.mark.parametrize("name, kind", list(cases()))
def test_a_notebook_runs_in_fast_mode_and_a_second_time_shows_the_same(name, kind, environment, model, tmp_path):
    notebook = Path(shutil.copy(NOTEBOOKS[name], tmp_path))
    count = twice(notebook)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "papermill", notebook.name, "executed.ipynb", "-p", "MODEL", model(kind),
               "-p", "OUT", str(out), "--kernel", "python3", "--execution-timeout", "300", "--no-progress-bar"]
    before = os.times()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    after = os.times()
    assert done.returncode == 0, done.stderr[-4000:]
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{name} with {kind}: {seconds:.0f} s of CPU time, {after.elapsed - before.elapsed:.0f} s in all")
    if kind == "tiny-gpt2" or name.startswith(FOR_GPU + REAL_MODEL):
        assert seconds < CPU_SECONDS
    executed = json.loads((tmp_path / "executed.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in executed["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code if "".join(cell["source"]).strip())
    pictures = [output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert pictures
    # the widgets too: what an interaction's callback raises ends in its own output, and papermill goes on
    assert not widget_errors(executed)
    for first, second in zip(code[len(code) - 2 * count:], code[len(code) - count:]):
        assert VARIES in first["metadata"].get("tags", ()) or shown(first) == shown(second), "".join(first["source"])
        assert "struck through" not in shown(first)[0], shown(first)[0]


def test_the_kernel_finds_the_installed_package_and_not_the_checkout(environment, installed, tmp_path):
    found = subprocess.run([sys.executable, "-c", "import warp_lite; print(warp_lite.__file__)"], cwd=tmp_path,
                           env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).is_relative_to(installed)


def marked(name: str) -> bool:
    return "NBVAL_CHECK_OUTPUT" in NOTEBOOKS[name].read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in NBVAL else pytest.mark.all) for name in NOTEBOOKS if marked(name)])
def test_marked_cells_give_the_committed_outputs(name, environment, world, tmp_path):
    notebook = shutil.copy(NOTEBOOKS[name], tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir",
               str(tmp_path), "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "300", notebook]
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:]
