"""The notebooks' pictures say what the numbers say: titles follow verdicts, and one seed or one draw breaks nothing."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from warp_lite.evaluation.statistics import t_interval
from warp_lite.evidence import load, wording
from warp_lite.evidence.claims import METHODS, completions_spent, decide_values, pick
from warp_lite.evidence.settings import EQUAL
from warp_lite.notebooks import draw_anchor, draw_evidence, draw_liti, draw_memory, draw_slerp, draw_warp, figures
from warp_lite.viewing import plots
from warp_lite.viewing.labels import struck_labels

ETAS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2)


@pytest.fixture(autouse=True)
def closed():
    with matplotlib.rc_context(plots.STYLE):
        yield
    plt.close("all")


def rows(height=1.0, seeds=4, length=3.0, **more):
    """A front whose reward at a KL is height · √KL plus a little of the seed's own, and whose KL is length · η²."""
    return [{"seed": seed, "value": eta, "kl": length * eta**2, "reward": (height * length**0.5 + 0.001 * seed) * eta,
             "gold": eta, "perplexity": 5 + eta, "length": 10 - eta, **more} for seed in range(seeds) for eta in ETAS]


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_the_title_of_slerp_against_lerp_says_who_is_ahead():
    high, low = rows(1.0), rows(0.5)
    assert "SLERP has more reward" in titles(draw_slerp.draw_where_or_how_far({"slerp": high, "lerp": low}, [], "r"))[1]
    assert "LERP has more reward" in titles(draw_slerp.draw_where_or_how_far({"slerp": low, "lerp": high}, [], "r"))[1]
    alike = titles(draw_slerp.draw_where_or_how_far({"slerp": rows(seeds=1), "lerp": rows(seeds=1)}, [], "r"))[1]
    assert "neither is clearly ahead" in alike


@pytest.mark.parametrize("omega, lam", [(0, 0.5), (76, 0), (120, 0.5), (175, 1)])
def test_the_arc_keeps_its_size_and_says_both_lengths(omega, lam):
    figure = draw_slerp.draw_arc(omega, lam)
    (axes,) = figure.axes
    assert (axes.get_xlim(), axes.get_ylim()) == ((-1.9, 1.9), (-0.25, 1.35))
    assert figure.get_size_inches().tolist() == [6.2, 3.9]
    chord = np.sqrt((1 - lam) ** 2 + lam**2 + 2 * lam * (1 - lam) * np.cos(np.radians(omega)))
    assert f"LERP keeps {chord:.0%} of the length, SLERP 100%" in titles(figure)[0]


def test_a_walk_between_two_runs_is_measured_against_their_mean():
    walk = [{"seed": 0, "value": lam, "kl": kl, "reward": 0.0} for lam, kl in ((0, 1.0), (0.5, 5.0), (1, 3.0))]
    assert draw_slerp.gain(walk, "kl").tolist() == [[0.0, 3.0]]


def test_the_shared_level_is_what_the_least_run_reaches():
    far, near = rows(length=4.0, run=1), rows(length=2.38, run=2)
    assert figures.shared_level(far, near) == pytest.approx(9.5)
    assert figures.shared_level([{"seed": 0, "kl": 0.25}, {"seed": 0, "kl": 0.2}]) == 0.25


def test_the_toy_dial_is_softmax_of_interpolated_logits():
    p, kl, reward = draw_liti.toy_dial(0.5)
    weights = np.sqrt(draw_liti.TOY_START * draw_liti.TOY_END)
    assert p == pytest.approx(weights / weights.sum())
    assert kl == pytest.approx((p * np.log(p / draw_liti.TOY_START)).sum()) and reward == pytest.approx(p @ range(4))
    assert draw_liti.toy_dial(0)[1] == pytest.approx(0, abs=1e-15)


