"""The figures of the evidence: one a claim, and the distance to the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.statistics import VERDICTS
from ..viewing.plots import COLOURS, KL_LABEL, iteration_colour, style
from .bench import draw_of
from .claims import METHODS, Claim, completions_spent, lines_of
from .effects import AREA, REWARD, Rows

VERDICT_COLOURS = {verdict: COLOURS[verdict] for verdict in VERDICTS}
LINE_COLOURS = (COLOURS["slerp"], COLOURS["lerp"])
# What an effect is, by its unit, for an axis; and of the claims on a curve's bend.
EFFECTS = {REWARD: "difference in reward\n(standard deviations of SFT samples)",
           AREA: "difference in area (reward × nats)",
           "gold reward": "difference in gold reward\n(standard deviations)", "nats": "difference in KL (nats)",
           "tokens": "difference in length (tokens)", "share of pairs": "difference in diversity (share of pairs)",
           "per token": "difference in perplexity (per token)", "degrees": "angle (degrees)",
           "share of the mean norm": "norm (share of the mean norm)"}
BENDS = {"kl-convex": "coefficient of η² (nats)", "reward-concave": "coefficient of η² (reward)"}


def claim_figure(claim: Claim, verdicts: Sequence[dict], evidence: Mapping[tuple[str, str], Rows]) -> Figure:
    """For each world the curves that are compared, each draw's mean thin and the mean of all thick, and the
    effect of every seed with the interval that decides."""
    verdicts = [v for v in verdicts if v["name"] == claim.name]
    curved = bool(claim.lines) or claim.study == "weak"
    with style():
        figure = Figure(figsize=(5.4 * len(verdicts) if curved else 3.6 * len(verdicts), 3.6), layout="constrained")
        figure.suptitle(claim.statement, x=0.01, ha="left", fontsize=11)
        panels = figure.subplots(1, len(verdicts) * (2 if curved else 1), squeeze=False,
                                 width_ratios=(2.2, 1) * len(verdicts) if curved else None)[0]
        for n, found in enumerate(verdicts):
            rows = evidence[found["world"], claim.study]
            if curved:
                draw_lines(panels[2 * n], claim, rows, found)
            draw_effect(panels[2 * n + 1 if curved else n], found)
    return figure


def draw_lines(axes: Axes, claim: Claim, rows: Rows, found: dict) -> None:
    """Draw the curves that a claim compares: each draw's mean thin, the mean of all thick, the level of comparison
    dotted."""
    proxy = claim.study == "weak"
    what = {"gold reward": "gold", "per token": "perplexity", "tokens": "length",
            "share of pairs": "distinct"}.get(claim.unit, "reward")
    if proxy:
        what = "gold"
    x = "reward" if proxy else "kl"
    for line, colour in zip(lines_of(claim, rows), LINE_COLOURS):
        for draw in sorted({draw_of(seed) for seed in rows.seeds}):
            some = rows.mean_curve(line, [seed for seed in rows.seeds if draw_of(seed) == draw])
            axes.plot([p[x] for p in some], [p[what] for p in some], color=colour, lw=0.7, alpha=0.45)
        whole = rows.mean_curve(line)
        axes.plot([p[x] for p in whole], [p[what] for p in whole], color=colour, marker="o", ms=3, label=label(line))
    if found.get("level") is not None:
        axes.axvline(found["level"], color="black", lw=0.8, ls=":")
    if proxy:
        axes.set(xlim=(-0.2, 2), ylim=(-4, 1.5))
    elif claim.study == "anchors":
        axes.set_xlim(0, 12)
    axes.set(xlabel="proxy reward" if proxy else KL_LABEL, ylabel={"gold": "gold reward"}.get(what, what),
             title=f"{found['world']}")
    axes.legend(loc="best")


def label(line: str | dict) -> str:
    """A line's name for a legend, with what else tells it from others."""
    if isinstance(line, str):
        return line
    return line["line"] + "".join(f", {name} {value:g}" for name, value in line.items() if name != "line")


