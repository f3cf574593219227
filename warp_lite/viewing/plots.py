"""Pictures: one style and one colour a method, safe for the colour-blind; axes with units."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..evaluation.front import MIN_ESS, reward_at_kl

# One meaning a colour, from Okabe and Ito's palette and Tol's. Blue is merged by SLERP, darker with every iteration.
# "init" is what goes to or comes from another init than its neighbours, "mixed" merges runs of two inits.
COLOURS = {
    "single": "#7F7F7F", "slerp": "#0072B2", "lerp": "#E69F00", "liti": "#009E73", "ema": "#5E3C99",
    "sft": "#D55E00", "none": "#CC79A7", "limit": "#000000", "best_of_n": "#8C510A", "gold": "#B8860B",
    "batch": "#999933", "mistake": "#661100", "init": "#A100F2", "mixed": "#CC004C",
    "holds": "#117733", "fails": "#882255", "no difference": "#6699CC", "unclear": "#999999",
}
ITERATION_COLOURS = ("#4AA3DF", "#00508F", "#001F3F", "#44AA99", "#A6B8E8")
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.titlesize": 11, "axes.titlelocation": "left",
    "legend.frameon": False, "legend.fontsize": 9, "figure.dpi": 110, "savefig.bbox": "tight", "lines.linewidth": 1.8,
}
KL_LABEL = "KL to the SFT policy (nats per sequence)"
TITLE_WIDTH = 88  # characters that fit on a line of the title of a front


def style() -> AbstractContextManager[None]:
    """A context in which figures have the house's style."""
    return matplotlib.rc_context(STYLE)


def iteration_colour(i: int) -> str:
    """The colour of iteration i (from 1), as #RRGGBB; five in turn."""
    return ITERATION_COLOURS[(i - 1) % len(ITERATION_COLOURS)]


def column(points: Sequence[dict], name: str) -> np.ndarray:
    """One number of every point, (N,), nan where it is missing."""
    return np.array([p.get(name) if p.get(name) is not None else np.nan for p in points], dtype=float)


def draw_front(points: Sequence[dict], limit: Sequence[dict] = (), trajectories: Sequence[dict] = (),
               best_of_n: Sequence[dict] = (), unit: str = "reward units", reward: str = "reward",
               title: str | None = None) -> Figure:
    """Reward against KL: the η-front of each iteration, the single runs, the limit, best-of-n.

    `reward` is "reward" or "gold". Bars are standard errors over prompts. The limit has a band of
    two standard errors and ends where its effective sample size falls under 30; in gold it is where
    the optimum of the proxy lies, and bounds nothing.
    """
    if reward == "gold":
        best_of_n = ()
    limit = known(limit)
    with style():
        figure = Figure(figsize=(7.6, 5.2), layout="constrained")
        axes = figure.subplots()
        _draw_runs(axes, points, trajectories, reward)
        if limit:
            _draw_limit(axes, limit, reward)
        if best_of_n:
            axes.plot(column(best_of_n, "kl_bound"), column(best_of_n, "reward"), color=COLOURS["best_of_n"], ls="",
                      marker="x", ms=6, mew=1.6, zorder=3, label="best-of-n (its KL is an upper bound)")
        for (i,), rows in _by(points, "iteration").items():
            _draw_iteration(axes, i, rows, reward)
        _label_etas(axes, points, reward)
        _set_limits(axes, points, limit, trajectories, best_of_n, reward)
        axes.set(xlabel=KL_LABEL, ylabel=f"{'gold ' if reward == 'gold' else ''}reward ({unit})")
        text = front_finding(points, limit, trajectories, reward) if title is None else title
        axes.set_title("\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, TITLE_WIDTH)))
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="lower right" if reward == "reward" else "best",
                    frameon=True, framealpha=0.85, edgecolor="none")
    return figure


def draw_merges(ways: Sequence[dict], unit: str = "reward units") -> Figure:
    """Reward against KL along η for several ways to merge the same adapters (`lora.compare_merges`).

    The title says what the last way loses at η = 1 against the first; bars are standard errors over prompts.
    """
    colours = [COLOURS["slerp"], COLOURS["liti"], COLOURS["mistake"]]
    with style():
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = figure.subplots()
        for way, colour, marker in zip(ways, colours, "osX"):
            rows = way["points"]
            axes.errorbar(column(rows, "kl"), column(rows, "reward"), xerr=column(rows, "kl_se"),
                          yerr=column(rows, "reward_se"), color=colour, marker=marker, ms=5, elinewidth=0.9,
                          label=f"{way['name']} (relative error {way['error']:.2f})")
        axes.set(xlabel=KL_LABEL, ylabel=f"reward ({unit})")
        ends = [(way["name"], way["points"][-1]) for way in (ways[-1], ways[0])]
        axes.set_title("\n".join(f"{name}: reward {end['reward']:.2f} at a KL of {end['kl']:.2f} (η = {end['eta']:g})"
                                 for name, end in ends))
        axes.legend(loc="lower right")
    return figure


def known(limit: Sequence[dict]) -> list[dict]:
    """The part of a limit that can be trusted: up to where the effective sample size falls under 30."""
    kept = []
    for point in sorted(limit, key=lambda p: -p["beta"]):
        if point["ess"] < MIN_ESS:
            break
        kept.append(point)
    return kept


