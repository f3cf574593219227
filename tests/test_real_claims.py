"""The claims on a real language model, on rows that were invented: no model is needed."""

import json
import math
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from warp_lite.cli import main
from warp_lite.evidence import load, real, real_units, settings
from warp_lite.evidence.real_units import (
    LINES,
    PILOT_SEED,
    SFT_BETAS_REAL,
    TRACED,
    RealUnit,
    mean_angle,
    needs,
    units_of_seeds,
)
from warp_lite.evidence.wording import cell
from warp_lite.notebooks import draw_real
from warp_lite.notebooks.scenes import write_real_front
from warp_lite.storage.provenance import provenance
from warp_lite.worlds import english

SEEDS = (0, 1, 2)
LAWS = {"laws": [{"fitted_in": "detail", "c": {"value": 0.9}, "alpha": {"value": 0.0}}]}


def numbers(kl, reward, drift):
    """What is measured of a policy; gold follows the reward at half its pace."""
    return {"kl": kl, "reward": reward, "gold": reward / 2, "length": 12 - drift, "distinct": 0.6 - drift / 10}


def front(line, seed, slope, end, **more):
    """A front; perplexity is measured of merges and of the larger batch alone."""
    rows = [{"line": line, "seed": seed, "eta": eta, **numbers(end * eta**2, slope * eta + seed / 100, eta), **more}
            for eta in (0.2, 0.4, 0.6, 0.8, 1.0)]
    return rows if more else [{**row, "perplexity": 9 * math.exp(row["eta"] / 4)} for row in rows]


def path(line, seed, slope, run):
    return [{"line": line, "seed": seed, "run": run, "step": step, **numbers(step / 10, slope * step / 40, step / 40)}
            for step in (10, 20, 30, 40)]


def invented():
    """Units of three seeds: merging gains .5 at the end, a second iteration .25 more, the larger batch as much."""
    rows = {RealUnit("sft"): [{"line": "θ_sft", "seed": None, "eta": 0.0, **numbers(0.0, 0.0, 0.0), "perplexity": 9.0}],
            RealUnit("pilot", PILOT_SEED, "WARP", 1): [{"line": "short angle", "seed": None, "value": 60.0}],
            RealUnit("limit"): [{"line": "limit", "seed": None, "kl": 1.0, "reward": 2.0},
                                {"line": "best of n", "seed": None, "kl": 1.0, "reward": 1.5}]}
    for seed in SEEDS:
        rows |= {RealUnit("front", seed, "WARP", 1, m): front("run", seed, 1.0, 4.0, run=m) for m in (1, 2, 3, 4)}
        rows |= {RealUnit("front", seed, "WARP", 1): front("slerp-4", seed, 1.5, 4.0),
                 RealUnit("front", seed, "LERP", 1): front("lerp-4", seed, 1.25, 3.0),
                 RealUnit("front", seed, "WARP", 2): front("WARP, 2", seed, 1.75, 4.5),
                 RealUnit("front", seed, "batch of 16", 1): front("batch of 16", seed, 1.0, 4.0),
                 RealUnit("front", seed, "batch of 16", 2): front("batch of 16, 2", seed, 1.75, 4.5),
                 RealUnit("geometry", seed, "WARP", 1): [{"line": "angle", "seed": seed, "value": 80.0 + seed},
                                                        {"line": "norm of LERP", "seed": seed, "value": 0.65}],
                 RealUnit("texts", seed, "WARP", 2): [{"line": "completion", "seed": seed, "eta": 0.5,
                                                       "prompt": "I saw", "completion": " it.", "reward": 1.0}]}
        rows |= {RealUnit("run", seed, "WARP", i, m):
                 path("trajectory", seed, 0.8, m) if i == 1 and m <= TRACED["WARP"] else []
                 for i in (1, 2) for m in (1, 2, 3, 4)}
        rows |= {RealUnit("run", seed, f"SFT, β = {beta:g}", 1, 1): path(f"SFT, β = {beta:g}", seed, 0.4 + beta, 1)
                 for beta in SFT_BETAS_REAL}
    return [{"unit": {"kind": unit.kind, "seed": unit.seed, "line": unit.line, "run": unit.run}, "rows": some,
             "steps": 40 if unit.kind == "run" else 0, "samples": 160 if unit.kind == "run" else 0, "cpu_seconds": 90.0,
             "provenance": provenance()} for unit, some in rows.items()]


@pytest.fixture(scope="module")
def report():
    return real.real_report(invented(), SEEDS, load("predictions"))


def test_every_claim_is_decided_with_a_statement_and_seeds_are_what_the_interval_covers(report):
    by_name = {claim["name"]: claim for claim in report["claims"]}
    assert set(by_name) == {claim.name for claim in real.REAL_CLAIMS}
    assert all(claim["statement"] and claim["seeds"] == claim["draws"] == 3 for claim in by_name.values())
    verdicts = {name: claim["verdict"] for name, claim in by_name.items()}
    assert verdicts["4-runs-against-1"] == verdicts["iteration-2-reach"] == verdicts["gold"] == "holds"
    assert verdicts["liti-one"] == verdicts["norm-lerp"] == "holds"
    assert verdicts["diversity"] == verdicts["forgetting"] == "holds" and verdicts["length"] == "fails"
    assert (verdicts["equal-batch-of-16-once"], verdicts["equal-batch-of-16"]) == ("holds", "no difference")
    assert by_name["angle"]["effect"] == pytest.approx(81.0)
    assert by_name["forgetting"]["effect"] == pytest.approx(0.25)  # nats a token
    assert "seeds, which share" in report["interval"]


def test_the_sft_anchor_is_held_against_at_the_beta_that_is_best_on_the_other_seeds(report):
    (claim,) = [claim for claim in report["claims"] if claim["name"] == "ema-anchor"]
    slope = 0.4 + max(SFT_BETAS_REAL)  # all runs reach 4 nats at step 40
    assert claim["level"] == 4.0 and claim["effect"] == pytest.approx(0.8 - slope)


def test_every_front_and_path_starts_at_the_sft_policy(report):
    rows = real.with_starts(invented())
    for line in ("run", "slerp-4", "WARP, 2"):
        first = [row for row in rows if row["line"] == line and row["seed"] == 1 and row["eta"] == 0]
        assert first and all(row["kl"] == row["reward"] == 0 for row in first)
    starts = [row for row in rows if row["line"] == "trajectory" and row["seed"] == 2 and row["step"] == 0]
    assert [row["run"] for row in starts] == [1]
    for row in rows:  # a start has the numbers of its line, so that a mean curve finds them in every row
        same = [other for other in rows if other.get("kl") is not None and (other["line"], other["seed"]) == (
            row["line"], row["seed"]) and other["seed"] is not None]
        assert all(other.keys() == same[0].keys() for other in same)
    assert next(row for row in report["rows"] if row["line"] == "slerp-4")["eta"] == 0
    assert len(report["completions"]) == len(SEEDS)
    assert report["limit"][0]["reward"] == 2.0 and report["best_of_n"][0]["reward"] == 1.5


def test_what_a_line_costs_is_of_one_seed(report):
    by_line = {row["line"]: row for row in report["costs"]}
    warp = by_line["WARP"]
    assert (warp["steps"], warp["samples"], warp["cpu_hours"]) == (8 * 40, 8 * 160, 0.2)  # eight runs of 90 s
    assert warp["steps_in_sequence"] == LINES["WARP"].iterations * LINES["WARP"].steps


def curve(study, line, **ends):
    return {"study": study, "line": line, "points": [{"eta": eta, **{name: value[n] for name, value in ends.items()}}
                                                     for n, eta in enumerate((0.0, 1.0))]}