def test_titles_of_the_dial_follow_the_numbers():
    curves = {"single runs": rows(0.5), "their merge": rows(1.0)}
    near, far, right = titles(draw_liti.draw_dial(curves, ETAS, "reward (units)"))
    assert "under its chord" in near and "more than doubles" in far  # KL is 3 η²
    assert "unclear" in right or "its chord" in right


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_picture_of_liti_is_drawn_with_one_seed_and_with_several(seeds):
    fronts, paths = rows(seeds=seeds, run=1), [{**row, "step": row["value"]} for row in rows(0.5, seeds, run=1)]
    assert draw_liti.draw_against_path(fronts, paths, [], 3.0, "reward (units)").axes
    assert draw_liti.draw_forgetting({"single runs": fronts, "their merge": fronts}, ["perplexity", "gold"], 3.0).axes
    assert draw_liti.draw_second({"sft": rows(seeds=seeds), "init": rows(0.9, seeds)}, [], "reward (units)").axes
    assert draw_liti.draw_gains([1, 2], {"a": np.zeros((seeds, 2)), "b": np.ones((seeds, 2))}, ["k", "r"], "r").axes


# Sentences say what the numbers say, in both directions


def noisy(*values):
    return t_interval([value + error for value in values for error in (-0.01, 0, 0.01)])


def test_the_bound_on_kl_is_said_to_hold_or_not_by_its_verdict():
    assert "single runs: KL(0.5) is less than 0.5 · KL(1) (0.75 " in draw_liti.against_the_bound(
        "single runs", rows(), 0.5)  # KL is 3 η²
    flat = [{**row, "kl": 3 * row["value"] ** 0.5} for row in rows()]
    assert "KL(0.5) is more than 0.5 · KL(1) (-0.62 " in draw_liti.against_the_bound("merge", flat, 0.5)
    line = [{**row, "kl": 3 * row["value"] + (row["value"] == 1) * (row["seed"] % 2 - 0.5)} for row in rows()]
    assert "KL(0.5) against 0.5 · KL(1) is unclear" in draw_liti.against_the_bound("merge", line, 0.5)


def test_a_mistake_lies_on_the_front_below_it_or_above_it():
    front = rows()
    ways = ["right", "on", "below", "above", "scattered"]
    shifts = [0, 0, -0.3, 0.3, 0]
    broken = [{"seed": seed, "value": n, "kl": 0.75, "reward": 0.5 * (3**0.5 + 0.001 * seed) + shift
               + (n == 4) * (seed % 2 - 0.5)} for seed in range(4) for n, shift in enumerate(shifts)]
    said = [draw_liti.beside_the_front("It", draw_liti.off_the_front(broken, n, front)) for n in range(1, len(ways))]
    assert said[0].startswith("It: on the curve of the right call, within 0.05 (")
    assert said[1].startswith("It: below the curve of the right call (-0.30")
    assert said[2].startswith("It: above it (0.30") and "unclear" in said[3]
    assert draw_liti.draw_mistakes(broken, ways, front, "r").axes


def test_a_setting_whose_gain_may_be_small_is_unclear_and_not_left_out():
    gains = {"still": noisy(0.02), "rises": noisy(0.5), "falls": noisy(-0.5), "wide": noisy(0.05, 0.3)}
    assert draw_anchor.levelled(gains) == "levelled off: still; unclear: wide; not levelled off: 2 of 4"
    assert draw_anchor.levelled({"rises": noisy(0.5)}, apart="\n") == (
        "levelled off: none; unclear: none\nnot levelled off: 1 of 1")


def test_the_ratio_of_two_deviations_is_never_negative_and_covers_what_it_says():
    rng, covered = np.random.default_rng(0), []
    for _ in range(400):
        values = 2 * rng.standard_normal((6, 1)) + rng.standard_normal((6, 6))
        ratio = draw_slerp.spread_ratio(values)
        assert 0 < ratio.low < ratio.mean < ratio.high
        covered.append(ratio.low < 1 / (4 + 1 / 6) ** 0.5 < ratio.high)  # a sixth is left in a mean over orders
    assert 0.92 < np.mean(covered) < 0.98
    with pytest.raises(ValueError, match="two seeds and two orders, not 1 and 6"):
        draw_slerp.spread_ratio(values[:1])