def _draw_runs(axes, points, trajectories, reward) -> None:
    """Single runs start where their iteration starts: the first at the SFT policy, later ones at an
    init that was not measured, so that their lines begin with the first measurement."""
    sft = next((p for p in points if p["eta"] == 0), None)
    for n, ((i, _), rows) in enumerate(_by(trajectories, "iteration", "run").items()):
        rows = [sft, *rows] if i == 1 and sft is not None else rows
        axes.plot(column(rows, "kl"), column(rows, reward), color=COLOURS["single"], lw=0.8, alpha=0.5, zorder=1,
                  label="single runs while they train" if n == 0 else None)


def _draw_limit(axes, limit, reward) -> None:
    kl, value = column(limit, "kl"), column(limit, reward)
    label = "limit (upper bound for every method)" if reward == "reward" else "where the proxy's optimum lies"
    axes.plot(kl, value, color=COLOURS["limit"], ls="--", lw=1.4, zorder=4, label=label)
    if reward == "reward":
        band = 2 * column(limit, "reward_se")
        axes.fill_between(kl, value - band, value + band, color=COLOURS["limit"], alpha=0.12, lw=0)
    axes.plot(kl[-1:], value[-1:], color=COLOURS["limit"], marker="|", ms=11, mew=1.6, zorder=4)
    note = f"{'limit' if reward == 'reward' else 'optimum'} not known\npast here"
    axes.annotate(note, (kl[-1], value[-1]), textcoords="offset points", xytext=(-2, 9), ha="center", va="bottom",
                  fontsize=8, color=COLOURS["limit"])


def _draw_iteration(axes, i, rows, reward) -> None:
    etas = [p["eta"] for p in rows]
    axes.errorbar(column(rows, "kl"), column(rows, reward),
                  xerr=column(rows, "kl_se"), yerr=column(rows, f"{reward}_se"), color=iteration_colour(i),
                  marker="o", ms=4, lw=1.8, elinewidth=0.9, zorder=5,
                  label=f"front of iteration {i} (dots: η from {min(etas):g} to {max(etas):g})")


def _label_etas(axes, points, reward) -> None:
    """η along the last front: half way and at its end."""
    last = max(p["iteration"] for p in points)
    rows = [p for p in points if p["iteration"] == last and p.get(reward) is not None]
    for p in rows:
        if p["eta"] in (0.5, 1.0, max(q["eta"] for q in rows)):
            axes.annotate(f"η={p['eta']:g}", (p["kl"], p[reward]), textcoords="offset points", xytext=(6, -11),
                          fontsize=8, color=iteration_colour(last), zorder=6)  # best-of-n lies above a front


def _set_limits(axes, points, limit, trajectories, best_of_n, reward) -> None:
    """All of the fronts and of the limit; of the rest what lies within their KL."""
    right = 1.15 * max([*column(points, "kl"), *column(limit, "kl")]) or 1.0
    rest = [*trajectories, *({"kl": p["kl_bound"], **p} for p in best_of_n)]
    shown = [*points, *limit, *(p for p in rest if p["kl"] <= right)]
    values = column(shown, reward)
    low, high = np.nanmin(values), np.nanmax(values)
    room = 0.04 * (high - low) or 1.0
    axes.set(xlim=(0, right), ylim=(low - room, high + 4 * room))


def front_finding(points: Sequence[dict], limit: Sequence[dict] = (), trajectories: Sequence[dict] = (),
                  reward: str = "reward") -> str:
    """What the front says, computed: rewards at one KL that every front reaches, each with its standard error.

    The KL is the highest half of a nat that all reach; rewards are in the reward's units.
    """
    fronts = {i: [p for p in rows if p.get(reward) is not None] for (i,), rows in _by(points, "iteration").items()}
    fronts = {i: rows for i, rows in fronts.items() if rows}
    limit = [p for p in limit if p.get(reward) is not None]
    reach = [max(p["kl"] for p in rows) for rows in [*fronts.values(), *([limit] if limit else [])]]
    kl = math.floor(min(reach, default=0) * 2) / 2
    what = "Gold reward" if reward == "gold" else "Reward"
    if kl <= 0:
        return f"{what} and KL along the fronts"
    parts = [f"iteration {i}: {reward_at_kl(rows, kl, reward):.2f}{_plus_minus(_nearest_error(rows, kl, reward))}"
             for i, rows in fronts.items()]
    measured = [row for row in trajectories if row.get(reward) is not None]
    crossings = np.array([reward_at_kl(rows, kl, reward) for rows in _by(measured, "iteration", "run").values()])
    crossings = crossings[np.isfinite(crossings)]
    if len(crossings):
        error = crossings.std(ddof=1) / math.sqrt(len(crossings)) if len(crossings) > 1 else math.nan
        parts.append(f"single runs: {crossings.mean():.2f}{_plus_minus(error)} ({len(crossings)} that cross)")
    if limit:
        bound = "the limit" if reward == "reward" else "the optimum of the proxy"
        parts.append(f"{bound}: {reward_at_kl(limit, kl, reward):.2f}")
    return f"{what} at a KL of {kl:g} nats – " + ", ".join(part.replace(" ", "\u00a0") for part in parts)


def _nearest_error(rows: Sequence[dict], kl: float, reward: str) -> float:
    error = min(rows, key=lambda p: abs(p["kl"] - kl)).get(f"{reward}_se")
    return math.nan if error is None else error


def _plus_minus(error: float) -> str:
    return f" ± {error:.2f}" if math.isfinite(error) else ""


def _by(rows: Sequence[dict], *names: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups
