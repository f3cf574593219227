"""The notebooks' pictures say what the numbers say: titles follow verdicts, and one seed or one draw breaks nothing."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from warp_lite.evidence import load, report
from warp_lite.notebooks import draw_evidence, draw_liti, draw_memory, draw_slerp, figures
from warp_lite.viewing import plots

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


EVIDENCE = load("claims")
CLAIMS = draw_evidence.by_name(EVIDENCE)


def test_a_sentence_has_the_claim_and_the_verdict_of_each_world():
    text = draw_evidence.sentence(CLAIMS, "4-runs-against-1")
    for world in EVIDENCE["worlds"]:
        claim = CLAIMS["4-runs-against-1", world]
        assert claim["statement"] in text and f"{world}: {report.short(claim)}" in text


def test_a_claims_picture_has_the_verdict_of_each_world_as_its_titles():
    by_verdict = {claim["verdict"]: claim["name"] for claim in CLAIMS.values()}
    for name in by_verdict.values():
        panels = draw_evidence.draw_claim(CLAIMS, name).axes
        for axes, world in zip(panels, draw_evidence.worlds_of(CLAIMS, name)):
            assert axes.get_title(loc="left") == f"{world}: {CLAIMS[name, world]['verdict']}"


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
    ((0.2, 0.9), (0.1, 0.8), "which gain more, and how much"), ((0.2, 0.9), (-3.0, 0.8), "but not how much"),
    ((-0.2, 0.9), (0.1, 0.8), "neither which gain more nor how much")])
def test_what_is_said_of_the_law_is_what_its_test_came_to(rank, squared, says):
    def value(low, high):
        return {"value": (low + high) / 2, "ci_low": low, "ci_high": high}

    test = {"rank_correlation": value(*rank), "r_squared": value(*squared)}
    law = {"fitted_in": "detail", "c": value(1, 2), "alpha": value(0, 1), "tests": {"sentiment": test}}
    cell = {"batch": 4, "lr": 1e-3, "gain": {"mean": 0.1}, "reach": 2.0, "mean reach": 3.0, "steps": 100,
            "short angle": 70.0}
    noise = {"laws": [law], "worlds": {"detail": {"cells": [cell, {**cell, "batch": 8}]},
                                       "sentiment": {"cells": [cell]}}}
    assert says in draw_evidence.law_sentences(noise)
    assert draw_evidence.draw_law(noise).axes[0].get_title(loc="left") == "fitted in detail"


def test_the_memory_picture_counts_what_fits():
    one = np.array([1.0, 1.0, 2.0, 1.0, 1.0])
    assert "2 of 3 fit" in titles(draw_memory.draw_memory({"a model": one}, 15.0, "a card", (1, 2, 4)))[0]
