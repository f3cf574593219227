"""The evidence: effects on hand-made rows, verdicts by their rule, units that are kept, and what is committed."""

import dataclasses
import json
import math
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from warp_lite.cli import main
from warp_lite.config import WarpConfig
from warp_lite.evaluation.statistics import VERDICTS, t_interval, verdict
from warp_lite.evidence import (
    bands,
    bench,
    coverage,
    decisive,
    effects,
    law,
    load,
    noise,
    report,
    runner,
    studies,
    tuning,
    waiting,
    wording,
)
from warp_lite.evidence.bench import TUNING_SEEDS, Bench, draw_of, noise_scale
from warp_lite.evidence.claims import (
    ALL,
    CLAIMS,
    HEADLINES,
    Claim,
    decide,
    decide_values,
    lines_needed,
    verdicts_of_halves,
)
from warp_lite.evidence.effects import Rows
from warp_lite.evidence.settings import NOISE_GRID, REFRESH
from warp_lite.evidence.studies import STUDIES
from warp_lite.evidence.tuned import asked_by, tuned
from warp_lite.storage import provenance


def front(line, seed, kl, reward, **more):
    """A front of those KLs and rewards, η from 0 to 1."""
    etas = np.linspace(0, 1, len(kl))
    return [{"line": line, "seed": seed, "eta": float(e), "kl": float(k), "reward": float(r), "gold": float(-r), **more}
            for e, k, r in zip(etas, kl, reward)]


def two_lines(seeds=range(8), reach=4.0):
    """`a` is .5 above `b` at every KL; `b` ends at `reach` for seed 0."""
    rows = []
    for seed in seeds:
        rows += front("a", seed, [0, 2, 4], [0.5, 1.5, 2.5])
        end = reach if seed == 0 else 4.0
        rows += front("b", seed, [0, end / 2, end], [0, end / 4, end / 2])
    return Rows("sentiment", rows)


def test_two_lines_are_compared_at_the_highest_kl_that_every_seed_reaches():
    effect = effects.at_one_kl("a", "b")(two_lines(reach=2.6))
    assert effect.level == 2.5
    assert effect.reached == {"4": 7, "3.5": 7, "3": 7, "2.5": 8, "2": 8, "1.5": 8, "1": 8, "0.5": 8}
    assert effect.means == pytest.approx(dict.fromkeys(effect.reached, 0.5))  # what other levels would say
    assert effect.values == pytest.approx({seed: 0.5 for seed in range(8)})
    nowhere = effects.at_one_kl("a", "b")(two_lines(reach=0.1))
    assert nowhere.level is None and nowhere.values == {} and nowhere.reached["0.5"] == 7


def test_the_runs_of_a_seed_count_as_their_mean():
    rows = [*front("one", 0, [0, 4], [0, 1], run=1), *front("one", 0, [0, 4], [0, 3], run=2),
            *front("other", 0, [0, 4], [0, 0])]
    effect = effects.at_one_kl("one", "other")(Rows("sentiment", rows))
    assert effect.level == 4 and effect.values == pytest.approx({0: 2.0})


def test_two_trajectories_are_compared_where_each_first_crosses_a_kl():
    rows = [{"line": line, "seed": 0, "step": step, "kl": kl, "reward": reward + more}
            for line, more in (("a", 1.0), ("b", 0.0))
            for step, kl, reward in ((20, 3.0, 9.0), (0, 0.0, 0.0), (10, 2.0, 2.0), (30, 1.0, 5.0))]
    effect = effects.at_one_kl("a", "b")(Rows("sentiment", rows))
    assert effect.level == 3.0 and effect.values == pytest.approx({0: 1.0})


def test_gold_is_read_where_the_proxy_first_gets_to_a_level():
    rows = front("a", 0, [0, 1, 2], [0, 1, 2])
    assert effects.gold_at_proxy(rows, 1.5) == pytest.approx(-1.5)
    assert math.isnan(effects.gold_at_proxy(rows, 2.5))


def test_areas_shares_and_shapes_of_curves_that_are_known():
    rows = two_lines()
    level = effects.areas("a", "b")(rows).values                                   # an area is above its own start
    assert level == pytest.approx({seed: 0.0 for seed in range(8)}, abs=1e-9)
    limit = [{"kl": 0.0, "reward": 0.5}, {"kl": 4.0, "reward": 4.5}]
    rows.limits = {draw_of(seed): limit for seed in range(8)}
    assert effects.share("a")(rows).values == pytest.approx({s: 0.5 for s in range(8)}, rel=1e-6)
    etas = np.linspace(0, 1, 6)
    curved = Rows("sentiment", front("c", 0, 3 * etas**2 + etas, 2 * etas - etas**2))
    assert effects.curvature("c", "kl")(curved).values == pytest.approx({0: 3.0})
    assert effects.curvature("c", "reward")(curved).values == pytest.approx({0: -1.0})
    under = effects.under_the_chord("c", float(etas[3]))(curved).values
    assert under == pytest.approx({0: 4 * 0.6 - (3 * 0.36 + 0.6)})


