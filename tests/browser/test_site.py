"""The site as a reader meets it: built once, served as plain files, every page opened with the network cut.

Every slider of every scene is moved, and what the scenes say is held against the package's own arithmetic.
"""

import contextlib
import functools
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import torch
from filelock import FileLock

from warp_lite import EMAAnchor, lerp, optimal_front, slerp
from warp_lite.evidence import load
from warp_lite.notebooks.__main__ import paths
from warp_lite.viewing.plots import COLOURS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = json.loads((ROOT / "site" / "scenes.json").read_text(encoding="utf-8"))
SCENES = {"00": "tilt", "01": "anchor", "02": "arc", "03": "dial", "04": "explorer"}
BESIDE = "plain/files"  # the site lies in a folder of the server, as on a page of a repository


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the built site; all workers share it. A warning of Sphinx, a dead reference say, is an error."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "site" / BESIDE
    with FileLock(shared / "site.lock"):
        if not (out / "index.html").is_file():
            out.parent.mkdir(parents=True)
            done = subprocess.run([sys.executable, ROOT / "site" / "build.py", out, "-W", "--keep-going"],
                                  env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def address(site):
    """Where a plain file server has the site."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *about):
            pass

        def copyfile(self, *files):
            with contextlib.suppress(ConnectionError):  # of a browser that has gone on to the next page
                super().copyfile(*files)

    root = site.parents[len(Path(BESIDE).parts) - 1]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{BESIDE}"
    server.shutdown()
    server.server_close()


class Reader:
    """A tab in which everything but the site is unreachable, and every complaint is kept."""

    def __init__(self, browser, address, **settings):
        self.context = browser.new_context(**settings)
        self.page, self.address, self.complaints = self.context.new_page(), address, []
        self.page.route("**/*", self.only_the_site)
        self.page.on("pageerror", lambda error: self.complaints.append(f"{self.page.url}: {error}"))
        self.page.on("console", lambda message: message.type in ("error", "warning")
                     and self.complaints.append(f"{self.page.url}: {message.text}"))

    def only_the_site(self, route):
        url = route.request.url
        if url.startswith((self.address.rsplit(f"/{BESIDE}", 1)[0], "data:", "blob:")):
            route.continue_()
        else:
            self.complaints.append(f"{self.page.url} asks for {url}")
            route.abort()

    def open(self, name):
        self.page.goto(f"{self.address}/{name}", wait_until="load")
        return self.page

    def readout(self, scene):
        return scene.locator("[data-readout]").inner_text()


@pytest.fixture
def reader(browser, address):
    made = Reader(browser, address, viewport={"width": 1280, "height": 900})
    yield made
    made.context.close()


TO_AN_END = """(slider, end) => {
  slider.value = slider.value === slider[end] ? slider[end === "min" ? "max" : "min"] : slider[end];
  slider.dispatchEvent(new Event("input", {bubbles: true}));
}"""


def pages(site):
    return sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))


def pages_with_scenes(site):
    return [page for page in pages(site) if "data-scene=" in (site / page).read_text(encoding="utf-8")]


def test_there_is_a_page_for_the_story_every_notebook_the_evidence_the_library_and_the_glossary(site):
    names = {"index.html", "evidence.html", "api.html", "glossary.html", *(f"{path.stem}.html" for path in paths())}
    assert names <= set(pages(site))
    for number, scene in SCENES.items():
        (page,) = site.glob(f"{number}_*.html")
        assert f'data-scene="{scene}"' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name, width", [("desktop", 1280), ("phone", 390)])
def test_every_page_opens_without_an_error_or_a_request_to_another_host_and_fits(name, width, site, browser, address,
                                                                                 screenshots):
    reader = Reader(browser, address, viewport={"width": width, "height": 844}, has_touch=name == "phone")
    for page in pages(site):
        shown = reader.open(page)
        assert shown.evaluate("() => document.documentElement.scrollWidth") <= width, page
        if os.environ.get("WARP_LITE_SCREENSHOTS"):  # of whole pages, which takes longer than all else here
            shown.screenshot(path=screenshots / f"site-{name}-{page.replace('/', '-')}.png", full_page=True)
    reader.context.close()
    assert len(pages(site)) > 20 and not reader.complaints


def test_every_slider_of_every_scene_moves_its_readout_and_its_picture(site, reader):
    moved = set()
    for page in pages_with_scenes(site):
        reader.open(page)
        for scene in reader.page.locator("[data-scene]").all():
            for slider in scene.locator("input[type=range]").all():
                assert slider.evaluate("slider => slider.labels.length === 1 && slider.labels[0].innerText.length > 3")
                for end in ("min", "max"):
                    before = reader.readout(scene), scene.locator(".picture").inner_html()
                    slider.evaluate(TO_AN_END, end)
                    after = reader.readout(scene), scene.locator(".picture").inner_html()
                    assert before[0] != after[0] and before[1] != after[1], (page, scene.get_attribute("data-scene"))
                    moved.add((page, scene.get_attribute("data-scene")))
    assert {scene for page, scene in moved if page == "index.html"} == set(SCENES.values())
    assert not reader.complaints


def test_a_slider_moves_by_the_keyboard_and_the_arc_by_a_finger(reader, browser, address):
    scene = reader.open("02_slerp.html").locator("[data-scene=arc]")
    before = reader.readout(scene)
    scene.locator("input").first.focus()
    reader.page.keyboard.press("ArrowRight")
    assert "Ω = 77°" in reader.readout(scene) != before
    phone = Reader(browser, address, viewport={"width": 390, "height": 844}, has_touch=True)
    scene = phone.open("02_slerp.html").locator("[data-scene=arc]")
    scene.scroll_into_view_if_needed()
    before, box = phone.readout(scene), scene.locator("[data-drag=lam]").last.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch = phone.context.new_cdp_session(phone.page)
    for kind, points in (("touchStart", [(x, y)]), ("touchMove", [(x + 30, y + 8)]), ("touchEnd", [])):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": a, "y": b} for a, b in points]})
    assert phone.readout(scene) != before
    phone.context.close()


# --- the scenes say what the package computes ---------------------------------------------------


def numbers_in(text):
    return [float(number.replace("−", "-")) for number in re.findall(r"[+−-]?\d+(?:\.\d+)?", text)]


def put(scene, **values):
    """Move sliders, by their place."""
    for place, value in values.items():
        scene.locator("input").nth(int(place[1:])).evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value)


def test_the_colours_are_those_of_the_figures(reader):
    assert reader.open("index.html").evaluate("() => WARP.colours") == COLOURS


def test_the_tilted_optimum_is_that_of_optimal_front(reader):
    page = reader.open("index.html")
    rewards, gold = (torch.tensor(NUMBERS["tilt"][name], dtype=torch.float64) for name in ("rewards", "gold"))
    for beta in (5.0, 1.0, 0.4):
        (expected,) = optimal_front(rewards=rewards, gold=gold, betas=[beta], min_ess=0)
        shown = page.evaluate("beta => tilted(beta)", beta)
        assert shown == pytest.approx({name: expected[name] for name in ("kl", "reward", "gold", "ess")}, abs=1e-9)


def test_the_lengths_of_the_arc_are_those_of_slerp_and_lerp(reader):
    scene = reader.open("index.html").locator("[data-scene=arc]")
    for omega, lam in ((76, 0.5), (120, 0.25), (30, 0.9)):
        put(scene, s0=omega, s1=lam)
        angle = torch.deg2rad(torch.tensor(float(omega), dtype=torch.float64))
        init = {"w": torch.zeros(2, dtype=torch.float64)}
        tips = [{"w": torch.tensor([1.0, 0.0], dtype=torch.float64)}, {"w": torch.stack([angle.cos(), angle.sin()])}]
        arc, chord = (merge(init, tips, weights=(1 - lam, lam))["w"].norm().item() for merge in (slerp, lerp))
        lengths = [float(found) for found in re.findall(r"length ([\d.]+\d)", reader.readout(scene))]
        assert lengths == pytest.approx([arc, chord], abs=0.006)


def test_the_moving_anchor_goes_where_the_packages_anchor_lets_it_go(reader):
    scene = reader.open("index.html").locator("[data-scene=anchor]")
    for beta, mu in ((0.05, 0.02), (0.1, 0.04)):
        put(scene, s0=beta, s1=mu)
        theta, anchor = torch.zeros(1, dtype=torch.float64), EMAAnchor({"w": torch.zeros(1, dtype=torch.float64)}, mu)
        for _ in range(600):
            held = anchor.state_dict()["w"].clone()
            anchor.update({"w": theta})
            theta = theta + 0.01 - beta * (theta - held)
        shown = re.search(r"= ([\d.]+) a step, and after 600 steps is at ([\d.]+)", reader.readout(scene))
        assert float(shown[1]) == pytest.approx(0.01 / (1 + beta / mu), abs=6e-5)
        assert float(shown[2]) == pytest.approx(theta.item(), abs=0.006)


def test_the_dial_and_the_explorer_show_the_committed_numbers(reader):
    page = reader.open("index.html")
    dial, explorer = (page.locator(f"[data-scene={name}]") for name in ("dial", "explorer"))
    for point in NUMBERS["dial"][::5]:
        put(dial, s0=point["eta"])
        text = reader.readout(dial)
        assert numbers_in(text)[1] == pytest.approx(point["kl"], abs=0.006)
        assert all(words.split()[0] in text for words, _ in point["completions"])
    line = next(line for line in NUMBERS["fronts"]["tiny"]["lines"] if (line["iteration"], line["runs"]) == (1, 1))
    put(explorer, s0=1, s1=1, s2=0)
    assert numbers_in(reader.readout(explorer).split("KL")[1])[0] == pytest.approx(line["points"][-1]["kl"], abs=0.006)
    put(explorer, s3=0.3)  # two runs have a λ, and only they
    assert "2 runs merged at λ = 0.30" in reader.readout(explorer)


@pytest.mark.parametrize("name, other", [("claims", "decisive"), ("decisive", "claims")])
def test_the_evidence_is_filtered_by_world_and_verdict(name, other, reader):
    page, claims = reader.open("evidence.html"), load(name)["claims"]
    table, beside = (page.locator(f"[data-evidence={which}]") for which in (name, other))
    assert table.locator("tbody tr:visible").count() == len(claims)
    for world, verdict in (("sentiment", "fails"), ("detail", ""), ("", "unclear")):
        for key, value in (("world", world), ("verdict", verdict)):
            table.locator(f"[data-filter={key}]").select_option(value)
        expected = [c for c in claims if world in ("", c["world"]) and verdict in ("", c["verdict"])]
        assert table.locator("tbody tr:visible").count() == len(expected)
        assert f"{len(expected)} of {len(claims)}" in table.locator("[data-count]").inner_text()
    assert beside.locator("tbody tr:visible").count() == len(load(other)["claims"])


def test_the_evidence_says_what_was_predicted_and_whether_it_came(reader):
    cells = reader.open("evidence.html").locator("[data-evidence=decisive] td.effect").all_inner_texts()
    claims = load("decisive")["claims"]
    inside = [claim["prediction"][0] <= claim["effect"] <= claim["prediction"][1] for claim in claims]
    assert ["it lies there" in cell for cell in cells] == inside and {*inside} == {True, False}
    assert f"{sum(inside)} of {len(claims)} effects lie where they were predicted" in reader.page.content()


# --- files ---------------------------------------------------------------------------------------


class Links(HTMLParser):
    """What a page points to, and the places in it that can be pointed to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        else:
            self.loads += [attributes[name] for name in ("src", "href", "data") if attributes.get(name)]


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    parsed = {page: Links((site / page).read_text(encoding="utf-8")) for page in pages(site)}
    for page, of_page in parsed.items():
        for link in of_page.links + of_page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert link in of_page.links or parts.scheme == "data", f"{page} loads {link}"
                continue
            target = unquote(urljoin(page, parts.path)) if parts.path else page
            assert (site / target).is_file(), f"{page}: {link}"
            if parts.fragment and target in parsed:
                assert unquote(parts.fragment) in parsed[target].ids | {""}, f"{page}: {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.fixture
def build():
    """The module site/build.py."""
    spec = importlib.util.spec_from_file_location("site_build", ROOT / "site" / "build.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_a_scene_of_another_world_stands_where_its_numbers_are_there(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SITE", tmp_path)
    notebook = {"cells": [{"cell_type": "markdown", "metadata": {}, "source": "## The explorer"}], "metadata": {}}
    assert len(build.placed(notebook, "07_real")["cells"]) == 1
    (tmp_path / "fronts").mkdir()
    (tmp_path / "fronts" / "smollm2.json").write_text("{}")
    assert ":front: smollm2" in build.placed(notebook, "07_real")["cells"][1]["source"]


def test_a_scene_without_its_place_is_named(build):
    bare = {"cells": [{"cell_type": "markdown", "metadata": {}, "source": ["## Something else"]}], "metadata": {}}
    with pytest.raises(ValueError, match="02_slerp has no section 'two vectors' for its scene"):
        build.placed(bare, "02_slerp")
