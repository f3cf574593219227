"""The explorer's data: fronts for every iteration, number of merged runs and λ, as plain dicts.

A grid holds `lines`, each the front of one merge: `iteration`, `runs` (how many are merged), `lam`
(where two are), and `points` by rising η. It is measured once; a move of a slider only reads it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from ...averaging.liti import liti
from ...averaging.merging import merge
from ...averaging.state_dicts import Weights, bytes_of
from ...evaluation.limit import optimal_front, reference_rewards
from ...evaluation.metrics import sample_completions
from ...policies.prompts import Prompts
from ...result import WarpResult

ETAS, LAMBDAS, SAMPLES = tuple(np.linspace(0, 1, 11).round(2)), (0.0, 0.25, 0.5, 0.75, 1.0), 256
FAST_ETAS, FAST_LAMBDAS, FAST_SAMPLES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (0.0, 0.5, 1.0), 64
LIMIT_PROMPTS, LIMIT_SAMPLES, FAST_LIMIT_SAMPLES = 64, 512, 128
BYTES_AT_ONCE = 2**28  # of weights that are stacked to be measured together


@dataclass(frozen=True)
class View:
    """What is looked at: a point (η, iteration, merged runs, λ) and how it is drawn."""

    eta: float
    iteration: int
    runs: int
    lam: float = 0.5
    reward: str = "reward"
    root: bool = False
    trajectories: bool = True
    limit: bool = True


def build_grid(result: WarpResult, fast: bool = False, prompts: int = 4, limit: Sequence[dict] | None = None,
               progress: bool = True) -> dict:
    """Measure every point of the grid, sample its completions, and estimate the limit if it is not given.

    A dict of plain numbers, texts and lists. Every point has the numbers of `PolicyMetrics` but the
    perplexity, `eta`, and `completions`, one for each of the first held-out `prompts`, all from the
    same random numbers. Raises ValueError for a result without iterations.
    """
    if not result.iterations:
        raise ValueError("the result has no iterations to explore; run_warp returns one that has")
    etas, lambdas, keys, per_prompt = _extent(result, fast)
    shown = result.task.first(prompts).eval_prompts
    places = [(key, eta) for key in keys for eta in etas[1:]]
    at_once = max(1, min(64, BYTES_AT_ONCE // bytes_of(result.sft)))
    with tqdm(total=len(places) + 1, desc="explorer", unit="point", disable=None if progress else True,
              leave=False) as bar:
        (start,) = measure_points(result, [result.sft], [0.0], shown, per_prompt)
        bar.update()
        merges = {key: merged_weights(result, *key) for key in keys}
        measured = {}
        for first in range(0, len(places), at_once):
            batch = places[first:first + at_once]
            states = [liti(result.sft, merges[key], eta) for key, eta in batch]
            measured |= dict(zip(batch, measure_points(result, states, [eta for _, eta in batch], shown, per_prompt)))
            bar.update(len(batch))
    lines = [{"iteration": i, "runs": m, "lam": lam,
              "points": [start, *(measured[(i, m, lam), eta] for eta in etas[1:])]} for i, m, lam in keys]
    if limit is None:
        limit = estimate_limit(result, fast, progress)
    return {"etas": list(map(float, etas)), "lambdas": list(lambdas), "lines": lines,
            "iterations": sorted({key[0] for key in keys}), "runs": sorted({key[1] for key in keys}),
            "gold": result.task.gold is not None, "unit": getattr(result.task.judge, "unit", "reward units"),
            "prompts": shown.texts, "samples": per_prompt * len(result.task.eval_prompts),
            "trajectories": [dict(row) for row in result.trajectories], "limit": [dict(p) for p in limit]}


def completions_of(result: WarpResult, fast: bool = False) -> int:
    """How many completions `build_grid` measures, that of the limit left out."""
    etas, _, keys, per_prompt = _extent(result, fast)
    return (1 + len(keys) * (len(etas) - 1)) * len(result.task.eval_prompts) * per_prompt


def _extent(result, fast):
    """η, λ, the keys of the lines, and completions a held-out prompt of a grid."""
    etas, lambdas, samples = (FAST_ETAS, FAST_LAMBDAS, FAST_SAMPLES) if fast else (ETAS, LAMBDAS, SAMPLES)
    return etas, lambdas, _keys(result, lambdas), max(1, math.ceil(samples / len(result.task.eval_prompts)))


def _keys(result, lambdas) -> list[tuple[int, int, float | None]]:
    """(iteration, merged runs, λ or None) of every line. All numbers of runs up to 5, then every doubling."""
    total = min(len(iteration.policies) for iteration in result.iterations)
    counts = range(1, total + 1) if total <= 5 else [*(2**k for k in range(total.bit_length()) if 2**k < total), total]
    return [(i, m, lam) for i in range(1, len(result.iterations) + 1) for m in counts
            for lam in (lambdas if m == 2 else (None,))]


def merged_weights(result: WarpResult, iteration: int, runs: int, lam: float | None = None) -> Weights:
    """The merge of the first `runs` policies of an iteration (1 … I), by the config's method; at λ if they are two."""
    chosen = result.iterations[iteration - 1]
    policies = chosen.policies[:runs]
    if runs == 1:
        return dict(policies[0])
    if runs == len(chosen.policies) and runs != 2:
        return chosen.merged
    return merge(chosen.init, policies, result.config.merge, None if runs != 2 or lam is None else (1 - lam, lam))