def test_the_share_of_the_limit_is_above_the_true_start_of_the_limit_and_the_measured_one_of_the_front():
    rows = two_lines()
    rows.limits = {draw_of(seed): [{"kl": 0.0, "reward": -1.0}, {"kl": 4.0, "reward": 3.0}] for seed in range(8)}
    assert effects.limit_area(rows.limits[1]) == pytest.approx(8.0, rel=1e-6)
    assert effects.share("a")(rows).values == pytest.approx({s: 0.5 for s in range(8)}, rel=1e-6)
    rows.best_of_n = {1: [{"kl": 0.0, "reward": 1.0}, {"kl": 4.0, "reward": 2.0}]}
    assert effects.best_of_n_area(rows, 0) == pytest.approx(2.0, rel=1e-6)


@pytest.mark.slow
def test_the_limit_begins_at_the_mean_of_its_samples(world, monkeypatch):
    monkeypatch.setattr(bench, "LIMIT_SAMPLES", 64)
    first = Bench("sentiment", 1, (0,), world.measured_on(world.eval_prompts.given[:8]))
    rewards, gold = first.limit_rewards()
    point, *others = [row for row in studies.limit(first) if row["line"] == "limit"]
    assert (point["kl"], point["reward"], point["gold"]) == (0.0, rewards.mean().item(), gold.mean().item())
    assert [row["kl"] for row in others] == sorted(row["kl"] for row in others) and others[0]["kl"] > 0


def test_each_draw_is_measured_by_random_numbers_of_its_own(world):
    measured = [Bench("sentiment", 1, (0,), dataclasses.replace(world, eval_seed=seed)).measure([world.sft])[0]
                for seed in (3, 3, 4)]
    assert measured[0] == measured[1] and measured[0]["reward"] != measured[2]["reward"]


@pytest.mark.slow
def test_a_refreshed_base_is_a_point_a_setting_beside_the_sft_policy(world):
    short = ShortBench("sentiment", 1, (0, 1), world.measured_on(world.eval_prompts.given[:8]))
    rows = [row for row in studies.refresh(short) if row["line"] == "refreshed base"]
    for seed in (0, 1):
        start, *points = [row for row in rows if row["seed"] == seed]
        assert start["kl"] == start["eta"] == 0 and "lr" not in start
        assert [(row["lr"], row["beta"]) for row in points] == list(REFRESH)
        fast = {row["kl"] for row in points if row["lr"] == 1e-3}
        assert fast and fast.isdisjoint(row["kl"] for row in points if row["lr"] == 1e-4)  # and not one point thrice


def test_a_band_is_the_interval_of_the_draws_at_one_level_up_to_where_the_first_seed_ends():
    heights = {0: 1.0, 1: 2.0, 2: 4.0}  # three draws: reward is height · KL, gold its negative
    rows = Rows("sentiment", [row for seed, height in heights.items() for row in front(
        "a", seed, np.linspace(0, 2 + seed, 9), height * np.linspace(0, 2 + seed, 9), run=1)])
    points = bands.banded(rows, "a")
    assert len(points) == bands.LEVELS and points[0] == {"kl": 0, "reward": [0, 0], "gold": [0, 0]}
    half = stats.t.ppf(0.975, 2) * np.std([2, 4, 8], ddof=1) / math.sqrt(3)
    assert points[-1]["kl"] == 2 and points[-1]["reward"] == pytest.approx([14 / 3, half], abs=1e-4)
    at_proxy = bands.banded(rows, "a", "reward")
    assert at_proxy[-1] == {"reward": 2.0, "gold": [-2, 0]}  # where the lowest ends
    apart = Rows("sentiment", front("a", 0, [0, 1], [0, 1]) + front("a", 1, [2, 3], [0, 1]))
    assert bands.banded(apart, "a") == []
    with pytest.raises(KeyError):
        bands.banded(rows, "b")


def test_a_decision_has_the_fields_of_claims_json_and_follows_its_rule():
    found = decide(Claim("c", "3b", "words", "s", effects.at_one_kl("a", "b"), "above"), two_lines())
    assert {"name", "world", "paper_figure", "statement", "effect", "ci_low", "ci_high", "unit", "null", "margin",
            "rule", "seeds", "verdict"} <= set(found)
    assert (found["verdict"], found["seeds"], found["draws"], found["level"]) == ("holds", 8, 8, 4)
    assert decide(Claim("c", "", "", "", effects.at_one_kl("b", "a"), "above"), two_lines())["verdict"] == "fails"
    missing = decide(Claim("c", "", "", "", effects.at_one_kl("a", "b"), "above"), two_lines(reach=0.1))
    assert (missing["verdict"], missing["effect"], missing["seeds"]) == ("unclear", None, 0)
    json.dumps(missing, allow_nan=False)


