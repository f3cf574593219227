"""The claims on a real language model: what the tiny worlds predicted of each before it ran, and what came of it.

All seeds share θ_sft and the reward model, of which there is one: an interval is Student's t over seeds and covers the
noise of the RL runs alone. With three seeds it is 4.3 standard errors wide on either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..storage.files import write_bytes, write_json
from ..worlds import REAL
from . import load
from .claims import Claim, decide
from .decisive import best_of_others
from .effects import Rows, at_one_kl, ends, plain
from .law import Law
from .real_units import LINES, SFT_BETAS_REAL, WARP, run_real_units
from .report import cell
from .runner import provenances
from .settings import SHORT

SECOND = "WARP, 2"  # the line of the second iteration's merge
COVERS = ("Student's t over seeds, which share one SFT policy and one reward model: it covers the noise of the RL "
          "runs, not what another model or reward model would do")


def _claim(name, statement, effect, rule="above", unit="reward", null=0.0, margin=0.0, lines=()) -> Claim:
    return Claim(name, "–", statement, "real", effect, rule, unit, null, margin, lines)


REAL_CLAIMS: tuple[Claim, ...] = (
    _claim("4-runs-against-1", "LITI of 4 merged policies is above that of 1 at one KL", at_one_kl("slerp-4", "run"),
           lines=("slerp-4", "run")),
    _claim("liti-trajectory-4", "LITI of four merged policies is above the runs' trajectories at one KL",
           at_one_kl("slerp-4", "trajectory"), lines=("slerp-4", "trajectory")),
    _claim("liti-one", "LITI of one run is above its own trajectory at one KL", at_one_kl("run", "trajectory"),
           lines=("run", "trajectory")),
    _claim("slerp-lerp-reward", "At η = 1 SLERP of four has more reward than LERP", ends("slerp-4", "lerp-4", "reward"),
           lines=("slerp-4", "lerp-4")),
    _claim("slerp-lerp-front", "At one KL SLERP of four has more reward than LERP, η past 1 included",
           at_one_kl("slerp-4", "lerp-4"), lines=("slerp-4", "lerp-4")),
    _claim("iteration-2-reach", "Iteration 2 reaches a higher reward than iteration 1",
           ends(SECOND, "slerp-4", "reward"), lines=(SECOND, "slerp-4")),
    _claim("iteration-2-front", "Iteration 2 is above iteration 1 at one KL", at_one_kl(SECOND, "slerp-4"),
           lines=(SECOND, "slerp-4")),
    _claim("ema-anchor", "An EMA anchor gives more reward than an SFT anchor (the β that is best on the other seeds) "
           "at one KL", best_of_others(["trajectory"], [f"SFT, β = {beta:g}" for beta in SFT_BETAS_REAL])),
    _claim("equal-batch-of-16", "At equal samples WARP is above one run with batches of 16 at one KL",
           at_one_kl(SECOND, "batch of 16, 2"), lines=(SECOND, "batch of 16, 2")),
    _claim("angle", "Task vectors of weight matrices are at right angles (to 15°)", plain("angle"), "within", "degrees",
           90.0, 15.0),
    _claim("length", "Length grows along the front", ends(SECOND, None, "length"), unit="tokens", lines=(SECOND,)),
    _claim("diversity", "Diversity falls along the front", ends(SECOND, None, "distinct"), "below", "share of pairs",
           lines=(SECOND,)),
    _claim("forgetting", "Perplexity of the SFT policy's own samples grows along the front",
           ends(SECOND, None, "perplexity"), unit="per token", lines=(SECOND,)),
    _claim("gold", "Gold reward rises with the proxy along the front", ends(SECOND, None, "gold"), unit="gold reward",
           lines=(SECOND,)),
)


def predictions(evidence: Mapping, noise: Mapping | None = None) -> dict:
    """What the tiny worlds predict, by claim: an interval that holds the intervals of both, and its sign.

    `evidence` is what claims.json holds. Claims that it lacks, or decides in another unit, have no prediction. `noise`
    is what noise.json holds: its law predicts the gain of merging from the angle of two short runs.
    """
    found = {}
    for claim in REAL_CLAIMS:
        tiny = [entry for entry in evidence["claims"] if entry["name"] == claim.name and entry["unit"] == claim.unit
                and entry["ci_low"] is not None]
        if tiny:
            low, high = min(entry["ci_low"] for entry in tiny), max(entry["ci_high"] for entry in tiny)
            sign = "either" if low <= claim.null <= high else "above" if low > claim.null else "below"
            found[claim.name] = {"low": round(low, 4), "high": round(high, 4), "sign": sign}
    laws = {law["fitted_in"]: {"c": law["c"]["value"], "alpha": law["alpha"]["value"]}
            for law in (noise or {}).get("laws", [])}
    return {"from_draws": len(evidence["draws"]), "claims": found, "laws": laws, "short_steps": SHORT}


def predicted_gains(laws: Mapping[str, Mapping], short_angle: float, kl: float) -> dict[str, float]:
    """The reward at `kl` nats that merging four adds, by the law fitted in each tiny world, from the angle in degrees
    of two runs of `SHORT` steps of the real model."""
    return {world: float(Law(law["c"], law["alpha"]).gain(short_angle, WARP.steps, kl)) for world, law in laws.items()}


def with_starts(kept: Sequence[Mapping]) -> list[dict]:
    """The rows of all units; every front and trajectory starts at θ_sft, which is measured once."""
    rows = [row for unit in kept for row in unit["rows"]]
    start = next(row for row in rows if row["line"] == "θ_sft")
    numbers = {name: value for name, value in start.items() if name not in ("line", "seed", "eta")}
    found = []
    for place in ("eta", "step"):
        lines = {(row["line"], row["seed"], row.get("run")) for row in rows
                 if place in row and "kl" in row and row["seed"] is not None}
        found += [{"line": line, "seed": seed, **({} if run is None else {"run": run}), place: 0, **numbers}
                  for line, seed, run in sorted(lines, key=str)]
    return found + [row for row in rows if row["line"] != "θ_sft"]


def real_report(kept: Sequence[Mapping], seeds: Sequence[int], predicted: Mapping) -> dict:
    """What smollm2.json holds: verdicts beside predictions, curves, completions, the limit, and what each line cost.

    A claim `came_true` where its effect lies in the interval that was predicted; None without a prediction or effect.
    """
    rows = with_starts(kept)
    by_seed = [row for row in rows if row["seed"] is not None and row["line"] != "completion"]
    evidence = Rows(REAL, by_seed)
    claims = []
    for claim in REAL_CLAIMS:
        expected = predicted["claims"].get(claim.name)
        if expected:
            claim = replace(claim, prediction=(expected["low"], expected["high"]))
        entry = decide(claim, evidence)
        known = expected and entry["effect"] is not None
        claims.append({**entry, "came_true": expected["low"] <= entry["effect"] <= expected["high"] if known else None})
    lines = sorted({row["line"] for row in by_seed if "kl" in row})
    return {
        "world": REAL, "seeds": list(seeds), "interval": COVERS, "claims": claims, "predictions": dict(predicted),
        "curves": {line: evidence.mean_curve(line) for line in lines},
        "limit": [row for row in rows if row["line"] == "limit"],
        "best_of_n": [row for row in rows if row["line"] == "best of n"],
        "completions": [row for row in rows if row["line"] == "completion"], "costs": costs(kept),
        "provenance": provenances([{"world": REAL, "study": unit["unit"]["kind"], "provenance": unit["provenance"]}
                                   for unit in kept])}


def costs(kept: Sequence[Mapping]) -> list[dict]:
    """Of each line: gradient steps one after the other and in all, samples, and hours of one core, of one seed."""
    found = []
    for name, config in LINES.items():
        runs = [unit for unit in kept if unit["unit"]["kind"] == "run" and unit["unit"]["line"] == name]
        seeds = len({unit["unit"]["seed"] for unit in runs})
        if seeds:
            found.append({"line": name, "steps_in_sequence": config.iterations * config.steps,
                          "steps": sum(unit["steps"] for unit in runs) // seeds,
                          "samples": sum(unit["samples"] for unit in runs) // seeds,
                          "cpu_hours": round(sum(unit["cpu_seconds"] for unit in runs) / seeds / 3600, 2)})
    return found


def real_table(found: Mapping) -> str:
    """Claims, predictions and outcomes as Markdown, and what each line cost."""
    lines = ["| claim | predicted by the tiny worlds | on the real model | came true |", "|---|---|---|---|"]
    for claim in found["claims"]:
        prediction = claim.get("prediction")
        words = f"{prediction[0]:+.2f} to {prediction[1]:+.2f}" if prediction else "–"
        lines.append(f"| {claim['statement']} | {words} | {cell(claim)} | "
                     f"{ {True: 'yes', False: 'no', None: '–'}[claim['came_true']]} |")
    lines += ["", f"{len(found['seeds'])} seeds. Intervals: {found['interval']}.", "",
              "| line | steps in sequence | steps | samples | hours of one core |", "|---|---|---|---|---|"]
    lines += [f"| {row['line']} | {row['steps_in_sequence']} | {row['steps']} | {row['samples']} | {row['cpu_hours']} |"
              for row in found["costs"]]
    return "\n".join(lines) + "\n"


def run_real(out: Path, seeds: Sequence[int], workers: int | None = None, progress: bool = True) -> str:
    """Run what `out` lacks, decide the claims, and write smollm2.json and smollm2.md there; returns the table.

    Raises ValueError, with the command that installs it, where the model's package is missing.
    """
    kept = run_real_units(seeds, out, workers or 2, progress)
    found = real_report(kept, seeds, load("predictions"))
    text = real_table(found)
    write_json(out / "smollm2.json", found)
    write_bytes(out / "smollm2.md", text.encode())
    return f"{text}\nwritten: {out / 'smollm2.json'} and smollm2.md"
