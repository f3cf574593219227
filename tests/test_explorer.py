"""The explorer: its grid, its moves, its page; what a browser shows of it is in tests/browser."""

import dataclasses
import io
import json
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from PIL import Image

from warp_lite import ParetoExplorer, WarpConfig, liti, run_warp, slerp
from warp_lite.viewing.explorer.grid import (
    View,
    build_grid,
    changed_words,
    completions_of,
    line_at,
    merged_weights,
    point_at,
    shown_kl,
)
from warp_lite.viewing.explorer.picture import draw_picture
from warp_lite.viewing.labels import struck_labels

PROMPTS = ["this film was", "that plot was", "i loved", "this plot", "the film was", "that film", "dull and", "it was"]


def loved(prompts, completions, **kwargs):
    return [float(text.split().count("great") + text.split().count("loved")) for text in completions]


def short(prompts, completions, **kwargs):
    return [-float(len(text.split())) for text in completions]


@pytest.fixture(scope="module")
def result(policy_of, tokenizer):
    config = WarpConfig(iterations=2, runs=3, steps=4, lr=5e-3, warmup_steps=0, eval_every=2, max_new_tokens=6)
    return run_warp(policy_of("gpt2"), tokenizer, loved, PROMPTS, config, eval_prompts=PROMPTS, gold=short,
                    progress=False)


@pytest.fixture(scope="module")
def made(result):
    return ParetoExplorer(result, fast=True, progress=False)


@pytest.fixture
def explorer(made):
    """Each test's own, at the same view, with widgets of its own; the grid is shared."""
    new = object.__new__(ParetoExplorer)
    new.__dict__ = {"result": made.result, "grid": made.grid, "view": made.view, "exact": {}, "picture": made.picture}
    return new


def shown(explorer):
    outputs = explorer.outputs
    return [outputs[name].value for name in ("picture", "numbers", "completions")]


# --- the grid ---------------------------------------------------------------------------------


def test_the_grid_has_a_front_for_every_iteration_number_of_runs_and_lambda(made):
    grid = made.grid
    keys = [(line["iteration"], line["runs"], line["lam"]) for line in grid["lines"]]
    assert keys == [(i, m, lam) for i in (1, 2) for m in (1, 2, 3) for lam in (grid["lambdas"] if m == 2 else [None])]
    for line in grid["lines"]:
        assert [p["eta"] for p in line["points"]] == grid["etas"]
        for p in line["points"]:
            assert {"kl", "kl_se", "reward", "reward_se", "gold", "gold_se", "length"} <= set(p)
            assert len(p["completions"]) == len(grid["prompts"]) == 4
    assert grid["limit"] and len({(row["iteration"], row["run"]) for row in grid["trajectories"]}) == 6


def test_the_grid_is_plain_data(made):
    assert json.loads(json.dumps(made.grid)) == made.grid


def test_every_front_starts_at_the_sft_policy_with_no_kl(made):
    starts = [line["points"][0] for line in made.grid["lines"]]
    assert all(start == starts[0] for start in starts) and starts[0]["kl"] == pytest.approx(0, abs=1e-9)


def test_points_are_those_that_the_result_measures(result, made):
    for iteration, runs in ((1, 3), (2, 3)):
        point = line_at(made.grid, View(1.0, iteration, runs))[-1]
        per_prompt = made.grid["samples"] // len(PROMPTS)
        expected = result.measure([result.weights(1.0, iteration)], samples=per_prompt)[0].as_dict()
        assert {name: point[name] for name in expected} == pytest.approx(expected)


def test_two_runs_are_merged_at_lambda_and_its_ends_are_single_runs(result):
    first, second, _ = (policy for policy in result.iterations[1].policies)
    init = result.iterations[1].init
    for lam, expected in ((0.0, first), (1.0, second), (0.3, slerp(init, [first, second], weights=(0.7, 0.3)))):
        merged = merged_weights(result, 2, 2, lam)
        assert all(torch.allclose(merged[name], expected[name], atol=1e-12) for name in expected)


def test_completions_of_a_point_are_those_of_the_result(result, made):
    point = line_at(made.grid, View(1.0, 2, 3))[-1]
    expected = [" ".join(text.split()) for text in result.completions(made.grid["prompts"], 1.0, 2)]
    assert point["completions"] == expected


def test_between_points_numbers_are_interpolated_and_completions_are_the_nearest(made):
    grid, etas = made.grid, made.grid["etas"]
    a, b = line_at(grid, View(0.5, 1, 2, 0.25))[1:3]
    middle = point_at(grid, View((etas[1] + etas[2]) / 2 + 1e-9, 1, 2, 0.25))
    assert middle["kl"] == pytest.approx((a["kl"] + b["kl"]) / 2, abs=1e-6) and middle["between"]
    assert middle["completions"] == b["completions"] and middle["completions_eta"] == etas[2]
    left, right = (line_at(grid, View(0.5, 1, 2, lam))[1]["kl"] for lam in (0.0, 0.5))
    assert a["kl"] == pytest.approx((left + right) / 2)
    assert not point_at(grid, View(etas[1], 1, 2, 0.5))["between"]