def test_whether_order_or_seed_varies_a_number_more_follows_from_the_numbers():
    def shuffled(of_seed, of_order):
        return [{"seed": seed, "value": n, "reward": of_seed * seed + of_order * n, "kl": 1.0}
                for seed in range(6) for n in range(6)]

    assert "varies less with the order" in draw_slerp.of_the_seed(shuffled(1.0, 0.1), "reward")
    assert "varies more with the order" in draw_slerp.of_the_seed(shuffled(0.1, 1.0), "reward")
    assert "unclear" in draw_slerp.of_the_seed(shuffled(1.0, 1.0), "reward")


@pytest.mark.parametrize("reward, kl, words", [
    (0.8, 0.2, "0.20 [0.19, 0.21] of the reward that the first merge has gained and 0.80 [0.80, 0.80] of its KL: more "
               "of the KL"), (0.2, 0.8, "less of the KL than of the reward"), (0.5, 0.5, "of which it gives more is")])
def test_what_the_step_back_gives_back_is_computed(reward, kl, words):
    """The next init keeps these shares of the merge's gain."""
    front = rows()
    path = [{"seed": seed, "run": 1, "step": step, "kl": 3 * (kl + 0.005 * (seed % 2 - 0.5)) + step,
             "reward": (3**0.5 + 0.001 * seed) * (reward + 0.01 * (seed % 2 - 0.5))} for seed in range(4)
            for step in (0, 10)]
    assert words in draw_warp.given_back(front, path)


def test_the_share_that_a_front_has_of_anothers_gain():
    assert f"{draw_warp.kept(rows(0.5), rows(), 'kl')}" == "1.00 [1.00, 1.00]"
    half = [{**row, "reward": 7 + row["reward"] / 2} for row in rows()]
    assert f"{draw_warp.kept(half, rows(), 'reward')}" == "0.50 [0.50, 0.50]"


def test_the_end_of_a_path_outside_the_picture_is_not_drawn_in_it():
    path = [{"seed": seed, "run": 1, "step": step, "kl": step / 10 * (1 + 0.1 * seed), "reward": step / 100}
            for seed in range(3) for step in (0, 50, 100)]
    figure = draw_anchor.walks({"a": path}, {"a": "k"}, [], "units", 4.0, "")
    assert not figure.axes[0].collections and "a →" in [text.get_text() for text in figure.axes[0].texts]
    figure = draw_anchor.walks({"a": path}, {"a": "k"}, [], "units", 40.0, "")
    assert figure.axes[0].collections


def test_averages_past_the_edge_are_counted():
    path = [{"seed": seed, "run": 1, "step": step, "kl": step / 10, "reward": step / 100}
            for seed in range(3) for step in (0, 50, 100)]
    points = {name: [{"kl": kl, "reward": 1.0} for kl in (1, 2, last)] for name, last in (("a", 90), ("b", 3))}
    figure = draw_anchor.averages(points, {"a": path, "b": path}, {name: noisy(0.1) for name in points},
                                  {"a": "r", "b": "b"}, [], "units", 8.0, "")
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend[:2] == ["average, a (1 of 3 past the edge)", "average, b"]
    marks = [line.get_marker() for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    assert len(set(marks)) == 2


def test_pink_stands_for_no_anchor_and_brown_for_best_of_n():
    sources = {path.stem: path.read_text(encoding="utf-8") for path in Path(figures.__file__).parent.glob("*.py")}
    homes = {name: {stem for stem, text in sources.items() if f'COLOURS["{name}"]' in text}
             for name in ("none", "best_of_n")}
    assert homes["none"] == {"draw_anchor"} and homes["best_of_n"] <= {"draw_kl", "draw_real"}


def test_nothing_strikes_a_name_on_the_map_of_weights():
    rng = np.random.default_rng(0)
    init = {"w": torch.zeros(8)}
    for _ in range(4):
        one, two = ({"w": torch.as_tensor(rng.standard_normal(8))} for _ in range(2))
        plane = draw_warp.Plane(init, one, two)
        xs, ys = np.linspace(-0.5, 1.5, 9), np.linspace(-1, 1.5, 9)
        points = [{"reward": x + 0.1 * y, "kl": 5 * (x**2 + y**2)} for y in ys for x in xs]
        figure = draw_warp.landscape(plane, xs, ys, points, {"a single run": (one, "0.5"), "the merge": (two, "b")},
                                     "units", "")
        assert struck_labels(figure) == []
        names = [text for text in figure.axes[0].texts if text.get_text().endswith(" nats")]
        assert {"1 nats", "2 nats", "4 nats"} <= {text.get_text() for text in names}
        page = figure.axes[0].get_window_extent()
        assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in map(Text.get_window_extent, names))