def test_the_interval_is_that_of_a_t_test_on_the_means_of_groups():
    rng = np.random.default_rng(0)
    values = rng.normal(0.4, 1, (5, 1)) + rng.normal(0, 0.7, (5, 3))
    interval = t_interval(values.ravel(), np.repeat(np.arange(5), 3))
    test = stats.ttest_1samp(values.mean(1), 0.1)
    assert (interval.low, interval.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert interval.p_value(0.1) == pytest.approx(test.pvalue)
    assert (interval.count, interval.groups) == (15, 5)
    alone = t_interval(values.mean(1))
    assert (alone.low, alone.high, alone.count) == (interval.low, interval.high, 5)


def test_a_group_counts_as_one_however_many_values_it_has_and_nan_is_left_out():
    interval = t_interval([1, 1, 1, 3, math.nan], ["a", "a", "a", "b", "b"])
    assert interval.mean == 2 and interval.count == 4 and interval.groups == 2
    assert interval.high - 2 == pytest.approx(stats.t.ppf(0.975, 1))  # the standard error of 1 and 3 is 1
    for values, groups in (([1.0, 2.0], ["a", "a"]), ([1.0], ["a"]), ([math.nan], ["a"]), ([], [])):
        few = t_interval(values, groups)
        assert math.isnan(few.low) and math.isnan(few.p_value()) and few.verdict("above") == "unclear"
    assert math.isnan(t_interval([math.nan]).mean)
    with pytest.raises(ValueError, match="1 values and 2 groups"):
        t_interval([1.0], ["a", "b"])


@pytest.mark.parametrize("low, high, rule, null, expected", [
    (-0.04, 0.05, "above", 0, "no difference"), (0.01, 0.04, "above", 0, "no difference"),
    (-0.04, 0.06, "above", 0, "unclear"), (0.01, 0.06, "above", 0, "holds"), (-0.06, -0.01, "above", 0, "fails"),
    (-0.06, -0.01, "below", 0, "holds"), (0.97, 1.01, "below", 1, "no difference"), (0.93, 0.99, "below", 1, "holds"),
    (math.nan, math.nan, "above", 0, "unclear")])
def test_an_interval_within_what_is_worth_having_is_no_difference_on_either_side(low, high, rule, null, expected):
    assert verdict(low, high, rule, null, worth=0.05) == expected
    assert verdict(-0.04, 0.05, "above") == "unclear"  # none is asked for
    assert verdict(-0.04, 0.04, "within", margin=0.05, worth=0.05) == "holds"


def test_the_interval_in_use_covers_what_it_says_at_every_spread_and_the_percentile_bootstrap_does_not():
    cells = [cell for cell in load("coverage")["cells"] if cell["shape"] == "normal"]
    assert {(cell["draws"], cell["seeds"], cell["ratio"]) for cell in cells} == set(
        product(coverage.DRAWS, coverage.SEEDS, coverage.RATIOS))
    ours, _, percentile = coverage.METHODS
    assert min(cell[ours] for cell in cells) >= 0.93
    assert min(cell[percentile] for cell in cells) < 0.85
    (committed,) = [cell for cell in cells if (cell["draws"], cell["seeds"], cell["ratio"]) == (4, 4, 2.0)]
    again = coverage.coverage(4, 4, 2.0, "normal", repetitions=600, resamples=200, seed=1)
    for method in coverage.METHODS:  # four standard errors of 600 repetitions, and those of the 2,000
        spread = math.sqrt(committed[method] * (1 - committed[method]) * (1 / 600 + 1 / 2000))
        assert again[method] == pytest.approx(committed[method], abs=4 * spread)


def test_false_verdicts_are_counted_by_benjamini_and_hochberg():
    verdicts = [{"verdict": "holds", "p_value": p} for p in (0.001, 0.008, 0.039, 0.041)]
    verdicts += [{"verdict": "unclear", "p_value": p} for p in (0.06, 0.07, 0.2)] + [{"verdict": "fails"}]
    counts = report.chance(verdicts)
    # of seven p-values the k-th smallest must be at most .05 k / 7: .007, .014, .021, .029 …
    assert (counts["kept_by_benjamini_hochberg"], counts["clear_and_tested"]) == (2, 4)
    # and whatever depends on what, less by the factor 1 + 1/2 + … + 1/7 = 2.593: .0028, .0055, …
    assert counts["kept_by_benjamini_yekutieli"] == 1 and counts["expected_clear_by_chance"] == 0.4  # 5 % of seven
    assert (counts["holds"], counts["fails"], counts["no difference"], counts["unclear"]) == (4, 1, 0, 3)


def test_seeds_of_verdicts_share_neither_seed_nor_draw_with_those_of_tuning():
    reported = range(0, 400)
    assert not set(reported) & set(TUNING_SEEDS)
    assert not {draw_of(seed) for seed in reported} & {draw_of(seed) for seed in TUNING_SEEDS}
    assert len({draw_of(seed) for seed in reported}) == len(reported)
    assert [draw_of(seed) for seed in range(16)] == list(range(1, 17))
    assert len({draw_of(seed) for seed in TUNING_SEEDS}) == len(TUNING_SEEDS) >= 3


def test_the_noise_scale_of_gradients_whose_noise_and_signal_are_known():
    rng = torch.Generator().manual_seed(0)
    P, batch, batches = 4000, 8, 64
    signal = torch.full((P,), 0.05, dtype=torch.float64)                          # |G|² = 10
    per_sample = 0.5                                                              # tr Σ = 4000 · 0.25 = 1000
    noise_ = torch.randn(batches, P, generator=rng, dtype=torch.float64) * per_sample / math.sqrt(batch)
    assert noise_scale(signal + noise_, batch) == pytest.approx(1000 / 10, rel=0.1)
    assert noise_scale(noise_ - noise_.mean(0), batch) == math.inf


def test_what_predicts_the_gain_is_found_and_what_does_not_is_not():
    rng = np.random.default_rng(0)
    rows, draws = [], []
    for seed in range(8):
        for batch in (2, 4, 8, 16):
            for lr in (1e-4, 1e-3):
                rows.append({"batch": batch, "lr": lr, "seed": seed, "gain": 1 / batch + lr + rng.normal(0, 1e-3),
                             "noise over signal": 9 / batch + lr, "angle": -9 / batch - lr,
                             "noise scale": rng.normal(), "short angle": 1.0})
                draws.append(seed % 4)
    found = noise.correlations(rows, draws, resamples=200)
    assert found["noise over signal"]["correlation"] > 0.95 and found["angle"]["correlation"] < -0.95
    assert found["noise scale"]["ci_low"] < 0.6 and found["noise over signal"]["ci_low"] > 0.8


def noise_rows(law, draws=range(6), spread=0.0):
    """Rows of the noise map in which a law holds, but for some noise."""
    rng = np.random.default_rng(0)
    rows = []
    for draw in draws:
        for config in NOISE_GRID:
            cell = {"batch": config.batch_size, "lr": config.lr, "reach": 2.0 + config.lr * 300, "steps": 100,
                    "short angle": 88 - 9 * math.log2(config.batch_size) - config.lr * 2000}
            rows.append({**cell, "draw": draw, "gain": float(law.mean_gain([cell])[0] + rng.normal(0, spread))})
    return rows


def test_what_merging_adds_to_the_share_of_signal():
    M, rng = 4, np.random.default_rng(0)
    signal = np.zeros(20_000)
    signal[0] = 50.0                                          # squared: 2,500 against 20,000 · .25 = 5,000 of noise
    runs = signal + rng.normal(0, 0.5, (M, len(signal)))
    rho = float(np.mean([runs[a] @ runs[b] / np.linalg.norm(runs[a]) / np.linalg.norm(runs[b])
                         for a, b in product(range(M), repeat=2) if a < b]))
    assert rho == pytest.approx(1 / 3, abs=0.02)
    aligned = [np.linalg.norm(v @ signal / 50) / np.linalg.norm(v) for v in (runs.mean(0), *runs)]  # cos with signal
    assert law.merging_gain(rho, M) == pytest.approx(aligned[0] - np.mean(aligned[1:]), abs=0.01)
    assert law.merging_gain([0.0, 1.0]) == pytest.approx(0)
    assert law.share_of_signal(60, law.SHORT, 0.7) == pytest.approx(0.5)      # cos 60°, and as many steps
    assert law.share_of_signal(60, 3 * law.SHORT, 1.0) == pytest.approx(0.75)  # odds of 1 become 3


def test_a_law_that_holds_is_found_and_one_that_does_not_is_seen_to_fail():
    truth = law.Law(0.8, 0.5)
    rows = {"here": noise_rows(truth, spread=0.002), "there": noise_rows(truth, spread=0.002)}
    found = law.tested_law(rows, "here", resamples=40)
    assert found["c"]["value"] == pytest.approx(0.8, abs=0.1) and found["alpha"]["value"] == pytest.approx(0.5, abs=0.2)
    assert set(found["tests"]) == {"other half", "there"}
    assert all(test["r_squared"]["value"] > 0.9 for test in found["tests"].values())
    assert found["c"]["ci_low"] <= found["c"]["value"] <= found["c"]["ci_high"]
    for row in rows["there"]:
        row["gain"] = 0.2 - row["gain"]
    assert law.tested_law(rows, "here", resamples=5)["tests"]["there"]["rank_correlation"]["value"] < -0.5
    halves = [law.fitting_cells({"batch": c.batch_size, "lr": c.lr}) for c in NOISE_GRID]
    assert sum(halves) == 8 and halves[0] and not halves[1]


def test_what_an_exchange_must_cost_for_workers_that_exchange_once_to_wait_less():
    steps, areas = np.array([0, 50, 100, 200]), np.array([0, 1.0, 2.0, 2.5])
    # 1.5 is reached after 75 steps: 200 + c = 75 + 75 c, so c = 125 / 74
    assert waiting.cost_of_exchange(steps, areas, 1.5) == pytest.approx(125 / 74)
    assert waiting.cost_of_exchange(steps, areas, 3.0) == 0   # never reached: no longer to wait
    rows = [row for n, area_ in ((50, 0.5), (200, 1.0)) for seed in range(2) for row in (
        *front("merged", seed, [0, 4], [0, area_], workers=4, batch=2, steps=n),
        *front("shared batch", seed, [0, 4], [0, 2 * area_], completions=8, steps=n))]
    rows = Rows("sentiment", rows)
    one = waiting.areas_by_steps(rows, waiting.both(4, 2)[0], 0)[1][-1]
    assert waiting.at_the_end(4, 2)(rows).values == pytest.approx({0: -one, 1: -one})
    assert waiting.break_even(4, 2)(rows).values == pytest.approx({seed: 150 / 49 for seed in range(2)})


def test_verdicts_of_two_halves_of_the_draws_are_counted_where_they_differ():
    claim = Claim("c", "", "", "", effects.at_one_kl("a", "b"), "above")
    turning = {seed: (1.0 if draw_of(seed) <= 4 else -1.0) + seed / 100 for seed in range(8)}
    assert verdicts_of_halves(claim, "sentiment", turning) == ["holds", "fails"]
    pairs = (["holds", "fails"], ["holds", "holds"], ["holds", "unclear"], ["fails", "holds"])
    assert report.stability([{"halves": pair} for pair in pairs]) == {"same": 1, "moved": 3, "turned": 2}


def test_the_gain_of_a_merge_is_the_mean_over_the_kl_that_all_reach():
    merged, low, high = (front("", 0, [0, end], [0, end * slope]) for end, slope in ((5, 1), (4, 0.5), (3, 0.7)))
    gain, reach = noise.mean_gain(merged, [low, high])
    assert reach == 3 and gain == pytest.approx(np.mean(np.linspace(0, 3, 41)[1:]) * 0.4)


def test_settings_are_chosen_by_their_mean_among_those_that_get_there():
    assert tuning.choose({"a": [1.0, 1.0], "b": [0.0, 3.0], "c": [9.0, None]}) == "b"
    with pytest.raises(ValueError, match="none of a has a score for every seed"):
        tuning.choose({"a": [None]})
    rising = front("", 0, [0, 1, 2], [0, 1, 2])
    assert tuning.gold_kept(rising) == pytest.approx(-0.8) and tuning.gold_kept(rising, upto=3) is None


def fake_study(bench):
    """A study that says how often it was run."""
    fake_study.calls += 1
    return [{"line": "x", "seed": seed, "value": float(seed)} for seed in bench]


def test_units_are_run_once_and_again_where_their_file_is_damaged(tmp_path, monkeypatch):
    fake_study.calls = 0
    monkeypatch.setattr(runner, "studies", lambda: {"fake": fake_study})
    monkeypatch.setattr(runner.Bench, "of", classmethod(lambda cls, world, draw, seeds: Seeds(seeds)))
    units = runner.units_of(["fake"], ["sentiment"], range(4))
    assert [(unit.draw, unit.seeds) for unit in units] == [(draw_of(seed), (seed,)) for seed in range(4)]
    first = runner.run_units(units, tmp_path, workers=1, progress=False)
    assert fake_study.calls == 4 and [row["seed"] for row in first[1]["rows"]] == [1]
    assert runner.run_units(units, tmp_path, workers=1, progress=False) == first and fake_study.calls == 4
    units[2].file(tmp_path).write_text('{"rows": [')
    again = runner.run_units(units, tmp_path, workers=1, progress=False)
    assert fake_study.calls == 5 and [some["rows"] for some in again] == [some["rows"] for some in first]
    assert units[0].fingerprint() != runner.Unit("fake", "sentiment", 1, (0, 8)).fingerprint()


def test_a_unit_with_all_lines_serves_for_one_with_some_and_not_the_other_way_round(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "studies", lambda: {"fake": fake_study})
    monkeypatch.setattr(runner.Bench, "of", classmethod(lambda cls, world, draw, seeds: Seeds(seeds)))
    whole = runner.units_of(["fake"], ["sentiment"], [0])
    some = runner.units_of(["fake"], ["sentiment"], [0], {("sentiment", "fake"): ("x",)})
    fake_study.calls = 0
    for units, calls in ((some, 1), (some, 1), (whole, 2), (some, 2)):
        runner.run_units(units, tmp_path, workers=1, progress=False)
        assert fake_study.calls == calls
    assert runner.units_of(["fake"], ["sentiment"], [0], {("sentiment", "fake"): None}) == whole


class Seeds(tuple):
    """What stands in for a bench: its seeds, and attributes."""


def test_the_lines_that_claims_need_are_those_they_compare_or_all():
    by_name = {claim.name: claim for claim in CLAIMS}

    def needed(*names):
        return lines_needed([by_name[name] for name in names], ["sentiment"])

    assert needed("4-runs-against-1") == {("sentiment", "merging"): ("run", "slerp-4")}
    assert needed("4-runs-against-1", "liti-trajectory")["sentiment", "merging"] == (
        "run", "slerp-2", "slerp-4", "trajectory")
    assert needed("4-runs-against-1", "angle") == {("sentiment", "merging"): None}
    assert needed("ablation-lerp", "ema-anchor") == {
        ("sentiment", "iterations"): ("LERP", "WARP"),
        ("sentiment", "anchors"): ("EMA", "SFT")}


def test_a_unit_is_run_again_where_what_its_rows_depend_on_has_changed(tmp_path, monkeypatch):
    unit, tuning_unit = (runner.Unit(name, "sentiment", 1, (0, 4)) for name in ("anchors", "tuning of weak"))
    before = unit.fingerprint(), tuning_unit.fingerprint()
    with monkeypatch.context() as patched:  # code in a module that the study calls
        patched.setattr(provenance, "_code", lambda path: "changed" if path.name == "liti.py" else "as it was")
        changed = unit.fingerprint()
        patched.setattr(provenance, "_code", lambda path: "as it was")
        assert unit.fingerprint() != changed != before[0]
        drawing = ("plots.py", "report.py", "wording.py", "drawing.py")
        patched.setattr(provenance, "_code", lambda path: "changed" if path.name in drawing else "as it was")
        drawn = unit.fingerprint()
        patched.setattr(provenance, "_code", lambda path: "as it was")
        assert unit.fingerprint() == drawn
    with monkeypatch.context() as patched:
        patched.setattr(runner, "package_versions", lambda: {"torch": "9"})
        assert unit.fingerprint() != before[0]
    with monkeypatch.context() as patched:
        patched.setattr(runner.settings, "ETAS", (0.5,))
        assert unit.fingerprint() != before[0]
    with monkeypatch.context() as patched:  # what was chosen counts where it is used, and not while it is chosen
        chosen = runner.tuned_configs("sentiment")
        patched.setattr(runner, "tuned_configs", lambda world: {**chosen, "EMA anchor": {"beta": 9}})
        assert unit.fingerprint() != before[0] and tuning_unit.fingerprint() == before[1]
        patched.setattr(runner, "tuned_configs", lambda world: {**chosen, "best WARP": {"beta": 9}})
        assert unit.fingerprint() == before[0]
    assert (unit.fingerprint(), tuning_unit.fingerprint()) == before
    assert unit.fingerprint() != runner.Unit("equal", "sentiment", 1, (0, 4)).fingerprint()


def test_rows_are_reported_with_the_commit_that_made_them_and_not_with_todays(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "studies", lambda: {"s": two_line_study})
    monkeypatch.setattr(runner.Bench, "of", classmethod(lambda cls, world, draw, seeds: Seeds(seeds)))
    claim = Claim("c", "3b", "a is above b", "s", effects.at_one_kl("a", "b"), "above", lines=("a", "b"))
    stamp = runner.provenance()
    commits = iter(["1111111111aa"] * 2 + ["2222222222bb"] * 2)
    monkeypatch.setattr(runner, "provenance", lambda: {**stamp, "commit": next(commits)})
    runner.run_units(runner.units_of(["s"], ["sentiment"], (0, 1)), tmp_path, workers=1, progress=False)
    evidence = report.gather(["s"], ["sentiment"], range(4), tmp_path, workers=1, progress=False)  # two are kept
    found = report.report([claim], evidence, ["sentiment"], range(4), whole=False)
    assert [(made["commit"], made["studies"]) for made in found["provenance"]] == [
        ("1111111111aa", ["sentiment, s"]), ("2222222222bb", ["sentiment, s"])]
    assert found["claims"][0]["commits"] == ["1111111111aa", "2222222222bb"]
    assert all(made["code"] and made["packages"] == stamp["packages"] for made in found["provenance"])
    text = report.write_report(found, [claim], evidence, tmp_path)
    assert "at commit 1111111111: sentiment, s" in text and "at commit 2222222222: sentiment, s" in text


def two_line_study(bench):
    """The lines `a` and `b`, `a` above."""
    return [row for seed in bench for row in (*front("a", seed, [0, 4], [0, 2]), *front("b", seed, [0, 4], [0, 1]))]


def test_the_table_and_the_figure_say_what_the_json_says(tmp_path):
    claim = Claim("c", "3b", "a is above b", "s", effects.at_one_kl("a", "b"), "above", lines=("a", "b"))
    rows = two_lines(reach=2.6)
    found = report.report([claim], {("sentiment", "s"): rows}, ["sentiment"], range(8), whole=False)
    text = report.write_report(found, [claim], {("sentiment", "s"): rows}, tmp_path)
    assert "| a is above b | 3b | **holds** +0.50 [+0.50, +0.50] reward, at 2.5 nats (8 reach it) |" in text
    assert "8 seeds on 8 draws" in text and "Of 1 verdicts 1 hold, 0 fail, 0 say" in text
    assert json.loads((tmp_path / "claims.json").read_text())["claims"][0]["verdict"] == "holds"
    assert (tmp_path / "figures" / "c.png").stat().st_size > 5000


def test_the_command_refuses_what_it_cannot_use(tmp_path, capsys):
    (tmp_path / "other").write_text("mine")
    for arguments, words in ((["--only", "nonsense", "--out", "x"], "there is no claim 'nonsense'"),
                             ([], "--out is missing"), (["--out", str(tmp_path)], "holds no evidence"),
                             (["--out", str(tmp_path / "new"), "--seeds", "0"], "--seeds must be 1 or more"),
                             (["--out", str(tmp_path / "new"), "--world", "mars"], "there is no world 'mars'")):
        assert main(["claims", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert (tmp_path / "other").read_text() == "mine" and not (tmp_path / "new").exists()
    assert main(["claims", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(ALL)


def test_claims_have_names_of_their_own_and_studies_that_exist():
    assert len({claim.name for claim in ALL}) == len(ALL)
    assert {claim.study for claim in ALL} <= set(runner.studies())


def test_a_difference_of_gains_is_taken_where_all_four_lines_arrive():
    rows = []
    for seed in range(4):
        for size, gain, end in (("small", 0.25, 4.0), ("large", 1.0, 2.2 if seed == 3 else 4.0)):
            rows += front("run", seed, [0, end], [0, end / 2], size=size, run=1)
            rows += front("slerp-4", seed, [0, end], [gain, gain + end / 2], size=size)
    effect = decisive.difference_of_gains({"size": "large"}, {"size": "small"})(Rows("sentiment", rows))
    assert effect.level == 2.0 and effect.values == pytest.approx({seed: 0.75 for seed in range(4)})


def test_the_best_line_is_chosen_on_the_other_seeds_alone():
    at_the_end = {"x": [0, 0, 9], "y": [1, 1, 1], "z": [2, 2, 2]}
    rows = [row for name, values in at_the_end.items() for seed, value in enumerate(values)
            for row in front(name, seed, [0, 4], [0, value])]
    effect = decisive.best_of_others(["x", "y"], ["z"])(Rows("sentiment", rows))
    # x has the higher mean for seeds 0 and 1, whose others hold the 9; for seed 2 y is chosen
    assert effect.values == pytest.approx({0: -2.0, 1: -2.0, 2: -1.0}) and effect.level == 4


def test_a_study_has_no_setting_that_it_does_not_say_it_uses(world):
    some = Bench("sentiment", 1, (0,), world)
    assert some.tuned("best WARP") == tuned("sentiment", "best WARP")
    some.asks = asked_by(STUDIES["anchors"])
    assert some.tuned("SFT anchor") == tuned("sentiment", "SFT anchor")
    with pytest.raises(ValueError, match="uses the setting for 'best WARP', but is marked with EMA anchor, SFT anchor"):
        some.tuned("best WARP")
    with pytest.raises(ValueError, match="no setting was chosen for 'x' in the world 'sentiment'"):
        tuned("sentiment", "x")


class ShortBench(Bench):
    """A bench whose runs take two steps of two completions; a study is told that what it may keep is of the last."""

    def train(self, configs, checkpoints=None, **options):
        if checkpoints is not None:
            options["checkpoints"] = lambda name, seed, iteration, run, step, weights: checkpoints(
                name, seed, iteration, run, 10**6, weights)
        return super().train({name: config.replace(steps=2, batch_size=2, eval_every=min(1, config.eval_every))
                              for name, config in configs.items()}, **options)


@pytest.mark.slow
@pytest.mark.parametrize("study", [*STUDIES, *decisive.DECISIVE, "waiting"])
def test_a_study_has_the_lines_that_its_claims_ask_for(study, world, monkeypatch):
    for module in (studies, decisive):  # one world for all settings: what is asked is only whether lines are there
        monkeypatch.setattr(module, "reviews_world", lambda **settings: world)
    monkeypatch.setattr(bench, "LIMIT_SAMPLES", 64)
    short = ShortBench("sentiment", 1, (0,), world.measured_on(world.eval_prompts.given[:8]),
                       asks=asked_by(runner.studies()[study]))
    rows = runner.studies()[study](short)
    limit = rows if study == "limit" else STUDIES["limit"](short) if study in ("equal", "best") else []
    bounds = [{1: [row for row in limit if row["line"] == line]} for line in ("limit", "best of n")]
    for claim in ALL:
        if claim.study == study:
            decided = decide(claim, Rows("sentiment", rows, *bounds))
            assert decided.get("reached") or decided["seeds"] == 1, claim.name
            lines = lines_needed([claim], ["sentiment"])["sentiment", study]
            if lines is not None:  # and no others
                only = [row for row in rows if row["line"] in lines]
                assert decide(claim, Rows("sentiment", only, *bounds)) == decided


@pytest.mark.parametrize("lines", [("run", "slerp-4"), ("average",), ("trajectory",)])
def test_lines_that_are_not_asked_for_are_not_measured_and_change_no_others(lines, world, monkeypatch):
    whole = ShortBench("sentiment", 1, (0,), world.measured_on(world.eval_prompts.given[:4]))
    expected = STUDIES["merging"](whole)
    some = dataclasses.replace(whole, lines=frozenset(lines))
    measured = []
    monkeypatch.setattr(bench, "evaluate_many", lambda task, stacked, original=bench.evaluate_many, **options: (
        measured.append(len(next(iter(stacked.values())))), original(task, stacked, **options))[1])
    rows = [row for row in STUDIES["merging"](some) if "value" not in row]
    assert {row["line"] for row in rows} == set(lines)
    for row, other in zip(rows, (row for row in expected if row["line"] in lines), strict=True):
        assert row == pytest.approx(other, abs=2e-5)  # rounded to five places, in batches of other sizes
    policies = {("run", "slerp-4"): 20 * (5 + 1) + 1, ("average",): 20 * 2 + 1, ("trajectory",): 1}
    assert sum(measured) == policies[lines]
    assert rows and all(row["line"] for row in rows)


@pytest.fixture(scope="module")
def committed():
    return load("claims")


def test_the_committed_bands_are_of_the_committed_curves_and_apart_by_the_effects_that_claims_have(committed):
    kept = load("bands")
    assert [kept[name] for name in ("seeds", "draws", "provenance")] == [
        committed[name] for name in ("seeds", "draws", "provenance")]
    places = [[(c["world"], c["study"], c["line"]) for c in found["curves"]] for found in (kept, committed)]
    assert places[0] == places[1]
    points = {(world, study, str(line)): c["points"] for (world, study, line), c in zip(places[0], kept["curves"])}
    compared, by_name = 0, {claim.name: claim for claim in CLAIMS}
    for found in committed["claims"]:
        lines = [effects.line_of(line, Rows(found["world"], [])) for line in by_name[found["name"]].lines]
        if found.get("level") is None or len(lines) != 2 or found["name"].endswith("-best"):
            continue  # the last are of what lies at a KL or below, and curves of what lies at it
        x = "reward" if found["study"] == "weak" else "kl"
        what = {"gold reward": "gold", "per token": "perplexity"}.get(found["unit"], "reward")
        a, b = (np.interp(found["level"], *zip(*((point[x], point[what][0]) for point in
                                                 points[found["world"], found["study"], str(line)])))
                for line in lines)
        between = 0.05 if found["study"] == "anchors" else 0.01  # trajectories jump between two levels of a curve
        assert a - b == pytest.approx(found["effect"], abs=between), found["name"]
        compared += 1
    assert compared > 50


def test_committed_verdicts_follow_from_their_values_by_their_rule(committed):
    by_name = {claim.name: claim for claim in CLAIMS}
    for entry in committed["claims"]:
        again = decide_values(by_name[entry["name"]], entry["world"],
                              {int(seed): value for seed, value in entry["values"].items()})
        numbers = {name for name, value in again.items() if isinstance(value, float)}
        assert [entry[name] for name in numbers] == pytest.approx([again[name] for name in numbers], abs=1e-4)
        assert {name: entry[name] for name in again.keys() - numbers} == {
            name: again[name] for name in again.keys() - numbers}
        assert entry["verdict"] in VERDICTS and entry["headline"] == (entry["name"] in HEADLINES)


def test_the_committed_evidence_is_of_every_claim_with_a_draw_a_seed(committed):
    assert {claim["name"] for claim in committed["claims"]} == {claim.name for claim in CLAIMS}
    assert len(committed["seeds"]) == len(committed["draws"]) >= 11
    assert not set(committed["seeds"]) & set(committed["tuning_seeds"])
    assert not set(committed["draws"]) & set(committed["tuning_draws"])
    for line in wording.made_by(committed):
        assert re.fullmatch(r"torch [\w.+]+, transformers [\w.]+, warp-lite [\w.]+ at commit [0-9a-f]{10}(: .*)?", line)
    counts = report.chance(committed["claims"])
    assert committed["chance"] == counts and counts["verdicts"] == len(committed["claims"])
    assert load("decisive")["chance"] == report.chance(load("decisive")["claims"])
    by_name = {claim.name: claim for claim in CLAIMS}
    for entry in committed["claims"]:
        values = {int(seed): value for seed, value in entry["values"].items()}
        assert entry["halves"] == verdicts_of_halves(by_name[entry["name"]], entry["world"], values)
    assert committed["stability"] == report.stability(committed["claims"])


def test_committed_settings_are_the_best_of_those_that_were_tried():
    for found in load("tuned")["worlds"].values():
        assert set(found) == set(tuning.grids())
        for purpose, chosen in found.items():
            scores = {name: score for name, score in chosen["scores"].items() if score is not None}
            assert chosen["chosen"] == max(scores, key=scores.get)
            assert WarpConfig(**chosen["config"]) == tuning.grids()[purpose][chosen["chosen"]]


def test_a_setting_at_the_edge_of_what_was_tried_is_named():
    found = load("tuned")
    for purpose, name, value in (("WARP", "lr", 3.75e-5), ("one long run", "beta", 2.4)):
        moved = json.loads(json.dumps(found))
        moved["worlds"]["detail"][purpose]["config"][name] = value
        assert f"detail, {purpose}: {name} = {value:g}" in wording.at_an_edge(moved)
    moved["worlds"] = {"detail": {"WARP": {"config": {"lr": 3e-4, "beta": 0.3}}}}
    assert wording.at_an_edge(moved) == []


def test_the_readme_says_what_the_committed_evidence_says(committed):
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert wording.headlines(committed) in text and wording.summary(committed) in text
    best = [wording.short(claim) for claim in committed["claims"] if claim["name"] == "liti-trajectory-best"]
    assert "LITI of two merged policies {} in sentiment and {} in detail".format(*best) in text


def test_more_draws_leave_fewer_unclear_and_as_many_as_there_are_leave_as_many(committed):
    share = [wording.unclear_with(committed, draws) for draws in (len(committed["draws"]), 32, 64, 10**9)]
    assert share == sorted(share, reverse=True) and share[-1] < 0.02
    assert share[0] == committed["chance"]["unclear"] / committed["chance"]["verdicts"]
    one = {"claims": [{**claim, "draws": 1, "ci_low": None, "ci_high": None, "verdict": "unclear"}
                      for claim in committed["claims"][:3]]}
    assert wording.unclear_with(one, 64) == 1
    values = np.random.default_rng(0).normal(size=9)  # four times as many of one mean and one spread
    spread = values.std(ddof=1)
    many = values.mean() + spread * np.sqrt(35 / 36) * np.repeat([1, -1], 18)
    assert many.std(ddof=1) == pytest.approx(spread)
    found, expected = t_interval(values).with_groups(36), t_interval(many)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert f"{t_interval([1.0])}" == "1.00 [–, –]" and f"{t_interval([1.0, 3.0]):.1f}" == "2.0 [-10.7, 14.7]"
    assert math.isnan(t_interval([1.0]).with_groups(9).low) and math.isnan(found.with_groups(1).low)


def test_evidence_that_is_not_there_is_named():
    names = "bands, claims, coverage, decisive, four_draws, noise, predictions, smollm2, tuned"
    with pytest.raises(ValueError, match=f"there is no evidence 'nonsense'; there is {names}"):
        load("nonsense")
