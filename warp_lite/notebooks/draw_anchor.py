"""The pictures of the notebook on stage 1, the anchor; each takes what was measured and returns a figure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.statistics import Interval, t_interval
from ..viewing.labels import FAINT
from ..viewing.plots import COLOURS, KL_LABEL, column
from . import figures

TOY_STEPS = 600
PULL = 0.01  # the toy's reward moves its weight by so much a step


def anchored(beta: float, mu: float, steps: int = TOY_STEPS) -> tuple[np.ndarray, np.ndarray]:
    """The toy: a weight that the reward pulls upward by `PULL` a step, and an anchor that pulls it back by β times the
    gap and follows at rate μ (0: it stays): (steps,) each, from 0.

    At a steady pace the weight moves by PULL / (1 + β/μ) a step; with μ = 0 it stops at PULL / β.
    """
    theta = anchor = 0.0
    weights, anchors = [theta], [anchor]
    for _ in range(steps - 1):
        theta += PULL - beta * (theta - anchor)
        anchor = (1 - mu) * anchor + mu * theta
        weights.append(theta)
        anchors.append(anchor)
    return np.array(weights), np.array(anchors)


def anchor_toy(beta: float = 0.02, mu: float = 0.01) -> Figure:
    """A weight with no anchor, with one that stays and with one that follows; and how far each is from its anchor."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.5), layout="constrained")
    ways = {"no anchor": (0.0, 1.0, COLOURS["none"]), "the anchor stays": (beta, 0.0, COLOURS["sft"]),
            "the anchor follows": (beta, mu, COLOURS["ema"])}
    ends = {left: {}, right: {}}
    steps = np.arange(TOY_STEPS)
    for name, (pull_back, rate, colour) in ways.items():
        weight, anchor = anchored(pull_back, rate)
        left.plot(steps, weight, color=colour)
        ends[left][name] = (steps[-1], weight[-1], colour)
        if pull_back:
            left.plot(steps, anchor, color=colour, ls=":", lw=1.2)
            right.plot(steps, weight - anchor, color=colour)
            ends[right][name] = (steps[-1], (weight - anchor)[-1], colour)
    pace = np.diff(anchored(beta, mu)[0])[-50:].mean()
    left.set(xlabel="step", ylabel="weight (arbitrary units)", xlim=(0, 1.5 * TOY_STEPS), ylim=(-0.3, 6.3))
    right.set(xlabel="step", ylabel="from the weight to its anchor", xlim=(0, 1.5 * TOY_STEPS), ylim=(0, None))
    left.set_title(f"The pace at the end is {pace / PULL:.3f} of the reward's pull;\n"
                   f"1 / (1 + β/μ) is {1 / (1 + beta / mu):.3f}")
    right.set_title(f"The weight stops at {anchored(beta, 0.0)[0][-1]:.2f} where the anchor stays;\n"
                    f"pull / β is {PULL / beta:.2f}")
    for axes, names in ends.items():
        figures.label_ends(axes, names)
    return figure


def setting_colours(names: Iterable[str]) -> dict[str, str]:
    """The colour of each setting by its name: no anchor, an SFT anchor, a moving one; darker with a larger β, and the
    μ of a moving one in the same shades."""
    colours = {}
    for start, method in (("SFT β=", "sft"), ("EMA β=", "ema"), ("EMA μ=", "ema")):
        alike = [name for name in names if name.startswith(start)]
        colours |= zip(alike, figures.shades(COLOURS[method], len(alike)))
    return {"no anchor": COLOURS["none"], **colours}