def test_changed_words_are_the_new_ones():
    assert changed_words("it was dull .", "it was really great .") == [
        ("it", False), ("was", False), ("really", True), ("great", True), (".", False)]
    assert changed_words("a b", "a b") == [("a", False), ("b", False)]
    assert changed_words("a", "") == []


# --- moves ------------------------------------------------------------------------------------


def test_moving_eta_changes_the_point_the_numbers_and_the_completions(explorer):
    explorer.widget  # noqa: B018
    explorer.controls["eta"].value = 0.0
    before, point = shown(explorer), explorer.point()
    explorer.controls["eta"].value = 1.0
    assert all(a != b for a, b in zip(before, shown(explorer)))
    assert explorer.view.eta == 1.0 and explorer.point()["kl"] > point["kl"]
    assert "<mark" not in before[2] and "<mark" in explorer.outputs["completions"].value


@pytest.mark.parametrize("name, value", [
    ("iteration", 1), ("runs", 1), ("reward", "gold"), ("root", True), ("trajectories", False), ("limit", False)])
def test_every_control_changes_the_picture_and_the_view(explorer, name, value):
    explorer.widget  # noqa: B018
    before = explorer.outputs["picture"].value
    explorer.controls[name].value = value
    assert getattr(explorer.view, name) == value
    assert explorer.outputs["picture"].value != before


def test_lambda_acts_with_two_runs_only(explorer):
    explorer.widget  # noqa: B018
    assert explorer.controls["lam"].disabled
    explorer.controls["runs"].value = 2
    assert not explorer.controls["lam"].disabled
    before = explorer.point()["kl"]
    explorer.controls["lam"].value = 0.0
    assert explorer.point()["kl"] != before


def test_the_numbers_are_the_points(explorer):
    explorer.widget  # noqa: B018
    explorer.controls["eta"].value = 0.37
    point, text = explorer.point(), explorer.outputs["numbers"].value
    for name in ("kl", "reward", "gold"):
        assert f"<b>{point[name]:.2f}</b> ± {point[name + '_se']:.2f}" in text
    assert "between measured points" in text


@pytest.mark.parametrize("change", [
    {"eta": 0.9}, {"root": True}, {"runs": 2, "lam": 0.2}, {"iteration": 1, "reward": "gold", "trajectories": False}])
def test_the_quick_picture_is_the_figure(explorer, change):
    explorer.picture.prepare(explorer.view)  # other grounds are drawn before and after
    explorer.move(**change)
    quick = np.asarray(Image.open(io.BytesIO(explorer.png())).convert("RGB")).astype(int)
    figure = explorer.figure()
    with rc_context({"savefig.bbox": "standard"}):  # a notebook's style may be left behind in a process
        figure.savefig(whole := io.BytesIO(), format="png", dpi=figure.dpi)
    whole = np.asarray(Image.open(whole).convert("RGB")).astype(int)
    assert quick.shape == whole.shape
    assert (abs(quick - whole).max(-1) > 60).mean() < 0.002  # up to what lies over what


