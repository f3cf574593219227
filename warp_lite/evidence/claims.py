"""The claims: what each says, the number that decides it, and the rule by which it does.

An effect is a number a seed; policies that share a seed are compared with one another. Effects are
differences in reward where both sides have one KL, differences in the area of the front up to 4
nats, or plain numbers. A comparison at one KL, or at that KL or less, is made at the highest of `KLS` that
every seed of both sides reaches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..evaluation.statistics import t_interval
from . import waiting
from .bench import draw_of
from .decisive import LONG_BETAS, QUALITIES, SIZES, best_of_others, difference_of_gains
from .effects import (
    AREA,
    REWARD,
    Effect,
    Rows,
    areas,
    at_one_kl,
    at_proxy,
    best_of_n_area,
    curvature,
    ends,
    line_of,
    plain,
    share,
    under_the_chord,
    within_one_kl,
)
from .settings import ANCHORS, EQUAL, LARGE, NOISY, area

# The smallest difference worth having, by unit, written down before it was asked of any result.
WORTH = {REWARD: 0.05, "gold reward": 0.05, "nats": 0.1, "tokens": 0.5, "share of pairs": 0.01, "per token": 0.1,
         "share of the mean norm": 0.02, "steps an exchange": 0.25}
WORTH_AREA = {"sentiment": 0.08, "detail": 0.11}  # reward × nats: 1 to 2 % of the limit's area
# The claims that count most, which the README shows. Named before the evidence was made, but for the two of the limit,
# which were added when a first share of it was known.
HEADLINES = ("ema-anchor", "no-kl-gold", "4-runs-against-1", "liti-trajectory", "average-two", "slerp-lerp-reward",
             "slerp-lerp-front", "angle", "iteration-2-reach", "iteration-2-front", "length", "diversity",
             "ablation-liti", "beta-for-liti", "equal-one-long-run", "equal-batch-of-16", "limit-90",
             "limit-90-past")


def lines_of(claim: Claim, rows: Rows) -> list:
    """The lines that a claim compares, for curves and figures."""
    return [line_of(line, rows) for line in claim.lines if line is not None]


def lines_needed(claims: Sequence[Claim], worlds: Sequence[str]) -> dict[tuple[str, str], tuple[str, ...] | None]:
    """The names of the lines that claims compare, by world and study; None where a claim names none, and needs all."""
    needed: dict[tuple[str, str], tuple[str, ...] | None] = {}
    for world in worlds:
        for study in {claim.study for claim in claims}:
            of_study = [claim for claim in claims if claim.study == study]
            lines = [line(world) if callable(line) else line for claim in of_study for line in claim.lines
                     if line is not None]
            names = {line["line"] if isinstance(line, dict) else line for line in lines}
            needed[world, study] = tuple(sorted(names)) if all(claim.lines for claim in of_study) else None
    return needed


def it(name: str, iteration: int) -> dict:
    """The line `name` at one iteration, as `Rows.fronts` takes it."""
    return {"line": name, "iteration": iteration}


def of(name: str, beta: float) -> dict:
    """The line `name` at one β, as `Rows.fronts` takes it."""
    return {"line": name, "beta": beta}


@dataclass(frozen=True)
class Claim:
    """A statement and what decides it."""

    name: str
    figure: str  # of the paper, or the reviewers' question
    statement: str
    study: str
    effect: Callable[[Rows], Effect]
    rule: str
    unit: str = REWARD
    null: float = 0.0
    margin: float = 0.0
    lines: tuple = ()  # what it compares and its figure draws; none: it needs its study whole
    prediction: tuple[float, float] | None = None  # the effects that were expected, where that was written down before

    def worth(self, world: str) -> float:
        """The smallest difference worth having, in the claim's unit: an interval within it is "no difference".

        0, which asks for none, where the rule is "within" and where the null is a threshold and not equality.
        """
        if self.rule == "within" or self.null not in (0.0, 1.0):
            return 0.0
        return WORTH_AREA[world] if self.unit == AREA else WORTH[self.unit]


def _claim(name, figure, statement, study, kind, a, b, rule="above", null=0.0, margin=0.0, what="reward") -> Claim:
    effect = {at_one_kl: lambda: at_one_kl(a, b, what), within_one_kl: lambda: within_one_kl(a, b),
              areas: lambda: areas(a, b), at_proxy: lambda: at_proxy(a, b), ends: lambda: ends(a, b, what)}[kind]()
    units = {"kl": "nats", "length": "tokens", "distinct": "share of pairs", "perplexity": "per token",
             "gold": "gold reward"}
    unit = {areas: AREA, at_proxy: "gold reward"}.get(kind) or units.get(what, REWARD)
    return Claim(name, figure, statement, study, effect, rule, unit, null, margin, (a, b))


CLAIMS: tuple[Claim, ...] = (
    # stage 1
    _claim("ema-anchor", "3b", "An EMA anchor gives more reward than an SFT anchor (each with its best β) at one KL",
           "anchors", at_one_kl, "EMA", "SFT"),
    _claim("no-kl-proxy", "3b", "Without a KL penalty the proxy reward rises", "anchors", ends, "no KL", None),
    _claim("no-kl-gold", "–", "Without a KL penalty the gold reward falls below that of the SFT policy", "anchors",
           ends, "no KL", None, "below", what="gold"),
    _claim("lower-mu", "15", "Half of μ gives a better front", "anchors", at_one_kl, "EMA, half μ", "EMA"),
    _claim("higher-beta", "15", "Twice β gives a better front", "anchors", at_one_kl, "EMA, double β", "EMA"),
    _claim("ema-weights", "14", "The EMA's weights are no worse than the policy's at one KL (to .05)", "merging",
           at_one_kl, "anchor", "run", null=-0.05),
    # stage 2
    _claim("slerp-reward", "3c", "SLERP of two has more reward than its runs have on average", "merging", ends,
           "slerp-2", "run"),
    _claim("slerp-kl", "3c", "SLERP of two has less KL than its runs have on average", "merging", ends, "slerp-2",
           "run", "below", what="kl"),
    _claim("slerp-lerp-reward", "3c", "At η = 1 SLERP of four has more reward than LERP", "merging", ends, "slerp-4",
           "lerp-4"),
    _claim("slerp-lerp-kl", "3c", "At η = 1 SLERP of four has more KL than LERP", "merging", ends, "slerp-4", "lerp-4",
           what="kl"),
    _claim("slerp-lerp-front", "10", "At one KL SLERP of four has more reward than LERP, η past 1 included", "merging",
           at_one_kl, "slerp-4", "lerp-4"),
    Claim("angle", "11", "Task vectors of weight matrices are at right angles (to 15°)", "merging", plain("angle"),
          "within", "degrees", 90.0, 15.0),
    Claim("norm-slerp", "B", "SLERP of two keeps the norm of the task vectors (to 2 %)", "merging",
          plain("norm of SLERP"), "within", "share of the mean norm", 1.0, 0.02),
    Claim("norm-lerp", "B", "LERP of two loses norm", "merging", plain("norm of LERP"), "below",
          "share of the mean norm", 1.0),
    *(_claim(f"{m}-runs-against-{n}", "4b", f"LITI of {m} merged policies is above that of {n} at one KL", "merging",
             at_one_kl, f"slerp-{m}", "run" if n == 1 else f"slerp-{n}")
      for m, n in ((2, 1), (3, 2), (4, 3), (5, 4), (4, 1))),
    # stage 3
    _claim("liti-trajectory", "4a", "LITI of two merged policies is above the runs' trajectories at one KL", "merging",
           at_one_kl, "slerp-2", "trajectory"),
    _claim("liti-trajectory-4", "4a", "LITI of four merged policies is above the runs' trajectories at one KL",
           "merging", at_one_kl, "slerp-4", "trajectory"),
    _claim("liti-one", "13", "LITI of one run is above its own trajectory at one KL", "merging", at_one_kl, "run",
           "trajectory"),
    # asked once the three above were decided: a run that passes a KL early may come back to it with more reward
    *(_claim(f"{name}-best", "–", f"LITI of {words} at one KL or less", "merging", within_one_kl, line, "trajectory")
      for name, line, words in (
          ("liti-trajectory", "slerp-2", "two merged policies is above the best of the runs' trajectories"),
          ("liti-trajectory-4", "slerp-4", "four merged policies is above the best of the runs' trajectories"),
          ("liti-one", "run", "one run is above the best of its own trajectory"))),
    Claim("kl-convex", "9", "KL is convex in η", "merging", curvature("slerp-4", "kl"), "above", "nats", lines=(
        "slerp-4",)),
    Claim("reward-concave", "9", "Reward is concave in η", "merging", curvature("slerp-4", "reward"), "below",
          lines=("slerp-4",)),
    *(Claim(f"kl-chord-{eta:g}", "B", f"KL at η = {eta:g} is at most {eta:g} times the KL at 1", "merging",
            under_the_chord("slerp-4", eta), "above", "nats", lines=("slerp-4",)) for eta in (0.3, 0.8)),
    _claim("average-one", "13", "The mean of a run's checkpoints is above the run at one KL", "merging", at_one_kl,
           "average", "run"),
    _claim("average-two", "13", "Two merged policies are above the mean of one run's checkpoints at one KL", "merging",
           at_one_kl, "slerp-2", "average"),
    # the iteration
    *(_claim(f"iteration-{i}-front", "4c", f"Iteration {i} is above iteration {i - 1} at one KL", "iterations",
             at_one_kl, it("WARP", i), it("WARP", i - 1)) for i in (2, 3)),
    *(_claim(f"iteration-{i}-reach", "4c", f"Iteration {i} reaches a higher reward than iteration {i - 1}",
             "iterations", ends, it("WARP", i), it("WARP", i - 1)) for i in (2, 3)),
    _claim("toward-init", "17", "LITI toward the iteration's init and toward SFT give like fronts (to .1)",
           "iterations", at_one_kl, "toward init", it("WARP", 2), "within", margin=0.1),
    _claim("eta-low-kl", "16", "At one KL a second iteration from η = 0.5 is above one from η = 0.3", "iterations",
           at_one_kl, "η = 0.5", it("WARP", 2)),
    _claim("mixed-eta-3", "16", "Mixing η = 0.3 and 0.5 is above η = 0.3 alone at one KL", "iterations", at_one_kl,
           "mixed η", it("WARP", 2)),
    _claim("mixed-eta-5", "16", "Mixing η = 0.3 and 0.5 is above η = 0.5 alone at one KL", "iterations", at_one_kl,
           "mixed η", "η = 0.5"),
    _claim("length", "18a", "Length grows along the front", "iterations", ends, it("WARP", 3), None, what="length"),
    _claim("diversity", "19", "Diversity falls along the front", "iterations", ends, it("WARP", 3), None, "below",
           what="distinct"),
    _claim("length-mix", "18c", "Merging a run with a length penalty and one without is above two without", "rewards",
           at_one_kl, "one of each", "plain"),
    _claim("length-mix-penalised", "18c", "Merging a run with a length penalty and one without is above two with it",
           "rewards", at_one_kl, "one of each", "penalised"),
    _claim("two-rewards", "–", "Merging runs of two reward models has more gold reward at one KL than two of the first",
           "rewards", at_one_kl, "two rewards", "plain", what="gold"),
    _claim("two-rewards-second", "–",
           "Merging runs of two reward models has more gold reward at one KL than two of the second", "rewards",
           at_one_kl, "two rewards", "second reward", what="gold"),
    # the reviewers' questions
    _claim("ablation-ema", "question 1", "WARP is better than without the EMA (SFT anchor, best β)", "iterations",
           areas, it("WARP", 2), "without EMA"),
    _claim("ablation-slerp", "question 1", "WARP is better than without merging (one run)", "iterations", areas,
           it("WARP", 2), "without SLERP"),
    _claim("ablation-liti", "question 1", "WARP is better than without the step back between iterations (η = 1)",
           "iterations", areas, it("WARP", 2), "without LITI"),
    _claim("ablation-iteration", "question 1", "Two iterations are better than one", "iterations", areas,
           it("WARP", 2), it("WARP", 1)),
    _claim("ablation-lerp", "question 1", "WARP with SLERP is better than with LERP", "iterations", areas,
           it("WARP", 2), "LERP"),
    _claim("beta-for-liti", "question 2", "LITI is better than tuning β with a refreshed base", "refresh", areas,
           "WARP", "refreshed base"),
    _claim("tax-perplexity", "question 3", "At one KL WARP has a lower perplexity on held-out texts than one long run",
           "equal", at_one_kl, "WARP", "one long run", "below", what="perplexity"),
    _claim("tax-gold", "question 3", "At one KL WARP has more gold reward than one long run", "equal", at_one_kl,
           "WARP", "one long run", what="gold"),
    *(_claim(f"equal-{name.replace(' ', '-').lower()}", "question 4", f"At equal samples WARP is better than {words}",
             "equal", areas, "WARP", name)
      for name, words in (("WARP with LERP", "WARP with LERP"), ("one iteration", "one iteration of twice the steps"),
                          ("one long run", "one run eight times as long"),
                          ("checkpoint average", "the mean of a long run's checkpoints"),
                          ("batch of 16", "one run with batches of 16"),
                          ("batch of 32", "one run with batches of 32"))),
    Claim("equal-best-of-n", "question 4", "WARP is better than best of n", "equal",
          lambda rows: Effect({seed: area(rows.fronts("WARP", seed)[0]) - best_of_n_area(rows, seed)
                               for seed in rows.seeds}), "above", AREA),
    _claim("outer-momentum", "–", "Momentum in the outer step is better than none", "outer", areas, "momentum",
           "η = 0.5"),
    _claim("outer-momentum-1", "–", "Momentum with η = 0.5 is better than η = 1 without", "outer", areas, "momentum",
           "η = 1"),
    *(_claim(f"weak-{name}-{beta:g}", "–", f"With β = {beta:g} {words} at one proxy reward", "weak", at_proxy,
             of(a, beta), of(b, beta))
      for beta in (0.0, 0.01) for name, a, b, words in (
          ("slerp", "slerp", "run", "SLERP of four keeps more gold reward than single runs"),
          ("lerp", "lerp", "run", "LERP of four keeps more gold reward than single runs"),
          ("wide", "lerp", "batch of 32", "LERP of four keeps more gold reward than one run of equal samples"))),
    Claim("limit-90", "–", "The best WARP attains 90 % of the limit's area", "best", share("best WARP"), "above",
          "share of the limit's area", 0.9),
    Claim("limit-90-past", "–", "Drawn on past the merge, to η = 2, the best WARP attains 90 % of it", "best",
          share("best WARP, η to 2"), "above", "share of the limit's area", 0.9),
)


def _predicted(name, statement, study, effect, prediction, rule="above", unit=REWARD, null=0.0, lines=()) -> Claim:
    return Claim(name, "–", statement, study, effect, rule, unit, null, lines=lines, prediction=prediction)


_SMALL, _LARGE = list(SIZES)[0], list(SIZES)[-1]
# Where merging would win: predictions first, from the noise map and the claims above.
WOULD_WIN: tuple[Claim, ...] = (
    *(_predicted(f"many-{m}-against-{n}", f"With batches of 2, LITI of {m} merged runs is above that of {n} at one KL",
                 "many runs", at_one_kl(f"slerp-{m}", f"slerp-{n}"), prediction, lines=(f"slerp-{m}", f"slerp-{n}"))
      for m, n, prediction in ((8, 4, (0.01, 0.08)), (16, 8, (0.0, 0.05)), (16, 4, (0.02, 0.12)))),
    _predicted("size", f"Merging four gains more in policies of {_LARGE} parameters than of {_SMALL}, at one KL",
               "sizes", difference_of_gains({"size": _LARGE}, {"size": _SMALL}), (-0.10, 0.10)),
    *(_predicted(f"quality-{name.replace(' ', '-')}", f"With a reward model of {name} and β = 0.01, LERP of four keeps "
                 "more gold reward than one run of equal samples at one proxy reward", "quality",
                 at_proxy({"line": "lerp", "quality": name}, {"line": "batch of 32", "quality": name}), prediction,
                 unit="gold reward") for name, prediction in zip(QUALITIES, ((0.0, 0.5), (-0.05, 0.25)))),
    *(_predicted(f"own-rewards-{words.replace(' ', '-')}", f"Merging runs of four reward models has more gold reward "
                 f"at one KL than {than}", "own rewards", at_one_kl("own", line, "gold"), prediction,
                 unit="gold reward", lines=("own", line))
      for words, line, than, prediction in (
          ("one", "one", "merging four runs of one", (0.0, 0.25)),
          ("mean", "mean", "merging four runs of their mean", (-0.10, 0.05)),
          ("single", "one run on the mean", "one run on their mean", (0.05, 0.35)))),
    _predicted("shift", "Merging four gains more on prompts of nouns that training never saw than on seen ones",
               "shift", difference_of_gains({"prompts": "unseen"}, {"prompts": "seen"}), (-0.05, 0.05)),
    _predicted("long-anchor", "With μT = 90 an EMA anchor gives more reward than an SFT anchor (each with the β that "
               "is best on the other seeds) at one KL", "long anchor",
               best_of_others([f"EMA, β = {beta:g}" for beta in LONG_BETAS["ema"]],
                              [f"SFT, β = {beta:g}" for beta in LONG_BETAS["sft"]]), (-0.10, 0.30)),
    *(_predicted(f"waiting-{workers}-of-{batch}", f"After {waiting.STEPS} steps {workers} workers with batches of "
                 f"{batch}, merged once, are above one run with batches of {workers * batch}", "waiting",
                 waiting.at_the_end(workers, batch), (-1.0, -0.1), unit=AREA, lines=waiting.both(workers, batch))
      for workers, batch in waiting.CASES),
    *(_predicted(f"exchange-{workers}-of-{batch}", f"{workers} workers with batches of {batch}, merged once, wait less "
                 f"than one run with batches of {workers * batch} only where an exchange costs more than a step",
                 "waiting", waiting.break_even(workers, batch), (0.5, 4.0), unit="steps an exchange", null=1.0,
                 lines=waiting.both(workers, batch)) for workers, batch in waiting.CASES),
)
ALL = (*CLAIMS, *WOULD_WIN)


def decide(claim: Claim, rows: Rows) -> dict:
    """The claim in one world, as claims.json has it."""
    effect = claim.effect(rows)
    decided = decide_values(claim, rows.world, effect.values)
    if effect.reached:
        decided |= {"level": effect.level, "reached": effect.reached, "effect_at": effect.means}
    return decided


def decide_values(claim: Claim, world: str, values: Mapping[int, float]) -> dict:
    """What the effects of the claim in one world, a number a seed, come to: interval, p-value and verdict."""
    seeds = sorted(values)
    interval = t_interval([values[seed] for seed in seeds], [draw_of(seed) for seed in seeds])
    worth = claim.worth(world)
    decided = {
        "name": claim.name, "world": world, "paper_figure": claim.figure, "statement": claim.statement,
        "effect": interval.mean, "ci_low": interval.low, "ci_high": interval.high, "unit": claim.unit,
        "null": claim.null, "margin": claim.margin, "worth": worth, "rule": claim.rule, "seeds": interval.count,
        "verdict": interval.verdict(claim.rule, claim.null, claim.margin, worth),
        "p_value": None if claim.rule == "within" else interval.p_value(claim.null),
        "headline": claim.name in HEADLINES, "study": claim.study, "draws": interval.groups,
        **({"prediction": list(claim.prediction)} if claim.prediction else {}),
        "values": {str(seed): round(values[seed], 5) for seed in seeds}}
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in decided.items()}


def verdicts_of_halves(claim: Claim, world: str, values: Mapping[int, float]) -> list[str]:
    """The verdicts on the first half of the draws and on the others, which have nothing in common."""
    draws = sorted({draw_of(seed) for seed in values})
    halves = draws[:len(draws) // 2], draws[len(draws) // 2:]
    return [decide_values(claim, world, {seed: value for seed, value in values.items() if draw_of(seed) in half})[
        "verdict"] for half in halves]


def pick(only: Sequence[str] | None, decisive: bool = False) -> list[Claim]:
    """The claims of those names; or the paper's and its reviewers'; or with `decisive` those of `WOULD_WIN`.

    Raises ValueError that lists the names there are.
    """
    names = [claim.name for claim in ALL]
    for name in only or ():
        if name not in names:
            raise ValueError(f"there is no claim {name!r}; there are {', '.join(names)}")
    if not only:
        return list(WOULD_WIN if decisive else CLAIMS)
    return [claim for claim in ALL if claim.name in only]


METHODS: Mapping[str, tuple[str, str | dict]] = {
    # what the distance to the limit is shown of: the study and line of each
    **{name: ("equal", name) for name in (*EQUAL, "checkpoint average")},
    "single run, noisy setting": ("merging", "run"), "LITI of SLERP, M = 4": ("merging", "slerp-4"),
    "EMA anchor, one run": ("anchors", "EMA"), "best WARP": ("best", "best WARP"),
    "best WARP, η to 2": ("best", "best WARP, η to 2")}


def completions_spent(method: str) -> int:
    """How many completions the RL of one of `METHODS` samples: they are far from equal."""
    others = {"single run, noisy setting": NOISY.replace(runs=1, merge="none"), "LITI of SLERP, M = 4": NOISY,
              "EMA anchor, one run": ANCHORS, "checkpoint average": EQUAL["one long run"],
              **dict.fromkeys(("best WARP", "best WARP, η to 2"), LARGE)}
    config = EQUAL.get(method) or others[method]
    return config.iterations * config.runs * config.steps * config.batch_size
