"""Pictures: one style and one colour a method, safe for the colour-blind; axes with units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .evaluation.front import reward_at_kl

# Okabe and Ito's palette
COLOURS = {
    "single": "#7F7F7F", "slerp": "#0072B2", "lerp": "#E69F00", "liti": "#009E73", "ema": "#0072B2",
    "sft": "#D55E00", "none": "#CC79A7", "limit": "#000000", "best_of_n": "#56B4E9", "gold": "#B8860B",
}
ITERATION_COLOURS = ("#56B4E9", "#0072B2", "#009E73", "#D55E00", "#CC79A7")
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.titlesize": 11, "axes.titlelocation": "left",
    "legend.frameon": False, "legend.fontsize": 9, "figure.dpi": 110, "savefig.bbox": "tight", "lines.linewidth": 1.8,
}
KL_LABEL = "KL to the SFT policy (nats per sequence)"


def style():
    """A context in which figures have the house's style."""
    return matplotlib.rc_context(STYLE)


def iteration_colour(i: int) -> str:
    """The colour of iteration i (from 1)."""
    return ITERATION_COLOURS[(i - 1) % len(ITERATION_COLOURS)]


def column(points: Sequence[dict], name: str) -> np.ndarray:
    """One number of every point, nan where it is missing."""
    return np.array([p.get(name) if p.get(name) is not None else np.nan for p in points], dtype=float)


def draw_front(points: Sequence[dict], limit: Sequence[dict] = (), trajectories: Sequence[dict] = (),
               best_of_n: Sequence[dict] = (), unit: str = "reward units", reward: str = "reward",
               title: str | None = None) -> Figure:
    """Reward against KL: the η-front of each iteration, the single runs, the limit, best-of-n.

    `reward` is "reward" or "gold". Bars are standard errors over prompts. The limit has a band of
    two standard errors and ends where its effective sample size falls under 30.
    """
    with style():
        figure = Figure(figsize=(7.6, 5.0), layout="constrained")
        axes = figure.subplots()
        for n, (key, rows) in enumerate(_by(trajectories, "iteration", "run").items()):
            kl, value = column(rows, "kl"), column(rows, reward)
            axes.plot(np.append(0, kl), np.append(_origin(points, reward), value), color=COLOURS["single"], lw=0.8,
                      alpha=0.55, zorder=1, label="single runs while they train" if n == 0 else None)
        if limit:
            kl, value = column(limit, "kl"), column(limit, reward)
            axes.plot(kl, value, color=COLOURS["limit"], ls="--", lw=1.4, zorder=4,
                      label="limit" if reward == "reward" else "optimum of the proxy")
            if reward == "reward":
                band = 2 * column(limit, "reward_se")
                axes.fill_between(kl, value - band, value + band, color=COLOURS["limit"], alpha=0.12, lw=0)
        if best_of_n and reward == "reward":
            axes.plot(column(best_of_n, "kl_bound"), column(best_of_n, "reward"), color=COLOURS["best_of_n"], ls="",
                      marker="x", ms=5, zorder=3, label="best-of-n (KL is an upper bound)")
        for (i,), rows in _by(points, "iteration").items():
            colour = iteration_colour(i)
            axes.errorbar(column(rows, "kl"), column(rows, reward), xerr=column(rows, "kl_se"),
                          yerr=column(rows, f"{reward}_se"), color=colour, marker="o", ms=4, lw=1.8, elinewidth=0.9,
                          zorder=5, label=f"front of iteration {i} (η from 0 to {max(p['eta'] for p in rows):g})")
            for p in rows:
                if p["eta"] in (0.5, 1.0) and p.get(reward) is not None:
                    axes.annotate(f"η={p['eta']:g}", (p["kl"], p[reward]), textcoords="offset points", xytext=(5, -12),
                                  fontsize=8, color=colour)
        shown = [p["kl"] for p in points] + [p["kl"] for p in limit]
        axes.set_xlim(left=0, right=1.15 * max(shown))
        axes.set(xlabel=KL_LABEL, ylabel=f"{'gold ' if reward == 'gold' else ''}reward ({unit})")
        axes.set_title(front_finding(points, limit, trajectories) if title is None else title)
        axes.legend(loc="lower right")
    return figure


def front_finding(points: Sequence[dict], limit: Sequence[dict] = (), trajectories: Sequence[dict] = ()) -> str:
    """What the front says, computed: rewards at one KL that every curve reaches, each with its error."""
    fronts = {i: rows for (i,), rows in _by(points, "iteration").items()}
    runs = list(_by(trajectories, "iteration", "run").values())
    reach = [max(p["kl"] for p in rows) for rows in [*fronts.values(), *([limit] if limit else [])]]
    kl = math.floor(min(reach) * 2) / 2
    if kl <= 0:
        return "Fronts of KL and reward"
    parts = [f"iteration {i}: {reward_at_kl(rows, kl):.2f} ± {_nearest_error(rows, kl):.2f}" for i, rows in fronts.items()]
    crossings = [reward_at_kl(rows, kl) for rows in runs]
    crossings = [value for value in crossings if not math.isnan(value)]
    if crossings:
        parts.append(f"single runs: {np.mean(crossings):.2f} (mean of {len(crossings)} that cross)")
    if limit:
        parts.append(f"limit: {reward_at_kl(limit, kl):.2f}")
    return f"Reward at {kl:g} nats\n" + ", ".join(parts)


def _nearest_error(rows: Sequence[dict], kl: float) -> float:
    return min(rows, key=lambda p: abs(p["kl"] - kl))["reward_se"]


def _origin(points: Sequence[dict], reward: str) -> float:
    start = [p for p in points if p["eta"] == 0]
    return start[0][reward] if start and start[0].get(reward) is not None else 0.0


def _by(rows: Sequence[dict], *names: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups
