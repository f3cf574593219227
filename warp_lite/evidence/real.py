"""The claims on a real language model: what the tiny worlds predicted of each before it ran, and what came of it.

All seeds share θ_sft and the reward model, of which there is one: an interval is Student's t over seeds and covers the
noise of the RL runs alone. With three seeds it is 4.3 standard errors wide on either side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..storage.files import write_bytes, write_json
from ..worlds import REAL
from . import load
from .claims import Claim, decide
from .decisive import best_of_others
from .effects import Effect, Rows, at_one_kl, ends, plain
from .law import Law
from .real_units import HELD_OUT, LIMIT_SAMPLES_REAL, LINES, SFT_BETAS_REAL, TRACED, WARP, run_real_units
from .runner import provenances
from .settings import KL_MAX
from .wording import bound, cell, short

SECOND = "WARP, 2"  # the line of the second iteration's merge
ONE = {"line": "run", "run": 1}  # the front of the run whose trajectory is measured
COVERS = ("Student's t over seeds, which share one SFT policy, one reward model, the held-out prompts and the random "
          "numbers that these are answered with: it covers the noise of the RL runs, not what another model, reward "
          "model or other prompts would give")


def _claim(name, statement, effect, rule="above", unit="reward", null=0.0, margin=0.0) -> Claim:
    return Claim(name, "–", statement, "real", effect, rule, unit, null, margin)


def growth(line: str, kind: str) -> Callable[[Rows], Effect]:
    """The effect of a line: the logarithm of a number at η = 1 over that at η = 0. Of a perplexity: the nats a token
    that a held-out text costs more."""
    def effect(rows: Rows) -> Effect:
        found = {}
        for seed in rows.seeds:
            (front,) = rows.fronts(line, seed)
            at = {row["eta"]: row[kind] for row in front}
            found[seed] = math.log(at[1.0] / at[0])
        return Effect(found)
    return effect


REAL_CLAIMS: tuple[Claim, ...] = (
    _claim("4-runs-against-1", "LITI of 4 merged policies is above that of 1 at one KL", at_one_kl("slerp-4", "run")),
    _claim("liti-trajectory-4", "LITI of four merged policies is above a run's trajectory at one KL",
           at_one_kl("slerp-4", "trajectory")),
    _claim("liti-one", "LITI of one run is above its own trajectory at one KL", at_one_kl(ONE, "trajectory")),
    _claim("slerp-lerp-reward", "At η = 1 SLERP of four has more reward than LERP",
           ends("slerp-4", "lerp-4", "reward")),
    _claim("slerp-lerp-front", "At one KL SLERP of four has more reward than LERP, η past 1 included",
           at_one_kl("slerp-4", "lerp-4")),
    _claim("iteration-2-reach", "Iteration 2 reaches a higher reward than iteration 1",
           ends(SECOND, "slerp-4", "reward")),
    _claim("iteration-2-front", "Iteration 2 is above iteration 1 at one KL", at_one_kl(SECOND, "slerp-4")),
    _claim("ema-anchor", "An EMA anchor gives more reward than an SFT anchor (the β that is best on the other seeds) "
           "at one KL", best_of_others(["trajectory"], [f"SFT, β = {beta:g}" for beta in SFT_BETAS_REAL])),
    _claim("equal-batch-of-16-once", "At equal samples an iteration of WARP is above one run with batches of 16 at one "
           "KL", at_one_kl("slerp-4", "batch of 16")),
    _claim("equal-batch-of-16", "At equal samples two iterations of WARP are above two with batches of 16 at one KL",
           at_one_kl(SECOND, "batch of 16, 2")),
    _claim("angle", "Task vectors of weight matrices are at right angles (to 15°)", plain("angle"), "within", "degrees",
           90.0, 15.0),
    _claim("norm-lerp", "LERP of four loses norm", plain("norm of LERP"), "below", "share of the mean norm", 1.0),
    _claim("length", "Length grows along the front", ends(SECOND, None, "length"), unit="tokens"),
    _claim("diversity", "Diversity falls along the front", ends(SECOND, None, "distinct"), "below", "share of pairs"),
    _claim("forgetting", "The SFT policy's own samples cost more nats a token along the front",
           growth(SECOND, "perplexity"), unit="nats"),
    _claim("gold", "Gold reward rises with the proxy along the front", ends(SECOND, None, "gold"), unit="gold reward"),
)


# Claims that cannot come out either way by chance: a mean of vectors is no longer than they are; what a policy's own
# samples cost another is a KL; "within" holds where something is found, and not where nothing is; and a length that
# completions are cut at does not grow.
ONE_WAY = ("norm-lerp", "forgetting", "angle", "length")


# --- what the tiny worlds predict ---------------------------------------------------------------


def hull(evidence: Mapping, name: str) -> tuple[float, float]:
    """The least interval that holds those of a claim in both tiny worlds; `evidence` is what claims.json holds.

    Raises ValueError where neither world has one.
    """
    tiny = [entry for entry in evidence["claims"] if entry["name"] == name and entry["ci_low"] is not None]
    if not tiny:
        raise ValueError(f"the tiny worlds have no interval of the claim {name!r}, so nothing is predicted by it")
    return min(entry["ci_low"] for entry in tiny), max(entry["ci_high"] for entry in tiny)


def along_the_front(evidence: Mapping, study: str, line: str | dict, kind: str,
                    change: Callable[[float, float], float]) -> tuple[float, float]:
    """The least interval that holds, in both tiny worlds, the `change` of a number from η = 0 to 1 of a mean front.

    Mean curves have no interval of their own, so this one is narrower than those of claims.
    """
    found = [change(*({point["eta"]: point[kind] for point in curve["points"]}[eta] for eta in (0.0, 1.0)))
             for curve in evidence["curves"] if (curve["study"], curve["line"]) == (study, line)]
    return min(found), max(found)


def four_at(degrees: float) -> float:
    """The norm of the mean of four vectors of one length at that angle to one another, as a share of theirs."""
    return math.sqrt((1 + 3 * math.cos(math.radians(degrees))) / 4)


def _batch_of_16(evidence: Mapping) -> tuple[float, float]:
    low, high = hull(evidence, "equal-batch-of-16")
    return low / KL_MAX, high / KL_MAX


def _norm(evidence: Mapping) -> tuple[float, float]:
    low, high = hull(evidence, "angle")
    return four_at(high), four_at(low)


# What predicts a claim that the tiny worlds decide in another way, and why; the others have the hull of their own.
_SAME = "holds the 95 % intervals of this claim in both tiny worlds"
_AREA = f"holds the intervals of the difference in area, over its {KL_MAX:g} nats"
_OTHERWISE: Mapping[str, tuple[Callable[[Mapping], tuple[float, float]], str]] = {
    "equal-batch-of-16-once": (_batch_of_16, _AREA), "equal-batch-of-16": (_batch_of_16, _AREA),
    "norm-lerp": (_norm, "what four vectors at the angles predicted leave: √((1 + 3 cos α) / 4)"),
    "forgetting": (lambda evidence: along_the_front(evidence, "equal", "WARP", "perplexity",
                                                    lambda start, end: math.log(end / start)),
                   "holds both worlds' means for WARP of two iterations, settings of equal samples"),
    "gold": (lambda evidence: along_the_front(evidence, "iterations", {"line": "WARP", "iteration": 2}, "gold",
                                              lambda start, end: end - start),
             "holds both worlds' means for the second iteration of WARP"),
}


# How the tiny worlds' claims of the same names differ from those here.
DIFFERS: Mapping[str, str] = {
    "length": "there of iteration 3; here completions end at 16 tokens at the latest",
    "diversity": "there of iteration 3",
    "ema-anchor": "there each anchor has the best of six β; here SFT has the best of three, and EMA one",
    "liti-trajectory-4": "there several runs are measured on their way; here one a seed",
    "liti-one": "there several runs are measured on their way; here one a seed",
    "equal-batch-of-16-once": "there each is tuned for its batch; here both have WARP's settings",
    "equal-batch-of-16": "there one iteration, tuned for its batch; here two, with WARP's settings",
    "forgetting": "there the texts are not the SFT policy's own; two means, which have no interval",
    "gold": "two means, which have no interval"}


def predictions(evidence: Mapping) -> dict:
    """What the tiny worlds predict of each claim: the interval `low` to `high` of effects, why, and the side of the
    claim's null that all of it lies on ("above", "below" or "either"). By which draws of them, in `draws`.

    `evidence` is what claims.json holds. The committed predictions.json was made by this before the experiment ran, and
    is made again only before it. Raises ValueError for evidence that lacks a claim.
    """
    found = {}
    for claim in REAL_CLAIMS:
        interval, because = _OTHERWISE.get(claim.name, (lambda evidence, name=claim.name: hull(evidence, name), _SAME))
        low, high = interval(evidence)
        sign = "either" if low <= claim.null <= high else "above" if low > claim.null else "below"
        found[claim.name] = {"low": round(low, 4), "high": round(high, 4), "sign": sign, "because": because}
    return {"draws": evidence["draws"], "claims": found}


def predicted_gain(short_angle: float, steps: int, kl: float, noise: Mapping | None = None) -> dict[str, float] | None:
    """The reward that merging four adds at `kl` nats over single runs of so many steps, by the law that each tiny world
    fits, from the angle in degrees of two runs of `settings.SHORT` steps.

    `noise` is what noise.json holds, the committed one where it is None. None where that has no law.
    """
    laws = (load("noise") if noise is None else noise).get("laws")
    if not laws:
        return None
    return {law["fitted_in"]: round(float(Law(law["c"]["value"], law["alpha"]["value"]).gain(short_angle, steps, kl)),
                                    4) for law in laws}


# --- and what came of it ------------------------------------------------------------------------


def with_starts(kept: Sequence[Mapping]) -> list[dict]:
    """The rows of all units; every front and trajectory starts at θ_sft, which is measured once.

    A start has the numbers that the rest of its line has: perplexity is measured of few.
    """
    rows = [row for unit in kept for row in unit["rows"]]
    start = next(row for row in rows if row["line"] == "θ_sft")
    found = []
    for place in ("eta", "step"):
        lines = {(row["line"], row["seed"], row.get("run")): row for row in rows
                 if place in row and "kl" in row and row["seed"] is not None}
        found += [{**{name: start[name] for name in row if name in start}, "line": line, "seed": seed,
                   **({} if run is None else {"run": run}), place: 0}
                  for (line, seed, run), row in sorted(lines.items(), key=lambda item: str(item[0]))]
    return found + [row for row in rows if row["line"] != "θ_sft"]


def real_report(kept: Sequence[Mapping], seeds: Sequence[int], predicted: Mapping, noise: Mapping | None = None,
                law_first: bool = True) -> dict:
    """What smollm2.json holds: verdicts beside predictions, the points of every line, completions, the limit, and what
    each line cost.

    A claim `came_true` where its effect lies in the interval that was predicted, and its `sign_came_true` where it lies
    on the side of the null that all of that interval does. Both are None without an effect, the latter also where the
    interval has both sides. `noise` is what noise.json holds, the committed one where it is None, and `law_first` says
    whether its law was fitted before the units were run.
    """
    rows = with_starts(kept)
    by_seed = [row for row in rows if row["seed"] is not None and row["line"] != "completion"]
    evidence = Rows(REAL, by_seed)
    claims = [outcome_of(decide(replace(claim, prediction=(expected["low"], expected["high"])), evidence), expected)
              for claim in REAL_CLAIMS for expected in (predicted["claims"][claim.name],)]
    return {
        "world": REAL, "seeds": list(seeds), "interval": COVERS, "claims": claims,
        "predicted_by_draws": predicted["draws"], "law": {**law_outcome(rows, claims, noise), "first": law_first},
        "rows": [row for row in by_seed if "kl" in row],
        "limit": [row for row in rows if row["line"] == "limit"],
        "best_of_n": [row for row in rows if row["line"] == "best of n"],
        "completions": [row for row in rows if row["line"] == "completion"], "costs": line_costs(kept),
        "cpu_hours": round(sum(unit["cpu_seconds"] for unit in kept) / 3600, 2),
        "provenance": provenances([{"world": REAL, "study": unit["unit"]["kind"], "provenance": unit["provenance"]}
                                   for unit in kept])}


def outcome_of(entry: dict, expected: Mapping) -> dict:
    """A claim decided on the real model, with why its effect was expected and whether that came true."""
    effect, side = entry["effect"], expected["sign"]
    came_true = None if effect is None else expected["low"] <= effect <= expected["high"]
    sign = None if effect is None or side == "either" else (effect > entry["null"]) == (side == "above")
    return {**entry, "because": expected["because"], "differs": DIFFERS.get(entry["name"], ""), "sign": side,
            "came_true": came_true, "sign_came_true": sign}


def law_outcome(rows: Sequence[Mapping], claims: Sequence[Mapping], noise: Mapping | None = None) -> dict:
    """What the law says that merging four gains, from the pilot's angle, beside what was measured at the same KL.

    `predicted` is None where the noise map has no law, or no level is reached by all seeds.
    """
    gain = next(claim for claim in claims if claim["name"] == "4-runs-against-1")
    angle, kl = next(row["value"] for row in rows if row["line"] == "short angle"), gain.get("level")
    return {"short_angle": angle, "steps": WARP.steps, "kl": kl, "measured": gain["effect"],
            "ci_low": gain["ci_low"], "ci_high": gain["ci_high"],
            "predicted": None if kl is None else predicted_gain(angle, WARP.steps, kl, noise)}


def line_costs(kept: Sequence[Mapping]) -> list[dict]:
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
    """Claims, predictions and outcomes as Markdown, what the law said, and what each line cost."""
    return "\n\n".join([predictions_table(found), f"{len(found['seeds'])} seeds. Intervals: {found['interval']}.",
                        law_sentence(found["law"]), costs_table(found),
                        f"{found['cpu_hours']:g} hours of one core in all."]) + "\n"


def predictions_table(found: Mapping) -> str:
    """Each claim with what the tiny worlds predicted and what came of it, as Markdown."""
    lines = ["| claim | predicted by the tiny worlds | why | what differs there | on the real model | came true | its "
             "sign |", "|---|---|---|---|---|---|---|"]
    words = {True: "yes", False: "no", None: "–"}
    for claim in found["claims"]:
        low, high = claim["prediction"]
        lines.append(f"| {claim['statement']} | {low:+.2f} to {high:+.2f} | {claim['because']} | {claim['differs']} | "
                     f"{cell(claim)} | {words[claim['came_true']]} | {words[claim['sign_came_true']]} |")
    return "\n".join(lines)


def short_table(found: Mapping) -> str:
    """Each claim with what was predicted and what came of it, in few words, as Markdown: README's."""
    lines = ["| claim | predicted | on SmolLM2 |", "|---|---|---|"]
    for claim in found["claims"]:
        low, high = claim["prediction"]
        lines.append(f"| {claim['statement']} | {low:+.2f} to {high:+.2f} | {short(claim)} |")
    return "\n".join(lines)