def tiny(low=0.1, high=0.3, angles=(60.0, 90.0)):
    """What claims.json holds where two worlds give every claim two intervals, and the curves two ends."""
    names = {claim.name for claim in real.REAL_CLAIMS}
    second = {"line": "WARP", "iteration": 2}
    return {"draws": [1, 2], "claims": [
        *({"name": name, "ci_low": low, "ci_high": high} for name in names - {"angle"}),
        *({"name": name, "ci_low": 2 * low, "ci_high": 2 * high} for name in names - {"angle"}),
        {"name": "angle", "ci_low": angles[0], "ci_high": angles[1]},
        {"name": "length", "ci_low": None, "ci_high": None}],  # of one draw alone
        "curves": [curve("equal", "WARP", perplexity=(4, 8)), curve("equal", "WARP", perplexity=(4, 6)),
                   curve("iterations", second, gold=(0.5, 1.5)), curve("iterations", second, gold=(0, 2))]}


def test_a_prediction_holds_what_both_tiny_worlds_say_and_gives_its_reason_and_sign():
    predicted = real.predictions(tiny())["claims"]
    assert set(predicted) == {claim.name for claim in real.REAL_CLAIMS}
    assert all(one["low"] <= one["high"] and one["because"] and "\n" not in one["because"]
               for one in predicted.values())
    assert (predicted["liti-one"]["low"], predicted["liti-one"]["high"], predicted["liti-one"]["sign"]) == (
        0.1, 0.6, "above")
    interval = {name: [one["low"], one["high"]] for name, one in predicted.items()}
    assert interval["equal-batch-of-16"] == [0.025, 0.15]  # areas over 4 nats
    assert interval["norm-lerp"] == [0.5, round(math.sqrt(2.5 / 4), 4)]  # at right angles, and at 60°
    assert interval["forgetting"] == pytest.approx([math.log(1.5), math.log(2)], abs=1e-4)
    assert interval["gold"] == [1.0, 2.0]
    assert real.predictions(tiny(-0.1))["claims"]["length"]["sign"] == "either"
    assert real.predictions(tiny(-0.3, -0.1))["claims"]["length"]["sign"] == "below"
    with pytest.raises(ValueError, match="no interval of the claim '4-runs-against-1'"):
        real.predictions({"draws": [], "claims": [], "curves": []})


def test_the_committed_predictions_are_of_every_claim_and_of_the_evidence_that_they_name():
    committed = load("predictions")
    assert set(committed["claims"]) == {claim.name for claim in real.REAL_CLAIMS}
    if committed["draws"] == load("claims")["draws"]:  # else of evidence as it was before the experiment ran
        assert committed == real.predictions(load("claims"))


def test_a_prediction_came_true_where_the_effect_lies_in_it_and_its_sign_where_on_its_side():
    def came(**changed):
        predicted = real.predictions(tiny())
        predicted["claims"]["length"] |= changed  # the invented lengths fall by one token
        return next((claim["came_true"], claim["sign_came_true"])
                    for claim in real.real_report(invented(), SEEDS, predicted)["claims"] if claim["name"] == "length")

    assert came(low=-2, high=-0.5, sign="below") == (True, True)
    assert came(low=-0.5, high=-0.1, sign="below") == (False, True)
    assert came(low=0.5, high=1, sign="above") == (False, False)
    assert came(low=-2, high=1, sign="either") == (True, None)


def test_a_claim_without_an_effect_has_no_outcome():
    low = [{**unit, "rows": [{**row, "kl": row["kl"] / 100} if "kl" in row else row for row in unit["rows"]]}
           for unit in invented()]  # no front gets to the lowest KL
    found = real.real_report(low, SEEDS, load("predictions"), LAWS)
    claim = next(claim for claim in found["claims"] if claim["name"] == "4-runs-against-1")
    assert claim["verdict"] == "unclear" and claim["came_true"] is claim["sign_came_true"] is None
    assert found["law"]["predicted"] is None and "no KL that every seed reaches" in real.real_table(found)


def test_the_law_says_what_merging_gains_by_the_angle_of_the_pilot():
    share = 0.5 / (0.5 + 0.5 / 4)  # two short runs at 60°
    gain = 0.9 * 2 * (np.sqrt(share) - np.sqrt(0.5))
    assert real.predicted_gain(60.0, 32, 4.0, LAWS) == {"detail": pytest.approx(gain, abs=1e-4)}
    assert real.predicted_gain(60.0, 32, 4.0, {"worlds": {}}) is None
    found = real.real_report(invented(), SEEDS, load("predictions"), LAWS)
    law = found["law"]
    assert law["short_angle"] == 60.0 and law["kl"] == 4.0 and law["predicted"] == {"detail": round(float(gain), 4)}
    assert law["measured"] == pytest.approx(0.5) and "it gained +0.50" in real.real_table(found)
    assert "after this experiment had run" not in real.real_table(found)
    late = real.real_report(invented(), SEEDS, load("predictions"), LAWS, law_first=False)
    assert "after this experiment had run: it is a test of the law, and no prediction" in real.real_table(late)
    without = real.real_report(invented(), SEEDS, load("predictions"), {"worlds": {}})
    assert without["law"]["predicted"] is None and "noise map has none" in real.real_table(without)


def test_the_pilots_runs_are_as_short_as_those_that_the_law_is_fitted_by():
    assert real_units.SHORT == settings.SHORT


def test_the_mean_angle_is_of_weight_matrices_alone():
    init = {"matrix": torch.zeros(1, 2), "bias": torch.zeros(2)}
    along, across = ({"matrix": torch.tensor([row]), "bias": torch.ones(2)} for row in ([1.0, 0.0], [0.0, 3.0]))
    assert mean_angle(init, [along, across]) == pytest.approx(90.0)


def test_the_table_has_a_row_a_claim_with_what_was_predicted(report, tmp_path, monkeypatch):
    monkeypatch.setattr(real, "run_real_units", lambda *arguments: invented())
    text = real.run_real(tmp_path, SEEDS)
    found = json.loads((tmp_path / "smollm2.json").read_text())
    assert (tmp_path / "smollm2.md").read_text() in text
    for claim in found["claims"]:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {claim['statement']} |")]
        assert cell(claim) in row and claim["because"] in row and f"{claim['prediction'][0]:+.2f} to" in row
    steps = 2 * LINES["WARP"].steps
    assert f"| WARP | {steps} | 320 | 1280 | 0.2 |" in text
    assert f"{found['cpu_hours']:g} hours of one core in all" in text


def test_a_unit_needs_the_runs_that_it_reads_and_they_are_more_urgent():
    units = units_of_seeds(SEEDS)
    assert units[0] == RealUnit("sft") and len(set(units)) == len(units)
    for n, unit in enumerate(units):
        assert set(needs(unit)) <= set(units[:n])
    four = [RealUnit("run", 0, "WARP", 1, m) for m in (1, 2, 3, 4)]
    assert needs(RealUnit("run", 0, "WARP", 2, 3)) == needs(RealUnit("front", 0, "LERP", 1)) == four
    assert needs(RealUnit("geometry", 0, "WARP", 1)) == four and needs(RealUnit("run", 0, "WARP", 1, 2)) == []
    both = [RealUnit("run", 1, "batch of 16", i, 1) for i in (1, 2)]
    assert needs(RealUnit("front", 1, "batch of 16", 2)) == both
    assert needs(RealUnit("limit")) == needs(RealUnit("pilot", PILOT_SEED, "WARP", 1)) == []