def measure_points(result: WarpResult, states: Sequence[Weights], etas: Sequence[float], prompts: Prompts,
                   samples: int) -> list[dict]:
    """Points of a grid: metrics of `samples` completions a held-out prompt, and the completions of `prompts`."""
    metrics = result.measure(states, samples=samples, texts=False)  # perplexity is not shown
    texts = [[" ".join(text.split()) for text in of_policy]
             for of_policy in sample_completions(result.task.measured_on(prompts), states)]
    numbers = [{name: math.nan if value is None else value for name, value in m.as_dict().items()} for m in metrics]
    return [{"eta": float(eta), **some, "completions": said} for eta, some, said in zip(etas, numbers, texts)]


def estimate_limit(result: WarpResult, fast: bool = False, progress: bool = True) -> list[dict]:
    """The limit on (some of) the held-out prompts, with the gold reward of the same optimum where there is one."""
    task, samples = result.task.first(LIMIT_PROMPTS), FAST_LIMIT_SAMPLES if fast else LIMIT_SAMPLES
    with tqdm(total=len(task.eval_prompts) * samples, desc="limit", unit="sample", disable=None if progress else True,
              leave=False) as bar:
        rewards, gold = reference_rewards(task, samples, progress=bar)
    return optimal_front(rewards=rewards, gold=gold)


# --- reading a grid ---------------------------------------------------------------------------


def point_at(grid: dict, view: View) -> dict:
    """The point of a view, linearly between its neighbours in η and λ, standard errors too.

    `between` tells whether it lies between measured points; `completions` are those of the nearest
    one, whose η is `completions_eta`. Raises ValueError for a view outside the grid.
    """
    points = line_at(grid, view)
    etas = grid["etas"]
    if not etas[0] <= view.eta <= etas[-1]:
        raise ValueError(f"eta is {view.eta}; the grid reaches from {etas[0]:g} to {etas[-1]:g}")
    nearest = points[int(np.argmin(np.abs(np.array(etas) - view.eta)))]
    point = {name: float(np.interp(view.eta, etas, [p[name] for p in points]))
             for name, value in nearest.items() if is_number(value)}
    on_grid = view.eta in etas and (view.runs != 2 or view.lam in grid["lambdas"])
    return {**point, "eta": view.eta, "between": not on_grid, "completions": nearest["completions"],
            "completions_eta": nearest["eta"]}


def line_at(grid: dict, view: View) -> list[dict]:
    """The points of a view's front by rising η; for two runs linearly between the neighbouring λ.

    Raises ValueError for an iteration, a number of runs or a λ that the grid has not.
    """
    lines = {line["lam"]: line["points"] for line in grid["lines"]
             if (line["iteration"], line["runs"]) == (view.iteration, view.runs)}
    if not lines:
        raise ValueError(f"the grid has no iteration {view.iteration} with {view.runs} runs merged; it has iterations "
                         f"{grid['iterations']} and {grid['runs']} runs")
    if view.runs != 2:
        return lines[None]
    if view.lam in lines:
        return lines[view.lam]
    lambdas = sorted(lines)
    if not lambdas[0] <= view.lam <= lambdas[-1]:
        raise ValueError(f"lambda is {view.lam}; it lies between 0 and 1")
    above = next(lam for lam in lambdas if lam > view.lam)
    below = lambdas[lambdas.index(above) - 1]
    share = (view.lam - below) / (above - below)
    nearest = lines[below if share < 0.5 else above]
    return [{name: (1 - share) * lines[below][n][name] + share * lines[above][n][name] if is_number(value) else value
             for name, value in point.items()} for n, point in enumerate(nearest)]


def is_number(value: object) -> bool:
    """Whether a value of a point is a number, which can be interpolated."""
    return isinstance(value, (int, float))


def shown_kl(grid: dict, limit: bool) -> float:
    """The KL to which a picture goes: that of all lines, but not far past the merges of all runs."""
    whole = [p["kl"] for line in grid["lines"] if line["runs"] == grid["runs"][-1] for p in line["points"]]
    whole += [p["kl"] for p in grid["limit"]] if limit else []
    every = [p["kl"] for line in grid["lines"] for p in line["points"]]
    return 1.1 * min(max(whole + every), 1.5 * max(whole)) or 1.0


def changed_words(before: str, after: str) -> list[tuple[str, bool]]:
    """The words of `after`, each with whether it is new against `before` (by the longest common runs of words)."""
    old, new = before.split(), after.split()
    kept = set()
    for block in difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks():
        kept.update(range(block.b, block.b + block.size))
    return [(word, n not in kept) for n, word in enumerate(new)]