def chooser(rows_of: Mapping[str, Sequence[dict]], colours: Mapping[str, str], limit: Sequence[dict], unit: str,
            edge: float) -> Callable[[str], Figure]:
    """A function that draws the path of one setting, by name, with its end in the title, over the others in grey."""
    def draw(name: str) -> Figure:
        figure, axes = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
        for other, rows in rows_of.items():
            if other != name:
                kl, reward = (figures.over_steps(rows, what, steps_of(rows)).mean(0) for what in ("kl", "reward"))
                axes.plot(kl, reward, color=COLOURS["single"], lw=0.8, alpha=FAINT)
        last = [curve[-1] for curve in figures.seed_curves(rows_of[name])]
        kl, reward = (t_interval(column(last, what)) for what in ("kl", "reward"))
        title = f"{name}: at the end KL {kl} nats, reward {reward}"
        return walks({name: rows_of[name]}, colours, limit, unit, edge, title, axes)

    return draw


def levelled(gains: Mapping[str, Interval], margin: float = 0.1, apart: str = "; ") -> str:
    """Which settings by name have levelled off, their gain in reward within `margin` of 0, of which that is unclear,
    and of how many it is not so."""
    names = {verdict: [name for name, gain in gains.items() if gain.verdict("within", margin=margin) == verdict]
             for verdict in ("holds", "unclear", "fails")}
    return (f"levelled off: {', '.join(names['holds']) or 'none'}; unclear: {', '.join(names['unclear']) or 'none'}"
            f"{apart}not levelled off: {len(names['fails'])} of {len(gains)}")


def training(rows_of: Mapping[str, Sequence[dict]], colours: Mapping[str, str], steps: Sequence[int],
             unit: str, titles: Sequence[str]) -> Figure:
    """Reward, left, and KL, right, of settings by name while they train: means over seeds with their bands."""
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for axes, kind, title in zip(panels, ("reward", "kl"), titles):
        ends = {}
        for name, rows in rows_of.items():
            mean = figures.draw_sweep(axes, steps, figures.over_steps(rows, kind, steps), colours[name])
            ends[name] = (steps[-1], mean[-1], colours[name])
        axes.set(xlabel="RL step", xlim=(0, 1.45 * steps[-1]), xticks=np.linspace(0, steps[-1], 5).round())
        axes.set_title(title)
        if kind == "kl":
            axes.set_yscale("symlog")
            axes.set_ylim(0)
        figures.label_ends(axes, ends)
    panels[0].set_ylabel(f"reward ({unit})")
    panels[1].set_ylabel(KL_LABEL)
    return figure


def walks(rows_of: Mapping[str, Sequence[dict]], colours: Mapping[str, str], limit: Sequence[dict], unit: str,
          edge: float, title: str, axes: Axes | None = None) -> Figure:
    """Reward against KL of settings by name while they train, under the limit, up to `edge` nats: the mean over seeds
    after every fifth step, and where it ends with its intervals. A path that ends outside of the picture is drawn until
    it first leaves it, and its name has an arrow."""
    if axes is None:
        _, axes = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
    ends, heights = {}, []
    for name, rows in rows_of.items():
        kl, reward = (figures.over_steps(rows, what, steps_of(rows)) for what in ("kl", "reward"))
        x, y = kl.mean(0), reward.mean(0)
        inside = x[-1] <= edge
        out = len(x) - 1 if inside else int(np.argmax(x > edge))
        axes.plot(x[:out + 1], y[:out + 1], color=colours[name])
        heights.append(y[:out + 1][x[:out + 1] <= edge])
        if inside:
            figures.draw_curve(axes, kl[:, -1:], reward[:, -1:], colours[name])
        ends[name if inside else f"{name} →"] = (min(x[out], edge), y[out] if inside else np.interp(
            edge, x[out - 1:out + 1], y[out - 1:out + 1]), colours[name])
    figures.draw_limit(axes, limit)
    figures.frame(axes, [*heights, column(limit, "reward")] if limit else heights)
    axes.set(xlabel=KL_LABEL, ylabel=f"reward ({unit})", xlim=(0, 1.02 * edge))
    axes.set_title(title)
    figures.label_ends(axes, ends)
    return axes.figure


def steps_of(rows: Sequence[dict]) -> np.ndarray:
    """Every fifth step of a path up to its last, 0 and the last included."""
    last = max(row["step"] for row in rows)
    return np.unique([*range(0, last + 1, 5), last])