def test_the_map_of_weights_of_a_real_models_short_runs_has_lines_of_kl_below_a_nat():
    torch.manual_seed(0)
    init, one, two = ({"w": torch.randn(8)} for _ in range(3))
    plane, marks = draw_warp.Plane(init, one, two), {"a single run": (one, "0.5"), "the merge": (two, "b")}
    xs = ys = np.linspace(-0.25, 1.35, 3)

    def named(points):
        figure = draw_warp.landscape(plane, xs, ys, points, marks, "units", "")
        return [text.get_text() for text in figure.axes[0].texts if text.get_text().endswith(" nats")]

    assert named([{"reward": x, "kl": 0.1 * (x**2 + y**2)} for y in ys for x in xs]) == ["0.091 nats", "0.18 nats"]
    touching = [{"reward": x, "kl": 2.0 if x == y == xs[1] else 1.0} for y in ys for x in xs]
    touching[0]["kl"] = 0.9999999
    assert named(touching)[-1:] != []  # and a ring without points is none



EVIDENCE = load("claims")
CLAIMS = draw_evidence.by_name(EVIDENCE)


def test_a_sentence_has_the_claim_and_the_verdict_of_each_world():
    text = draw_evidence.sentence(CLAIMS, "4-runs-against-1")
    for world in EVIDENCE["worlds"]:
        claim = CLAIMS["4-runs-against-1", world]
        assert claim["statement"] in text and f"{world}: {wording.short(claim)}" in text


def test_fresh_draws_repeat_a_verdict_leave_it_open_or_turn_it_round():
    claim, near = pick(["4-runs-against-1"])[0], [0.9, 1.0, 1.1, 1.0]
    said = {}
    for name, later in (("same", near), ("open", [-2.0, 1.0, 2.0, -1.0]), ("turned", [-x for x in near]), ("none", [])):
        found = {("4-runs-against-1", "sentiment"): decide_values(claim, "sentiment", dict(enumerate(near + later)))}
        said[name] = draw_evidence.on_fresh_draws(found, 4)
    assert "1 verdicts are clear on the 4; the 4 alone repeat 1 of them, leave 0 open and turn none" in said["same"]
    assert said["same"].endswith("as the 4 found them, 1 would be clear on 4.")
    assert "repeat 0 of them, leave 1 open and turn none round" in said["open"]
    assert f"turn 1 round: {claim.statement} (sentiment, holds)" in said["turned"]
    assert said["none"] == "No draws were added to the first 4 that could decide by themselves."


def test_a_comparison_whose_sign_depends_on_its_level_is_named_with_what_other_levels_say():
    claim = {"statement": "A beats B", "verdict": "holds", "effect": 0.3, "ci_low": 0.1, "ci_high": 0.5,
             "unit": "reward", "null": 0.0, "worth": 0.05, "study": "merging", "seeds": 8, "level": 3.0,
             "reached": {"4": 7, "3": 8, "2": 8, "1": 8}, "effect_at": {"4": -0.9, "3": 0.3, "2": -0.2, "1": -0.04}}
    assert wording.other_side(claim) == {"2": -0.2}  # not what some seeds alone reach, nor what is not worth having
    assert draw_evidence.by_level({("a", "w"): claim}) == (
        "- A beats B (w): **holds** +0.30 [+0.10, +0.50] at 3 nats; -0.20 at 2")
    assert draw_evidence.by_level({("a", "w"): {**claim, "effect_at": {"3": 0.3}}}) == "None."
    assert wording.at_level({**claim, "study": "quality"}) == " at 3 proxy reward"
    assert wording.at_level({**claim, "level": None}) == ""


