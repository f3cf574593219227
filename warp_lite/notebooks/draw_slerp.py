"""The pictures of the notebook on SLERP: what was measured is handed in, and drawn.

Rows are those of a sweep (see `RunningExample.sweep`); rewards have the unit of `label`, KL is in nats per sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import fdtri

from ..evaluation.statistics import LEVEL, Interval, t_interval
from ..viewing.plots import COLOURS, KL_LABEL
from .figures import (
    at_kl,
    draw_limit,
    draw_over_kl,
    draw_sweep,
    interval_band,
    label_end,
    label_ends,
    level,
    number,
    outcome,
    shared_level,
)


def draw_arc(omega: float = 76, lam: float = 0.5) -> Figure:
    """The chord and the arc between two vectors of length 1 that are omega degrees apart, and a point of each at lam.

    The picture keeps its size and its scale whatever the two numbers are.
    """
    figure, axes = plt.subplots(figsize=(6.2, 3.9))
    axes.set_position([0.02, 0.02, 0.96, 0.86])
    angle = math.radians(max(omega, 1e-4))

    def tip(turn: float) -> np.ndarray:
        return np.array([math.sin(turn), math.cos(turn)])

    one, two = tip(-angle / 2), tip(angle / 2)
    path = np.linspace(0, 1, 100)[:, None]
    axes.plot(*((1 - path) * one + path * two).T, color=COLOURS["lerp"])
    axes.plot(*np.array([tip(angle * (t - 0.5)) for t in path[:, 0]]).T, color=COLOURS["slerp"])
    for vector, name, side in ((one, "$\\delta_1$", -1), (two, "$\\delta_2$", 1)):
        axes.annotate("", vector, (0, 0), arrowprops={"arrowstyle": "-|>", "color": COLOURS["single"], "lw": 2})
        axes.annotate(name, vector, xytext=(side * 14, 0), textcoords="offset points", ha="center", fontsize=13)
    on_chord, on_arc = (1 - lam) * one + lam * two, tip(angle * (lam - 0.5))
    lengths = [float(np.linalg.norm(point)) for point in (on_chord, on_arc)]
    for point, method, y, length in ((on_chord, "lerp", 1.08, lengths[0]), (on_arc, "slerp", 1.22, lengths[1])):
        axes.plot(*point, "o", ms=9, color=COLOURS[method])
        axes.text(-1.85, y, f"{method.upper()}: length {length:.2f}", color=COLOURS[method])
    axes.plot(0, 0, "ko", ms=5)
    axes.annotate("$\\theta_{init}$", (0, 0), xytext=(0, -16), textcoords="offset points", ha="center", fontsize=12)
    axes.set(xlim=(-1.9, 1.9), ylim=(-0.25, 1.35), aspect="equal")
    axes.axis("off")
    axes.set_title(f"Ω = {math.degrees(angle):.0f}°, λ = {lam:.2f}: LERP keeps {lengths[0]:.0%} of the length, "
                   f"SLERP {lengths[1]:.0%}")
    return figure


def draw_angles(of_deltas: Sequence[Sequence[float]], of_weights: Sequence[Sequence[float]],
                ratios: Sequence[Sequence[float]]) -> Figure:
    """How far apart two runs are: the angles, in degrees, between their task vectors and between their whole weights,
    and the ratio of the lengths of the task vectors; all (seeds, tensors)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    for values, method, words in ((of_weights, "single", "whole weights"), (of_deltas, "slerp", "task vectors")):
        _histogram(left, np.concatenate(values), np.arange(0, 123, 3), COLOURS[method], words)
    _histogram(right, np.concatenate(ratios), np.geomspace(0.5, 2, 41), COLOURS["slerp"], None)
    left.set(xlabel="angle between two runs (degrees)")
    left.legend()
    right.set(xlabel="length of the first over length of the second", xscale="log")
    right.set_xticks([0.5, 0.7, 1, 1.4, 2], ["0.5", "0.7", "1", "1.4", "2"], minor=False)
    right.minorticks_off()
    left.set_title(f"Task vectors: {mean_over_seeds(of_deltas):.0f}°\nwhole weights: {mean_over_seeds(of_weights):.0f}°"
                   f", {len(of_deltas)} seeds")
    alike = np.mean([1 / 1.4 < value < 1.4 for value in np.concatenate(ratios)])
    right.set_title(f"{alike:.0%} of the task vectors have lengths\nthat differ by less than a factor of 1.4")
    return figure


def mean_over_seeds(values: Sequence[Sequence[float]]) -> Interval:
    """The mean over tensors of each seed, with its interval over seeds."""
    return t_interval([np.mean(row) for row in values])


def _histogram(axes: Axes, values: np.ndarray, bins: np.ndarray, colour: str, words: str | None) -> None:
    axes.hist(np.clip(values, bins[0], bins[-1]), bins, weights=np.full(len(values), 100 / len(values)), alpha=0.8,
              color=colour, label=words)
    axes.set_ylabel("share of tensors (%)")