def test_the_button_measures_the_exact_point(explorer, result):
    explorer.widget  # noqa: B018
    explorer.controls["eta"].value = 0.37
    between = explorer.outputs["picture"].value
    explorer.outputs["measure"].click()
    expected = result.measure([liti(result.sft, result.iterations[1].merged, 0.37)],
                              samples=explorer.grid["samples"] // len(PROMPTS))[0]
    point = explorer.point()
    assert (point["kl"], point["gold"]) == (pytest.approx(expected.kl), pytest.approx(expected.gold))
    assert "measured live" in explorer.outputs["numbers"].value and explorer.outputs["picture"].value != between
    assert not explorer.outputs["measure"].disabled


def test_a_move_comes_back_quickly(explorer):
    explorer.widget  # noqa: B018
    seconds = []
    for name, values in (("eta", [i / 20 for i in range(20)]), ("reward", ["gold", "reward"] * 3),
                         ("root", [True, False] * 3), ("iteration", [1, 2] * 3), ("runs", [2, 1, 3] * 2)):
        for value in values:
            start = time.perf_counter()
            explorer.controls[name].value = value
            seconds.append(time.perf_counter() - start)
    seconds.sort()
    print(f"a move: median {1e3 * seconds[len(seconds) // 2]:.0f} ms, slowest {1e3 * seconds[-1]:.0f} ms")
    assert seconds[len(seconds) // 2] < 1


def test_what_a_callback_raises_is_shown_and_goes_away_with_the_next_move(explorer, monkeypatch):
    explorer.widget  # noqa: B018
    with monkeypatch.context() as patch:
        patch.setattr(explorer, "png", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            explorer.controls["eta"].value = 0.8
        assert "ZeroDivisionError" in explorer.outputs["message"].value
    explorer.controls["eta"].value = 0.9
    assert explorer.outputs["message"].value == ""


def test_figure_and_table_need_no_widgets(explorer):
    figure, table = explorer.figure(), explorer.table()
    assert "iteration 2, 3 runs merged" in figure.axes[0].texts[-1].get_text()
    assert "controls" not in explorer.__dict__
    assert all(f"{p['kl']:6.2f} ± {p['kl_se']:.2f}" in table for p in line_at(explorer.grid, explorer.view))


# --- without a gold reward, bad input ---------------------------------------------------------


def test_without_a_gold_reward_there_is_no_toggle_for_it(result, tmp_path):
    task = dataclasses.replace(result.task, gold=None)
    plain = ParetoExplorer(dataclasses.replace(result, task=task), fast=True, limit=[], progress=False)
    assert "reward" not in plain.controls and "limit" not in plain.controls
    assert "gold" not in plain.table() and not plain.grid["gold"]
    plain.widget  # noqa: B018
    assert plain.outputs["message"].value == "" and "gold" not in plain.outputs["numbers"].value
    with pytest.raises(ValueError, match="reward must be one of reward, not 'gold'"):
        plain.move(reward="gold")
    plain.to_html(tmp_path / "page.html")


@pytest.mark.parametrize("change, words", [
    ({"eta": 1.5}, "eta is 1.5; the grid reaches from 0 to 1"), ({"iteration": 3}, "no iteration 3"),
    ({"runs": 4}, "4 runs"), ({"runs": 2, "lam": 2.0}, "lambda is 2.0"),
    ({"reward": "length"}, "reward must be one of")])
def test_a_move_out_of_the_grid_is_refused_and_the_view_stays(explorer, change, words):
    view = explorer.view
    with pytest.raises(ValueError, match=words):
        explorer.move(**change)
    assert explorer.view == view


def test_a_result_without_iterations_is_refused(result):
    with pytest.raises(ValueError, match="no iterations"):
        ParetoExplorer(dataclasses.replace(result, iterations=[]))


# --- the page ---------------------------------------------------------------------------------


class Loads(HTMLParser):
    """Whatever a page would load, and its ids."""

    def __init__(self):
        super().__init__()
        self.loads, self.ids = [], set()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        self.loads += [value for name, value in given.items() if name in ("src", "href", "srcset", "data", "action")]


def test_the_page_loads_nothing(explorer, tmp_path):
    explorer.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Loads()
    page.feed(text)
    assert page.loads == []
    assert {"eta", "iteration", "runs", "lam", "plot"} <= page.ids
    assert "@import" not in text.split("<script>")[0] and "Plotly" in text and "/*DATA*/" not in text
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_the_page_without_plotly_says_what_to_install(explorer, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'warp-lite\[html\]'"):
        explorer.to_html(tmp_path / "page.html")


def test_a_single_held_out_prompt_has_no_standard_errors_and_nothing_fails(result, tokenizer, policy_of, tmp_path):
    config = result.config.replace(iterations=1, runs=1, merge="none")
    one = run_warp(policy_of("gpt2"), tokenizer, loved, PROMPTS, config, eval_prompts=PROMPTS[:1], progress=False)
    lone = ParetoExplorer(one, fast=True, limit=[], progress=False)
    lone.widget  # noqa: B018
    lone.figure()
    assert "± nan" in lone.table() and "± nan" in lone.outputs["numbers"].value
    lone.to_html(tmp_path / "page.html")


def test_a_point_far_beyond_the_merges_stays_visible_at_the_edge(explorer):
    far = {"kl": 10 * shown_kl(explorer.grid, True), "kl_se": 0.1}
    figure = draw_picture(explorer.grid, explorer.view, {**explorer.point(), **far})
    axes = figure.axes[0]
    marker = axes.lines[-1]
    assert marker.get_marker() == ">" and marker.get_xdata()[0] == axes.get_xlim()[1]


def test_nothing_strikes_a_name_through_wherever_the_point_is(explorer):
    """Not the point's mark and bars either, nor a run while it trains, nor another name's thin line."""
    explorer.grid = {**explorer.grid, "limit": [{"kl": 0.0, "reward": 0.0, "gold": 0.0},
                                                {"kl": 1.0, "reward": 1.0, "gold": 1.0}]}
    for reward in ("reward", "gold"):
        for eta in np.linspace(0, explorer.grid["etas"][-1], 9):
            explorer.move(eta=float(eta), reward=reward, limit=True)
            figure = explorer.figure()
            names = [text.get_text() for text in figure.axes[0].texts]
            assert {"iteration 1", "iteration 2"} <= set(names) and len(names) == 4
            assert struck_labels(figure) == [], (reward, eta)


@pytest.mark.parametrize("fast", [True, False])
def test_the_completions_of_a_grid_are_counted_before_it_is_measured(result, fast, monkeypatch):
    counted = []
    original = type(result).measure
    monkeypatch.setattr(type(result), "measure", lambda self, states, samples, texts: (
        counted.append(len(states) * samples * len(self.task.eval_prompts)),
        original(self, states, samples=1, texts=texts))[1])
    build_grid(result, fast=fast, limit=[], progress=False)
    assert completions_of(result, fast) == sum(counted)
