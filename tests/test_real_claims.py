"""The claims on a real language model, on rows that were invented: no model is needed."""

import json

import numpy as np
import pytest

from warp_lite.cli import main
from warp_lite.evidence import load, real
from warp_lite.evidence.real_units import LINES, SFT_BETAS_REAL, RealUnit, phases_of
from warp_lite.evidence.report import cell
from warp_lite.storage.provenance import provenance

SEEDS = (0, 1, 2)
NUMBERS = {"gold": 0.0, "length": 12.0, "distinct": 0.6, "perplexity": 9.0}


def numbers(kl, reward, drift):
    """What is measured of a policy; gold follows the reward at half its pace."""
    return {"kl": kl, "reward": reward, "gold": reward / 2, "length": 12 - drift, "distinct": 0.6 - drift / 10,
            "perplexity": 9 + drift}


def front(line, seed, slope, end, **more):
    return [{"line": line, "seed": seed, "eta": eta, **numbers(end * eta**2, slope * eta + seed / 100, eta), **more}
            for eta in (0.2, 0.4, 0.6, 0.8, 1.0)]


def path(line, seed, slope, run):
    return [{"line": line, "seed": seed, "run": run, "step": step, **numbers(step / 10, slope * step / 40, step / 40)}
            for step in (10, 20, 30, 40)]


def invented():
    """Units of three seeds: merging gains .5 at the end, a second iteration .25 more, the larger batch as much."""
    rows = {RealUnit("sft"): [{"line": "θ_sft", "seed": None, "eta": 0.0, **numbers(0.0, 0.0, 0.0)}],
            RealUnit("limit"): [{"line": "limit", "seed": None, "kl": 1.0, "reward": 2.0},
                                {"line": "best of n", "seed": None, "kl": 1.0, "reward": 1.5}]}
    for seed in SEEDS:
        rows |= {RealUnit("front", seed, "WARP", 1, m): front("run", seed, 1.0, 4.0, run=m) for m in (1, 2)}
        rows |= {RealUnit("front", seed, "WARP", 1): front("slerp-4", seed, 1.5, 4.0),
                 RealUnit("front", seed, "LERP", 1): front("lerp-4", seed, 1.25, 3.0),
                 RealUnit("front", seed, "WARP", 2): front("WARP, 2", seed, 1.75, 4.5),
                 RealUnit("front", seed, "batch of 16", 2): front("batch of 16, 2", seed, 1.75, 4.5),
                 RealUnit("geometry", seed, "WARP", 1): [{"line": "angle", "seed": seed, "value": 80.0 + seed}],
                 RealUnit("texts", seed, "WARP", 2): [{"line": "completion", "seed": seed, "eta": 0.5,
                                                       "prompt": "I saw", "completion": " it.", "reward": 1.0}]}
        rows |= {RealUnit("run", seed, "WARP", i, m): path("trajectory", seed, 0.8, m) if i == 1 and m <= 2 else []
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
    assert verdicts["diversity"] == verdicts["forgetting"] == "holds" and verdicts["length"] == "fails"
    assert verdicts["equal-batch-of-16"] == "no difference"
    assert by_name["angle"]["effect"] == pytest.approx(81.0)
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
    assert [row["run"] for row in starts] == [1, 2]
    assert report["curves"]["slerp-4"][0]["eta"] == 0 and len(report["completions"]) == len(SEEDS)
    assert report["limit"][0]["reward"] == 2.0 and report["best_of_n"][0]["reward"] == 1.5


def test_what_a_line_costs_is_of_one_seed(report):
    by_line = {row["line"]: row for row in report["costs"]}
    warp = by_line["WARP"]
    assert (warp["steps"], warp["samples"], warp["cpu_hours"]) == (8 * 40, 8 * 160, 0.2)  # eight runs of 90 s
    assert warp["steps_in_sequence"] == LINES["WARP"].iterations * LINES["WARP"].steps


def test_a_prediction_holds_what_both_tiny_worlds_say_and_came_true_where_the_effect_lies_in_it():
    entry = {"name": "4-runs-against-1", "unit": "reward", "ci_low": 0.1, "ci_high": 0.3}
    tiny = {"draws": [1], "claims": [entry, {**entry, "ci_low": 0.2, "ci_high": 0.6},
                                     {**entry, "name": "length", "unit": "tokens", "ci_low": -2, "ci_high": 3},
                                     {**entry, "name": "liti-one", "ci_low": None, "ci_high": None}]}
    laws = [{"fitted_in": "detail", "c": {"value": 0.9}, "alpha": {"value": 0.0}}]
    predicted = real.predictions(tiny, {"laws": laws})
    assert predicted["claims"] == {"4-runs-against-1": {"low": 0.1, "high": 0.6, "sign": "above"},
                                   "length": {"low": -2, "high": 3, "sign": "either"}}
    share = 0.5 / (0.5 + 0.5 / 4)  # two short runs at 60°
    assert real.predicted_gains(predicted["laws"], 60.0, 4.0) == pytest.approx(
        {"detail": 0.9 * 2 * (np.sqrt(share) - np.sqrt(0.5))})
    came = {claim["name"]: claim["came_true"] for claim in real.real_report(invented(), SEEDS, predicted)["claims"]}
    assert came["4-runs-against-1"] is True and came["length"] is True and came["liti-one"] is None
    predicted["claims"]["length"]["low"] = 0.0
    assert real.real_report(invented(), SEEDS, predicted)["claims"][10]["came_true"] is False


def test_the_table_has_a_row_a_claim_with_what_was_predicted(report, tmp_path, monkeypatch):
    monkeypatch.setattr(real, "run_real_units", lambda *arguments: invented())
    text = real.run_real(tmp_path, SEEDS)
    found = json.loads((tmp_path / "smollm2.json").read_text())
    assert (tmp_path / "smollm2.md").read_text() in text
    for claim in found["claims"]:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {claim['statement']} |")]
        assert cell(claim) in row
    assert "| WARP | 80 | 320 | 1280 | 0.2 |" in text


def test_units_depend_on_none_of_their_own_phase_or_later():
    phases = phases_of(SEEDS)
    assert phases[0] == [RealUnit("sft")]
    place = {unit: n for n, units in enumerate(phases) for unit in units}
    assert len(place) == sum(map(len, phases))  # each once
    for unit, n in place.items():
        if unit.kind == "run" and unit.iteration == 2:
            runs = LINES[unit.line].runs
            assert all(place[RealUnit("run", unit.seed, unit.line, 1, m)] < n for m in range(1, runs + 1))
        elif unit.kind in ("front", "texts", "geometry"):
            line = "WARP" if unit.line == "LERP" else unit.line
            assert all(place[RealUnit("run", unit.seed, line, unit.iteration, m)] < n
                       for m in range(1, LINES[line].runs + 1))


def test_the_command_refuses_options_that_the_real_world_has_not(tmp_path, capsys):
    for more in (["--only", "angle"], ["--tune"], ["--world", "detail"]):
        assert main(["claims", "--world", "smollm2", *more, "--out", str(tmp_path / "new")]) == 2
        error = capsys.readouterr().err
        assert "--world smollm2 is an experiment of its own" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