def draw_effect(axes: Axes, found: dict) -> None:
    """The effect of each seed by draw, the mean and its interval, the null and the margin."""
    colour = VERDICT_COLOURS[found["verdict"]]
    values = {int(seed): value for seed, value in found["values"].items()}
    for n, draw in enumerate(sorted({draw_of(seed) for seed in values})):
        some = [value for seed, value in sorted(values.items()) if draw_of(seed) == draw]
        axes.plot(np.full(len(some), n), some, "o", color=colour, alpha=0.4, ms=4, mew=0)
    if found["effect"] is not None:
        x = found["draws"] + 0.3
        if found["ci_low"] is not None:
            axes.plot([x, x], [found["ci_low"], found["ci_high"]], color=colour, lw=2.5)
        axes.plot([x], [found["effect"]], "D", color=colour, ms=6)
    axes.axhline(found["null"], color="black", lw=0.8)
    if band := found["margin"] or found["worth"]:
        axes.axhspan(found["null"] - band, found["null"] + band, color="black", alpha=0.07, lw=0)
    axes.set(xticks=[], xlabel=f"{found['draws']} draws and all\n({found['seeds']} seeds)",
             ylabel=BENDS.get(found["name"]) or EFFECTS.get(found["unit"], found["unit"]))
    axes.set_title(found["verdict"], color=colour)


SHOWN = {"best WARP, η to 2": iteration_colour(2), "WARP": iteration_colour(1), "batch of 16": COLOURS["batch"],
         "one long run": COLOURS["single"]}  # the methods whose fronts stand beside the limit


def limit_figure(found: dict) -> Figure:
    """For each world the fronts of some methods under the limit, and the share of its area of every method."""
    worlds = list(found["worlds"])
    with style():
        figure = Figure(figsize=(11, 4.9 * len(worlds)), layout="constrained")
        panels = figure.subplots(len(worlds), 2, squeeze=False, width_ratios=(1.25, 1))
        for (left, right), world in zip(panels, worlds):
            limit = found["limits"][world]
            left.plot([p["kl"] for p in limit], [p["reward"] for p in limit], color="black", ls="--", lw=1.4)
            left.annotate("limit", (limit[-1]["kl"], limit[-1]["reward"]), (-4, 6), textcoords="offset points",
                          ha="right")
            for name, colour in SHOWN.items():
                (line,) = [c["points"] for c in found["curves"] if (c["world"], c["line"]) == (world, name)
                           and c["study"] == METHODS[name][0]]
                left.plot([p["kl"] for p in line], [p["reward"] for p in line], color=colour, marker="o", ms=3,
                          label=name)
            left.set(xlim=(0, 4.4), ylim=(None, limit[-1]["reward"] + 0.15), xlabel=KL_LABEL,
                     ylabel="reward (standard deviations of SFT samples)",
                     title=f"{world}: means of {len(found['draws'])} draws at each η")
            left.legend(loc="lower right")
            shares = sorted((s for s in found["limit_share"] if s["world"] == world), key=lambda s: s["mean"])
            for y, some in enumerate(shares):
                colour = SHOWN.get(some["method"], COLOURS["single"])
                right.barh(y, some["mean"], color=colour, alpha=0.85 if some["method"] in SHOWN else 0.4)
                right.plot([some["ci_low"], some["ci_high"]], [y, y], color="black", lw=1.2)
                right.annotate(f"{some['mean']:.0%}", (0.01, y), va="center", fontsize=9,
                               color="white" if some["method"] in SHOWN else "black")
            names = [f"{some['method']}\n{completions_spent(some['method']):,} completions" for some in shares]
            right.set(yticks=range(len(shares)), yticklabels=names, xlim=(0, 1),
                      xlabel="share of the limit's area above SFT, 0 to 4 nats\n(flat past the limit's end)")
            right.tick_params(axis="y", labelsize=8)
            right.set_title(f"{shares[0]['seeds']} seeds; bars: 95 % intervals")
            right.grid(axis="y", visible=False)
    return figure