def test_the_best_within_a_kl_is_the_mean_over_the_runs_of_a_seed():
    rows = [{"seed": 0, "run": run, "step": step, "kl": kl, "reward": reward + run} for run in (0, 1)
            for step, kl, reward in ((0, 0.0, 0.0), (1, 2.0, 1.0), (2, 1.0, 3.0))]
    assert figures.at_kl(rows, 1.0) == pytest.approx([1.0]) and figures.best_at_kl(rows, 1.0) == pytest.approx([3.5])


def test_the_settings_chosen_are_listed_by_what_they_had_on_the_tuning_draws():
    chosen = {"worlds": {"sentiment": {"a": {"chosen": "x", "scores": {"x": 1.0, "y": 0.5}},
                                       "b": {"chosen": "y", "scores": {"x": None, "y": 2.5}}}}}
    assert draw_evidence.on_tuning_draws(chosen, ["a", "b"]) == "- sentiment: b 2.50, a 1.00"
    lines = draw_evidence.on_tuning_draws(load("tuned"), EQUAL).split("\n")
    assert len(lines) == 2 and all(line.count(",") == len(EQUAL) - 1 for line in lines)


def test_the_methods_beside_the_limit_say_how_many_completions_they_sample():
    spent = {name: completions_spent(name) for name in METHODS}
    assert {spent[name] for name in EQUAL} == {3200} and spent["best WARP"] == 25_600
    assert spent["single run, noisy setting"] * 4 == spent["LITI of SLERP, M = 4"] == 1600


def test_a_claims_picture_has_the_verdict_of_each_world_as_its_titles():
    by_verdict = {claim["verdict"]: claim["name"] for claim in CLAIMS.values()}
    for name in by_verdict.values():
        panels = draw_evidence.draw_claim(CLAIMS, name).axes
        for axes, world in zip(panels, draw_evidence.worlds_of(CLAIMS, name)):
            assert axes.get_title(loc="left") == f"{world}: {CLAIMS[name, world]['verdict']}"


def test_the_axis_of_a_claims_picture_says_what_its_effect_is():
    for name, words in (("4-runs-against-1", "difference in reward"), ("length", "difference in length (tokens)"),
                        ("angle", "angle (degrees)"), ("kl-convex", "coefficient of η² (nats)"),
                        ("limit-90", "share of the limit's area")):
        assert draw_evidence.draw_claim(CLAIMS, name).axes[0].get_ylabel().startswith(words)


@pytest.mark.parametrize("name, what, study, lines, where", [
    ("slerp-lerp-front", "reward", "merging", ("slerp-4", "lerp-4"), "at one KL"),
    ("weak-lerp-0", "gold", "weak", ({"line": "lerp", "beta": 0.0}, {"line": "run", "beta": 0.0}), "at one proxy")])
def test_curves_have_bands_and_the_bar_of_the_difference_ends_on_both_lines(name, what, study, lines, where):
    bands = load("bands")
    figure = draw_evidence.draw_curves(EVIDENCE, bands, CLAIMS, {
        f"line {n}": (study, line, "black") for n, line in enumerate(lines, 1)}, name, what)
    assert f"{len(bands['draws'])} draws {where}" in figure.get_supxlabel() and "95 %" in figure.get_supxlabel()
    for axes, world in zip(figure.axes, draw_evidence.worlds_of(CLAIMS, name)):
        assert len(axes.collections) == 2 and struck_labels(figure) == []
        claim, drawn = CLAIMS[name, world], {line.get_label(): line.get_data() for line in axes.lines}
        first, second = (np.interp(claim["level"], *drawn[f"line {n}"]) for n in (1, 2))
        low, high = drawn["interval of the difference"][1]
        assert first - second == pytest.approx(claim["effect"], abs=0.05)
        assert (low, high) == pytest.approx((second + claim["ci_low"], second + claim["ci_high"]))


def test_a_single_seed_contradicts_a_clear_verdict_as_often_as_its_sign_does():
    claim = {"verdict": "holds", "rule": "above", "effect": 1.0, "null": 0.0,
             "values": {"0": 1.0, "1": -1.0, "2": 2.0, "3": 3.0}}
    claims = {("a", "w"): claim, ("b", "w"): {**claim, "verdict": "unclear"}}
    assert draw_evidence.opposite_shares(claims).tolist() == [0.25]


def decisive(**of_detail):
    """Two predicted claims in two worlds."""
    claim = {"statement": "Many gain more", "unit": "reward", "prediction": [0.0, 0.2], "null": 0.0, "margin": 0.0,
             "effect": 0.1, "ci_low": 0.05, "ci_high": 0.15, "verdict": "holds", "draws": 4}
    lost = {**claim, "statement": "Few gain more", "effect": None, "ci_low": None, "ci_high": None,
            "verdict": "unclear"}
    return {("many", "sentiment"): claim, ("many", "detail"): {**claim, **of_detail},
            ("few", "sentiment"): lost, ("few", "detail"): lost}


def test_predictions_of_where_merging_wins_are_drawn_and_counted_by_world():
    claims = decisive(effect=-0.3, ci_low=-0.4, ci_high=-0.2, verdict="fails")
    figure = draw_evidence.draw_decisive(claims)
    assert len(figure.axes) == 4 and figure.axes[1].get_xlim()[0] < -0.4
    sentiment, detail = draw_evidence.decisive_sentences(claims).split("- **detail**")
    assert "4 draws: 1 of 1 effects lie" in sentiment and "holds: Many gain more." in sentiment
    assert "0 of 1 effects lie" in detail and "fails: Many gain more." in detail and "holds: none." in detail
    assert "unclear: 1 of 2" in sentiment and "unclear: 1 of 2" in detail


@pytest.mark.parametrize("rank, squared, says", [
    ((0.2, 0.9), (0.1, 0.8), "it says which gain more, and how much"),
    ((0.2, 0.9), (-3.0, -0.8), "it says which gain more, but not how much"),
    ((0.2, 0.9), (-3.0, 0.8), "it says which gain more, and unclear whether it says how much"),
    ((-0.2, 0.9), (0.1, 0.8), "it is unclear whether it says which gain more, and how much"),
    ((-0.9, -0.2), (-3.0, -0.8), "it says the wrong way round which gain more, but not how much")])
def test_what_is_said_of_the_law_is_what_its_test_came_to(rank, squared, says):
    def value(low, high):
        return {"value": (low + high) / 2, "ci_low": low, "ci_high": high}

    test = {"rank_correlation": value(*rank), "r_squared": value(*squared)}
    law = {"fitted_in": "detail", "c": value(1, 2), "alpha": value(0, 1), "tests": {"sentiment": test}}
    cell = {"batch": 4, "lr": 1e-3, "gain": {"mean": 0.1, "ci_low": 0.0, "ci_high": 0.2}, "reach": 2.0,
            "mean reach": 3.0, "steps": 100, "short angle": 70.0, "mean short angle": 60.0}
    noise = {"laws": [law], "seeds": [0, 1], "worlds": {"detail": {"cells": [cell, {**cell, "batch": 8}]},
                                                        "sentiment": {"cells": [cell]}}}
    assert says in draw_evidence.law_sentences(noise)
    assert draw_evidence.draw_law(noise).axes[0].get_title(loc="left") == "fitted in detail"


def test_the_memory_picture_counts_what_fits():
    one = np.array([1.0, 1.0, 2.0, 1.0, 1.0])
    assert "2 of 3 fit" in titles(draw_memory.draw_memory({"a model": one}, 15.0, "a card", (1, 2, 4)))[0]