def came_true(found: Mapping) -> list[str]:
    """How many predictions came true, in sentences: of effects, of sides, and what three seeds can tell at all."""
    claims = [claim for claim in found["claims"] if claim["effect"] is not None]
    lost = [claim for claim in found["claims"] if claim["effect"] is None]
    signed = [claim for claim in claims if claim["sign_came_true"] is not None]
    wrong = [claim for claim in signed if not claim["sign_came_true"]]
    open_ = [claim for claim in claims if claim["name"] not in ONE_WAY]
    clear = [claim for claim in open_ if claim["verdict"] in ("holds", "fails")]
    apart = [claim for claim in claims if claim["ci_low"] is not None and
             (claim["ci_low"] > claim["prediction"][1] or claim["ci_high"] < claim["prediction"][0])]
    inside = sum(bool(claim["came_true"]) for claim in claims)
    sentences = [
        f"{inside} of {len(claims)} measured effects lie in the interval that the tiny worlds predicted.",
        f"For {len(signed)} of them that interval has one side only; {len(signed) - len(wrong)} effects lie on it"
        + statements(wrong, "; the others: ") + ".",
        f"Of {len(open_)} claims that could come out either way {0.05 * len(open_):.1f} would hold or fail by chance "
        f"if nothing had any effect; with {len(found['seeds'])} seeds {len(clear)} do" + statements(clear, ": ")
        + statements([claim for claim in claims if claim not in open_], "; not counted: ") + ".",
        (f"{len(apart)} intervals lie wholly outside what was predicted" + statements(apart, ": ") + ".") if apart
        else "No interval lies wholly outside what was predicted."]
    if lost:
        sentences.append("No KL is reached by all seeds" + statements(lost, " for: ") + ".")
    return sentences


