"""What a reader sees: the explorer in JupyterLab and as a page of its own, in a headless Chromium."""

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from warp_lite import ParetoExplorer, WarpConfig, run_warp

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "04_warp.ipynb"
RUN_SECONDS = 300  # for all cells; some 50 on two free cores


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """A copy of notebook 04 in a folder of its own, without outputs, that keeps what it writes in `out`."""
    folder = tmp_path_factory.mktemp("lab")
    made = nbformat.read(NOTEBOOK, as_version=4)
    made.metadata.pop("widgets", None)
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = cell.source.replace('OUT = ""', 'OUT = "out"')
            assert 'OUT = "out"' in cell.source
    nbformat.write(made, folder / NOTEBOOK.name)
    return folder / NOTEBOOK.name


@pytest.fixture(scope="module")
def lab(notebook, world, tmp_path_factory):
    """The address of a JupyterLab on loopback, without a token, whose kernels run in fast mode."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = tmp_path_factory.mktemp("jupyter")
    environment = {**os.environ, "WARP_LITE_FAST": "1", "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(own / "ipython"),
                   **{f"JUPYTER_{name}_DIR": str(own / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")},
                   **{f"JUPYTERLAB_{name}_DIR": str(own / name.lower()) for name in ("SETTINGS", "WORKSPACES")}}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
               f"--ServerApp.root_dir={notebook.parent}", "--expose-app-in-browser",
               "--LabApp.extension_manager=readonly",
               "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"]
    notifications = own / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    notifications.parent.mkdir(parents=True)
    notifications.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # it would ask, and then look
    with open(own / "log", "w+") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(240):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api"):
                    break
                assert server.poll() is None, (own / "log").read_text()[-3000:]
                time.sleep(0.25)
            yield address
        finally:
            server.terminate()
            server.wait(30)


CELLS = """() => {
  const cells = window.jupyterapp.shell.currentWidget.content.model.cells, made = [];
  for (let i = 0; i < cells.length; i++) {
    const cell = cells.get(i);
    if (cell.type === "code") made.push({
      index: i, source: cell.sharedModel.getSource(), count: cell.executionCount, state: cell.executionState,
      errors: cell.outputs.toJSON().filter(o => o.output_type === "error").map(o => o.ename + ": " + o.evalue)});
  }
  return made;
}"""
SHOW = """index => {
  const notebook = window.jupyterapp.shell.currentWidget.content;
  notebook.activeCellIndex = index;
  return notebook.scrollToItem(index, "start");
}"""


def run_all(page):
    """Run every cell and wait for the last."""
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    deadline = time.monotonic() + RUN_SECONDS
    while True:
        cells = page.evaluate(CELLS)
        errors = [error for cell in cells for error in cell["errors"]]
        assert not errors, errors
        if all(cell["count"] for cell in cells if cell["source"].strip()):
            return cells
        assert time.monotonic() < deadline, f"still running: {[c['source'][:60] for c in cells if not c['count']][:1]}"
        time.sleep(0.3)


class Explorer:
    """The explorer's widget on a page."""

    def __init__(self, page):
        self.page = page
        self.picture = page.locator(".jp-OutputArea img.widget-image")
        self.picture.wait_for(timeout=30_000)

    def pixels(self) -> np.ndarray:
        """The picture under its heading, where the point is drawn."""
        data = self.picture.evaluate(
            "async image => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))")
        return np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB"))[80:]

    def texts(self) -> tuple[str, str]:
        """The numbers and the completions."""
        return tuple(self.page.locator(f".explorer-{name}").inner_text() for name in ("numbers", "completions"))

    def wait(self, before: str) -> float:
        """Until the numbers are others; returns the seconds."""
        start = time.perf_counter()
        self.page.wait_for_function("before => document.querySelector('.explorer-numbers').innerText !== before",
                                    arg=before, polling=10)
        return time.perf_counter() - start


def test_in_jupyterlab_the_sliders_and_toggles_move_the_point(browser, lab, notebook, screenshots):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{lab}/lab/tree/{notebook.name}?reset")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel"
                           "?.connectionStatus === 'connected'", timeout=90_000)
    start = time.perf_counter()
    cells = run_all(page)
    print(f"all cells in JupyterLab: {time.perf_counter() - start:.0f} s")
    (place,) = [cell["index"] for cell in cells if cell["source"].strip() == "explorer"]
    page.evaluate(SHOW, place)
    explorer = Explorer(page)
    page.wait_for_timeout(500)
    page.screenshot(path=screenshots / "1-explorer.png")
    pixels, (numbers, completions) = explorer.pixels(), explorer.texts()

    handle = page.locator(".widget-slider .noUi-handle").first
    handle.focus()
    handle.press("End")
    seconds = explorer.wait(numbers)
    page.wait_for_timeout(200)
    page.screenshot(path=screenshots / "2-eta-1.png")
    moved, (new_numbers, new_completions) = explorer.pixels(), explorer.texts()
    assert not np.array_equal(moved, pixels)
    assert new_numbers != numbers and new_completions != completions
    assert "η = 1" in new_completions
    print(f"from the key to new numbers on the screen: {1e3 * seconds:.0f} ms")

    handle.press("ArrowLeft")
    explorer.wait(new_numbers)
    page.wait_for_timeout(200)
    moved, (numbers, completions) = explorer.pixels(), explorer.texts()
    page.get_by_role("button", name="gold reward").click()
    page.wait_for_timeout(700)
    page.screenshot(path=screenshots / "3-gold.png")
    assert not np.array_equal(explorer.pixels(), moved)
    assert explorer.texts() == (numbers, completions)

    page.get_by_role("button", name="Measure exactly this point").click()
    explorer.wait(numbers)
    page.wait_for_timeout(200)
    page.screenshot(path=screenshots / "4-measured.png")
    assert "measured live" in explorer.texts()[0]
    page.close()
    assert (notebook.parent / "out" / "explorer.html").is_file()


def test_the_page_needs_neither_kernel_nor_network(browser, world, screenshots, tmp_path):
    config = WarpConfig(iterations=2, runs=2, steps=20, lr=1e-3, eval_every=10)
    result = run_warp(world.policy, world.tokenizer, world.reward, world.prompts.given, config,
                      eval_prompts=world.eval_prompts.given, gold=world.gold, progress=False)
    made = tmp_path / "explorer.html"
    ParetoExplorer(result, fast=True, progress=False).to_html(made)
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 800})
    page = context.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(made.as_uri())
    page.wait_for_selector("#plot .main-svg")

    def shown():
        point = page.evaluate("() => { const drawn = document.getElementById('plot').data;"
                              "const point = drawn.find(t => t.name === 'the point');"
                              "return [point.x[0], point.y[0]]; }")
        return point, page.locator("#numbers").inner_text(), page.locator("#completions").inner_text()

    page.screenshot(path=screenshots / "5-page.png")
    before = shown()
    page.locator("#eta").fill("1")
    after = shown()
    assert all(a != b for a, b in zip(before, after))
    page.locator("#reward-gold").check()
    gold = shown()
    assert gold[0][1] != after[0][1] and gold[1:] == after[1:]
    page.locator("#lam").fill("0.3")  # both runs are merged
    page.locator("#iteration").fill("0")
    page.screenshot(path=screenshots / "6-page-moved.png")
    assert all(a != b for a, b in zip(gold, shown()))
    assert not errors
    assert [url for url in requests if not url.startswith(("file:", "blob:", "data:"))] == []
    context.close()