def gain(rows: Sequence[dict], name: str) -> np.ndarray:
    """A number of a walk from one run to another less the mean of the two: (seeds, λ up to ½).

    λ and 1 − λ are averaged, since which of the two comes first is chance.
    """
    values = number(rows, name)
    values = (values + values[:, ::-1]) / 2
    return (values - values[:, :1])[:, : values.shape[1] // 2 + 1]


def on_two_lines(label: str) -> str:
    """The name of an axis with its unit on a line of its own, for small panels."""
    return label.replace(" (", "\n(", 1)


def draw_between(along: Mapping[str, Sequence[dict]], lams: Sequence[float], label: str) -> Figure:
    """From one run to another by LERP and by SLERP: change in reward and in KL against λ, and one against the other."""
    half = np.array(lams)[: len(lams) // 2 + 1]
    figure, panels = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    for method, rows in along.items():
        for axes, name in zip(panels, ("reward", "kl")):
            draw_sweep(axes, half, gain(rows, name), COLOURS[method], method.upper(), marker="o", ms=4)
        x, y = gain(rows, "kl").mean(0), gain(rows, "reward").mean(0)
        panels[2].plot(x, y, color=COLOURS[method], marker="o", ms=4)
        label_end(panels[2], x, y, f"{method.upper()}, λ = ½", COLOURS[method])
    panels[2].plot(0, 0, "o", ms=8, color=COLOURS["single"], zorder=5)
    label_end(panels[2], [0], [0], "the two runs", COLOURS["single"])
    words = (f"change in {on_two_lines(label)}", "change in KL (nats per sequence)")
    for axes, name in zip(panels, words):
        axes.set(xlabel="λ (0: one of the runs, ½: halfway)", ylabel=name, xlim=(-0.02, 0.6), xticks=half)
        axes.axhline(0, color=COLOURS["single"], lw=1)
    panels[2].set(xlabel=words[1], ylabel=words[0])
    panels[2].set_xlim(auto=True)
    panels[2].margins(x=0.3)
    more = {name: t_interval(number(along["slerp"], name, 0.5) - number(along["lerp"], name, 0.5))
            for name in ("reward", "kl")}
    panels[0].set_title(outcome(more["reward"], "above", "λ = ½: SLERP has more reward than LERP",
                                "λ = ½: SLERP has less reward than LERP", "λ = ½: whose reward is higher is unclear"))
    panels[1].set_title(outcome(more["kl"], "above", "λ = ½: SLERP has more KL than LERP",
                                "λ = ½: SLERP has less KL than LERP", "λ = ½: whose KL is higher is unclear", "nats"))
    panels[2].set_title("Means over seeds: where each path leads")
    for axes in panels:
        label_ends(axes)
    return figure


def draw_more_policies(fronts: Mapping[int, Sequence[dict]], limit: Sequence[dict], label: str) -> Figure:
    """The fronts of merges of M policies, and the reward of each at the KL that all reach."""
    kl = shared_level(*fronts.values())
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.8), layout="constrained", width_ratios=(1.5, 1))
    shades = plt.get_cmap("Blues")(np.linspace(0.45, 1, len(fronts)))
    grid = np.linspace(0.05, 1, 25) * kl
    for (M, rows), shade in zip(fronts.items(), shades):
        colour = COLOURS["single"] if M == 1 else shade
        draw_sweep(left, grid, np.array([at_kl(rows, at) for at in grid]).T, colour, zorder=2 + M)
        left.plot([], [], color=colour, label="one run" if M == 1 else f"SLERP of {M}")
    draw_limit(left, [point for point in limit if point["kl"] <= 1.1 * kl])
    left.set(xlabel=KL_LABEL, ylabel=label, xlim=(0, 1.15 * kl))
    left.legend(loc="lower right")
    gains = np.array([at_kl(rows, kl) for rows in fronts.values()]).T                        # (seeds, counts)
    mean, low, high = interval_band(gains)
    right.errorbar(list(fronts), mean, [mean - low, high - mean], color=COLOURS["slerp"], marker="o", capsize=3)
    right.set(xlabel="M, policies merged", ylabel=f"reward at {kl:.2g} nats", xticks=list(fronts))
    most = max(fronts)
    left.set_title(outcome(t_interval(gains[:, -1] - gains[:, 0]), "above",
                           f"At {kl:.2g} nats {most} policies have more reward than one",
                           f"At {kl:.2g} nats {most} policies have less reward than one",
                           f"At {kl:.2g} nats {most} policies and one cannot be told apart"))
    right.set_title("Each point uses all runs of each seed;\nbars are 95 % intervals over seeds")
    label_ends(left)
    return figure