def settings_sentence() -> str:
    """The settings that all lines share, and how many completions measure them."""
    return (f"Learning rate {WARP.lr:g}, β = {WARP.beta:g}, μ = {WARP.mu:g}, {WARP.steps} steps an iteration, a step "
            f"back to η = {WARP.eta:g} between them; chosen in a pilot with another seed, for WARP's batches of "
            f"{WARP.batch_size}. Measured on {HELD_OUT} held-out prompts, one completion each; the limit on "
            f"{LIMIT_SAMPLES_REAL} completions of each.")


def statements(claims: Sequence[Mapping], before: str) -> str:
    """Claims by their statements and verdicts behind a word, or nothing where there are none."""
    return before + "; ".join(f"{claim['statement']} ({claim['verdict']})" for claim in claims) if claims else ""


def costs_table(found: Mapping) -> str:
    """Of each line the steps, samples and hours of one seed, as Markdown."""
    lines = ["| line | steps in sequence | steps | samples | hours of one core, measuring on the way included | runs "
             "measured on their way |", "|---|---|---|---|---|---|"]
    lines += [f"| {row['line']} | {row['steps_in_sequence']} | {row['steps']} | {row['samples']} | {row['cpu_hours']} "
              f"| {TRACED[row['line']]} |"
              for row in found["costs"]]
    return "\n".join(lines)


def law_sentence(law: Mapping) -> str:
    """What the law of the noise map said of merging four, beside what it gained."""
    if law["kl"] is None:
        return "The law says nothing: there is no KL that every seed reaches."
    if law["predicted"] is None:
        return "The law says nothing: the committed noise map has none."
    said = ", ".join(f"{gain:+.2f} (fitted in {world})" for world, gain in law["predicted"].items())
    return (f"By two runs at {law['short_angle']:.0f}° in the pilot, merging four was to gain {said} at "
            f"{law['kl']:g} nats; it gained {law['measured']:+.2f} [{bound(law['ci_low'])}, {bound(law['ci_high'])}]."
            + ("" if law["first"] else " The law was fitted on the tiny worlds alone, but after this experiment had "
               "run: it is a test of the law, and no prediction."))


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