def envelopes(kls: Sequence[float], rewards: Mapping[str, np.ndarray], colours: Mapping[str, str],
              limit: Sequence[dict], unit: str, at: float, title: str) -> Figure:
    """Reward at each KL (kls,) of methods by name, (seeds, kls) each, under the limit, with a line where a comparison
    is made."""
    figure, axes = plt.subplots(figsize=(8.4, 4.6), layout="constrained")
    ends = {}
    for name, values in rewards.items():
        mean = figures.draw_sweep(axes, kls, values, colours[name])
        ends[name] = (kls[-1], mean[-1], colours[name])
    figures.draw_limit(axes, limit)
    axes.axvline(at, color="black", lw=0.7, ls=":")
    axes.set(xlabel=KL_LABEL, ylabel=f"reward ({unit})", xlim=(0, 1.4 * kls[-1]))
    axes.set_title(title)
    figures.label_ends(axes, ends)
    return figure


def averages(points: Mapping[str, Sequence[dict]], rows_of: Mapping[str, Sequence[dict]],
             differences: Mapping[str, Interval], colours: Mapping[str, str], limit: Sequence[dict], unit: str,
             edge: float, title: str) -> Figure:
    """The moving average at the end of training as a policy of its own, one point a seed and a mark a setting, beside
    the path of the raw weights; and, right, its reward less that of the path at its KL. Points past the picture's edge
    are counted in the legend."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=(3, 2))
    ends, marks = {}, dict(zip(rows_of, itertools.cycle("Dos^")))
    for name, rows in rows_of.items():
        ends[name] = figures.draw_path(left, rows, colours[name], edge=edge, lw=1.2)
        kl, reward = column(points[name], "kl"), column(points[name], "reward")
        out = kl > 1.3 * edge
        beyond = f" ({out.sum()} of {len(out)} past the edge)" if out.any() else ""
        left.plot(kl[~out], reward[~out], marks[name], color=colours[name], ms=6, mec="black", ls="",
                  label=f"average, {name}{beyond}")
    left.plot([], [], color="black", lw=1.2, label="raw weights as they train")
    figures.draw_limit(left, limit)
    left.legend(loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=2, columnspacing=1.2)
    left.set(xlabel=KL_LABEL, ylabel=f"reward ({unit})", xlim=(0, 1.3 * edge))
    left.set_title(title)
    figures.label_ends(left, ends)
    for i, (name, interval) in enumerate(differences.items()):
        bars = [[interval.mean - interval.low], [interval.high - interval.mean]]
        right.errorbar(interval.mean, i, xerr=bars, color=colours[name], marker=marks[name], ms=6, mec="black")
    right.axvline(0, color="black", lw=0.8)
    right.set(yticks=range(len(differences)), yticklabels=differences, ylim=(len(differences) - 0.5, -0.5),
              xlabel="reward of the average, less raw at its KL")
    right.set_title("The difference, with its 95 % interval")
    return figure


def disguises(rows_of: Mapping[str, Sequence[dict]], pairs: Mapping[str, tuple[str, str]], unit: str) -> Figure:
    """Paths of one seed: broken anchors as lines, and as crosses the settings that they are in truth; `pairs` has by
    name of a broken anchor that setting (None for the sound one) and a colour."""
    figure, axes = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    for name, (same_as, colour) in pairs.items():
        for who, look in ((name, {"marker": "o", "ms": 4}), (same_as, {"marker": "x", "ms": 9, "ls": "", "mew": 1.5})):
            if who is not None:
                axes.plot(column(rows_of[who], "kl"), column(rows_of[who], "reward"), color=colour, label=who, **look)
    sound = max(row["kl"] for name, (same_as, _) in pairs.items() if same_as is None for row in rows_of[name])
    axes.set(xlabel=KL_LABEL, ylabel=f"reward ({unit})", xlim=(-0.05 * sound, 1.6 * sound))
    axes.set_title("A broken anchor is another setting in disguise (one seed)")
    axes.legend(loc="lower right")
    return figure