def draw_where_or_how_far(both: Mapping[str, Sequence[dict]], limit: Sequence[dict], label: str) -> Figure:
    """SLERP and LERP of the same policies: their ends at η = 1, a line a seed, and their whole fronts."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.8), layout="constrained")
    ends = {method: (number(rows, "kl", 1), number(rows, "reward", 1)) for method, rows in both.items()}
    for start, end in zip(zip(*ends["lerp"]), zip(*ends["slerp"])):
        left.plot(*zip(start, end), color="0.7", lw=0.9)
    for method, (x, y) in ends.items():
        left.plot(x, y, "o", color=COLOURS[method], label=f"{method.upper()}, η = 1 (a point a seed)")
    left.legend(loc="lower right")
    more = t_interval(ends["slerp"][1] - ends["lerp"][1])
    further = t_interval(ends["slerp"][0] - ends["lerp"][0])
    left.set_title(outcome(more, "above", "At η = 1 SLERP has more reward than LERP", "At η = 1 SLERP has less reward",
                           "At η = 1 whose reward is higher is unclear") + f"\nand {further} nats more KL")
    kl = level(*both.values())
    right.axvline(kl, color="k", lw=0.7, ls=":")
    for method, rows in both.items():
        draw_over_kl(right, rows, COLOURS[method], method.upper())
    draw_limit(right, limit)
    for axes in (left, right):
        axes.set(xlabel=KL_LABEL, ylabel=label)
    right.set_xlim(0, 1.1 * max(level(rows) for rows in both.values()))
    right.set_title(outcome(ahead(both["slerp"], both["lerp"]), "above", f"At {kl:.2g} nats SLERP has more reward",
                            f"At {kl:.2g} nats LERP has more reward", f"At {kl:.2g} nats neither is clearly ahead"))
    label_ends(right)
    return figure


def ahead(rows: Sequence[dict], others: Sequence[dict]) -> Interval:
    """The reward of one sweep less another's at the largest KL that all seeds of both reach, with its interval."""
    kl = level(rows, others)
    return t_interval(at_kl(rows, kl) - at_kl(others, kl))


def draw_orders(shuffled: Sequence[dict], label: str) -> Figure:
    """What the order of merging changes, seed by seed: reward and KL of every order that was tried."""
    seeds = sorted({row["seed"] for row in shuffled})
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
    for axes, name in zip(panels, ("reward", "kl")):
        values = number(shuffled, name)
        for seed, row in zip(seeds, values):
            axes.plot([seed, seed], [row.min(), row.max()], color=COLOURS["slerp"], lw=1, alpha=0.5)
            axes.plot(np.full(len(row), seed), row, "o", ms=4, color=COLOURS["slerp"], alpha=0.7)
        axes.set(xlabel="seed", xticks=seeds, ylabel=label if name == "reward" else KL_LABEL)
        axes.set_title(of_the_seed(shuffled, name))
    return figure


def of_the_seed(shuffled: Sequence[dict], name: str, apart: str = "\n") -> str:
    """Whether a number varies less with the order than with the seed, in words, with the ratio of the deviations."""
    values = number(shuffled, name)
    word = "KL" if name == "kl" else name.capitalize()
    if len(values) < 2:
        return f"{word}: one seed does not say how much seeds differ"
    return outcome(spread_ratio(values), "below", f"{word} varies less with the order than with the seed",
                   f"{word} varies more with the order than with the seed",
                   f"{word}: whether order or seed varies it more is unclear", "of the deviation over seeds", null=1,
                   apart=apart)


def spread_ratio(values: np.ndarray) -> Interval:
    """The deviation of values (seeds, orders) over the orders of a seed, as a share of that of the seeds' means, with
    the 95 % interval that the F distribution gives a ratio of two deviations; it cannot go below zero.

    Orders count as draws of their own, though they share their policies. Raises ValueError for fewer than two seeds or
    two orders.
    """
    seeds, orders = values.shape
    if min(seeds, orders) < 2:
        raise ValueError(f"a ratio of deviations needs two seeds and two orders, not {seeds} and {orders}")
    ratio = math.sqrt(values.var(1, ddof=1).mean() / values.mean(1).var(ddof=1))
    freedom = seeds * (orders - 1), seeds - 1
    low, high = (ratio / math.sqrt(fdtri(*freedom, share)) for share in ((1 + LEVEL) / 2, (1 - LEVEL) / 2))
    return Interval(ratio, low, high, seeds, seeds)


def draw_whole_weights(ways: Mapping[str, Sequence[dict]], label: str) -> Figure:
    """The fronts of the right merge, of LERP and of SLERP of whole weights, by the words that name them, in this
    order."""
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    for (words, rows), method, line in zip(ways.items(), ("slerp", "lerp", "mistake"), ("-", "-", "--")):
        kl_end, reward_end = number(rows, "kl", 1).mean(), number(rows, "reward", 1).mean()
        shown = [row for row in rows if row["value"] <= 1]
        axes.plot(number(shown, "kl").mean(0), number(shown, "reward").mean(0), line, marker="o", ms=4,
                  color=COLOURS[method], label=f"{words}: {kl_end:.2f} nats, reward {reward_end:.2f} at η = 1")
    right, straight, wrong = ways.values()
    axes.legend(loc="lower right")
    axes.set(xlabel=KL_LABEL, ylabel=label)
    gap = t_interval(number(wrong, "reward", 1) - number(straight, "reward", 1))
    axes.set_title(outcome(gap, "within", "At η = 1 SLERP of whole weights is LERP, within 0.1 of reward",
                           "At η = 1 SLERP of whole weights is not LERP",
                           "At η = 1 SLERP of whole weights may be LERP", margin=0.1))
    return figure