def test_units_run_when_what_they_need_is_there_and_wait_for_nothing_else(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(real_units, "run_real_unit", lambda unit, folder: ran.append(unit) or {"unit": unit})
    units = units_of_seeds([0])
    others = [unit for unit in units if unit.kind != "run"]
    front, first = RealUnit("front", 0, "WARP", 1), [RealUnit("run", 0, "WARP", 1, m) for m in (1, 2, 3, 4)]
    given = list(real_units.in_processes([front, *first, *others[:1]], [], tmp_path, 1))
    assert [unit for unit, _ in given] == ran == [*first[:4], front, *others[:1]]
    ran.clear()
    assert [unit for unit, _ in real_units.in_processes([front], first, tmp_path, 2)] == [front]


def test_the_command_refuses_options_that_the_real_world_has_not(tmp_path, capsys):
    for more in (["--only", "angle"], ["--tune"], ["--world", "detail"]):
        assert main(["claims", "--world", "smollm2", *more, "--out", str(tmp_path / "new")]) == 2
        error = capsys.readouterr().err
        assert "--world smollm2 is an experiment of its own" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("part", ["model", "vaderSentiment"])
def test_the_command_without_the_package_is_one_line_and_writes_nothing(part, monkeypatch, tmp_path, capsys):
    spec = english.find_spec
    monkeypatch.setattr(english, "find_spec", lambda name: None if name == part else spec(name) or True)
    monkeypatch.setattr(english, "gguf_file", lambda: None)
    monkeypatch.setattr(english, "FeelingReward", english.FeelingReward if part != "model" else lambda: None)
    monkeypatch.setattr(english, "HUB_REPOSITORY", "nobody/absent")
    assert main(["claims", "--world", "smollm2", "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and english.INSTALL in error and not (tmp_path / "new").exists()


def test_every_kind_of_unit_runs_is_reported_and_is_not_run_again(world, monkeypatch, tmp_path, capsys):
    small = {"steps": 2, "batch_size": 2, "max_new_tokens": 6, "lr": 3e-3, "warmup_steps": 0}
    monkeypatch.setattr(real_units, "LINES", {name: config.replace(**small) for name, config in LINES.items()})
    monkeypatch.setattr(real_units, "WARP", real_units.WARP.replace(**small))
    for name, value in {"SHORT": 2, "HELD_OUT": 8, "TEXTS": 4, "LIMIT_SAMPLES_REAL": 128, "SHOWN_PROMPTS": 3}.items():
        monkeypatch.setattr(real_units, name, value)
    monkeypatch.setattr(real_units, "load_world", lambda name: world)
    real_units.real_world.cache_clear()
    try:
        first = real.run_real(tmp_path, [0], 1)
        units = len(units_of_seeds([0]))  # by the first the time of the others is told
        assert f"{units - 1} units to run, 1 kept in {tmp_path}: about " in capsys.readouterr().out
        found = json.loads((tmp_path / "smollm2.json").read_text())
        kept = [path for path in (tmp_path / "units").iterdir() if path.suffix == ".safetensors"]
        assert len(kept) == sum(LINES[line].iterations * LINES[line].runs for line in ("WARP", "batch of 16"))
        monkeypatch.setattr(real_units, "train_batched", lambda *arguments: pytest.fail("it trained again"))
        assert real.run_real(tmp_path, [0], 1) == first
        write_real_front(tmp_path, tmp_path / "fronts")
    finally:
        real_units.real_world.cache_clear()
    by_name = {claim["name"]: claim for claim in found["claims"]}
    assert set(by_name) == {claim.name for claim in real.REAL_CLAIMS}
    for name in ("angle", "norm-lerp", "length", "diversity", "forgetting", "gold", "slerp-lerp-reward"):
        assert math.isfinite(by_name[name]["effect"]) and by_name[name]["ci_low"] is None  # one seed has no interval
    assert 0 < found["law"]["short_angle"] <= 180 and found["limit"] and found["best_of_n"]
    assert {row["eta"] for row in found["completions"]} == {0.0, 0.25, 0.5, 1.0}
    lines = {row["line"] for row in found["rows"]}
    assert {"run", "slerp-4", "lerp-4", "WARP, 2", "batch of 16, 2", "trajectory"} < lines
    assert all(abs(row["kl"]) < 1e-4 for row in found["rows"] if row.get("eta", row.get("step")) == 0)
    look_at(found)
    scene = json.loads((tmp_path / "fronts" / "smollm2.json").read_text())
    assert (scene["iterations"], scene["runs"], scene["samples"]) == ([1, 2], [4], 8)
    ends = [row for row in found["rows"] if row["line"] == "WARP, 2" and row["eta"] == 1]
    assert scene["lines"][1]["points"][-1]["reward"] == pytest.approx(ends[0]["reward"], abs=6e-4)
    assert [len(point["completions"]) for line in scene["lines"] for point in line["points"]] == [3] * 12


def look_at(found):
    """Every picture and sentence of the notebook, of a report."""
    prompt, *others = draw_real.shown_prompts(found)
    with matplotlib.rc_context():
        drawn = [draw(found) for draw in (draw_real.draw_predictions, draw_real.draw_real_fronts, draw_real.draw_gold,
                                          draw_real.draw_trajectories, draw_real.draw_in_text)]
        place = draw_real.draw_place(found, 1, 0.2, prompt)
        plt.close("all")
    with_predictions = sum(claim["effect"] is not None for claim in found["claims"])
    assert [len(figure.axes) for figure in drawn] == [with_predictions, 1, 2, 2, 3]
    (start,) = {row["reward"] for row in found["rows"] if row["line"] == "slerp-4" and row["eta"] == 0}
    for line in drawn[1].axes[0].get_lines()[:-2]:  # but the limit and best-of-n
        assert line.get_xydata()[0] == pytest.approx((0, start), abs=1e-4)
    titles = [place.axes[0].get_title(loc=side) for side in ("left", "center")]  # as the style has it
    assert "".join(titles).startswith("iteration 1, η = 0.20")
    page = draw_real.completions_page(found, 0, 1, others)
    assert page.count("η = ") == 4 * len(others) and "<mark" in page
    assert draw_real.written(found, 0, 1, 0.3, prompt)["eta"] == 0.25
    with pytest.raises(ValueError, match="no completion of 'nothing' with seed 0"):
        draw_real.written(found, 0, 1, 0.3, "nothing")
    assert draw_real.said_of(found, "angle", "gold").count("\n") == 1
    effects = [claim for claim in found["claims"] if claim["effect"] is not None]
    words = real.came_true(found)
    assert words[0].startswith(f"{sum(claim['came_true'] for claim in effects)} of {len(effects)} measured effects")
    assert "No KL is reached by all seeds for: " in words[-1] or len(effects) == len(found["claims"])
    assert draw_real.starts(found).startswith(f"At η = 0 all fronts are the SFT policy, with a reward of {start:+.2f}")
    assert "too few" in draw_real.starts({**found, "limit": []})
    assert "gold reward is highest at η = " in draw_real.gold_on_the_way(found)
    assert real.costs_table(found).count("\n") == len(found["costs"]) + 1
    assert real.short_table(found).count("\n") == len(found["claims"]) + 1


@pytest.fixture(scope="module")
def committed():
    return load("smollm2")


def test_the_committed_claims_are_decided_anew_from_the_committed_rows(committed):
    seeds, predicted = committed["seeds"], load("predictions")
    assert len(seeds) >= 3 and {row["seed"] for row in committed["rows"]} == {*seeds}
    assert committed["predicted_by_draws"] == predicted["draws"]
    rows = draw_real.rows_of(committed)
    for claim, entry in zip(real.REAL_CLAIMS, committed["claims"], strict=True):
        expected = predicted["claims"][claim.name]
        assert entry["name"] == claim.name and entry["prediction"] == [expected["low"], expected["high"]]
        if claim.unit not in ("degrees", "share of the mean norm"):  # of weights, which no row has
            again = real.decide(claim, rows)
            assert (again["effect"], again["verdict"]) == (pytest.approx(entry["effect"]), entry["verdict"])


def test_a_limit_lies_over_the_committed_fronts_within_their_noise(committed):
    limit = committed["limit"]
    kl, reward = ([point[name] for point in limit] for name in ("kl", "reward"))
    for row in committed["rows"]:
        if row["kl"] <= kl[-1]:
            over = row["reward"] - np.interp(row["kl"], kl, reward)
            assert over < 5 * row["reward_se"]


def test_the_readme_says_what_the_real_model_said(committed):
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert real.short_table(committed) in text and " ".join(real.came_true(committed)) in text
