"""The pictures of the notebook on the whole loop; each takes what was measured and returns a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..averaging.state_dicts import Weights
from ..evaluation.statistics import Interval, t_interval
from ..viewing.plots import COLOURS, KL_LABEL, column, iteration_colour
from . import figures

KL_LINES = (1, 2, 4, 8)  # nats, of a map of weights


class Plane:
    """The plane through θ_init and two policies, in weights: the first policy lies at (1, 0), lengths are shares of its
    task vector's."""

    def __init__(self, init: Weights, one: Weights, two: Weights):
        self.init = init
        self.across = {name: one[name] - init[name] for name in init}
        length = self._dot(self.across, self.across).sqrt()
        second = {name: two[name] - init[name] for name in init}
        share = self._dot(second, self.across) / length**2
        self.up = {name: second[name] - share * self.across[name] for name in init}
        stretch = length / self._dot(self.up, self.up).sqrt()
        self.up = {name: stretch * tensor for name, tensor in self.up.items()}
        self.length = length

    def _dot(self, a: Weights, b: Weights) -> Tensor:
        return torch.stack([(a[name].double() * b[name].double()).sum() for name in a]).sum()

    def weights(self, x: float, y: float) -> Weights:
        """The weights at a point of the plane."""
        return {name: tensor + x * self.across[name] + y * self.up[name] for name, tensor in self.init.items()}

    def place(self, theta: Weights) -> tuple[float, float]:
        """Where weights lie, seen straight from above the plane."""
        delta = {name: theta[name] - tensor for name, tensor in self.init.items()}
        return tuple((self._dot(delta, axis) / self.length**2).item() for axis in (self.across, self.up))


def landscape(plane: Plane, xs: Sequence[float], ys: Sequence[float], points: Sequence[dict],
              marks: Mapping[str, tuple[Weights, str]], unit: str, title: str) -> Figure:
    """Reward, as shades with lines, and KL, as dotted lines, over a plane of weights, with some weights marked by name.

    `points` are the metrics at (x, y), y after y. An arrow leads from the init to each mark.
    """
    shape = len(ys), len(xs)
    figure, axes = plt.subplots(figsize=(8.2, 5.6), layout="constrained")
    shades = axes.contourf(xs, ys, column(points, "reward").reshape(shape), levels=10, cmap="Greens", alpha=0.7)
    figure.colorbar(shades, label=f"reward ({unit})")
    kls = column(points, "kl")
    levels = [kl for kl in KL_LINES if kls.min() < kl < kls.max()] or [kls.max() / 4, kls.max() / 2]  # of short runs
    lines = axes.contour(xs, ys, kls.reshape(shape), levels=levels, colors="0.35", linestyles=":", linewidths=0.9)
    ends, places = {}, {name: plane.place(theta) for name, (theta, _) in marks.items()}
    for kl, ring in zip(lines.levels, lines.allsegs):
        longest = max(ring, key=len, default=())
        if len(longest):  # matplotlib has rings without points, too
            x, y = clearest(longest, [(0.0, 0.0), *places.values()], axes)
            figures.label_end(axes, [x], [y], f"{kl:.2g} nats", "0.35").set_fontsize(7)
    for name, (_, colour) in marks.items():
        x, y = places[name]
        axes.plot([0, x], [0, y], color=colour)
        axes.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 0, "shrinkB": 0})
        ends[name] = (x, y, colour)
    axes.plot(0, 0, "ko", ms=7)
    ends["θ_init"] = (0, 0, COLOURS["limit"])
    axes.set(aspect="equal", xlabel="along the first run (its length is 1)", ylabel="across it")
    axes.grid(visible=False)
    axes.set_title(title)
    figures.label_ends(axes, ends)
    return figure


def clearest(line: np.ndarray, places: Sequence[tuple[float, float]], axes: Axes) -> tuple[float, float]:
    """The point of a line (points, 2) that is furthest from the arrows that go from the first of `places` to each
    other, and from the edges of the axes: where a label of the line is best read."""
    low, high = np.array([axes.get_xlim(), axes.get_ylim()]).T
    arrows = np.concatenate([np.linspace(places[0], end, 50) for end in places[1:]])
    to_arrows = np.linalg.norm(line[:, None] - arrows, axis=-1).min(1)                         # (points,)
    to_edges = np.minimum(line - low, high - line).min(1)
    return tuple(line[np.minimum(to_arrows, 2 * to_edges).argmax()])


def given_back(front: Sequence[dict], path: Sequence[dict]) -> str:
    """What the step back after an iteration gives back: of its merge's gain in reward over the SFT policy, and of its
    KL, in words by the verdict of the difference.

    `front` goes from the SFT policy to the merge, `path` is that of the runs that start from the next init.
    """
    merge = {what: figures.number(front, what, 1) for what in ("reward", "kl")}
    gained = {what: end - figures.number(front, what, 0) for what, end in merge.items()}
    shares = {what: (end - figures.over_steps(path, what, [0])[:, 0]) / gained[what] for what, end in merge.items()}
    reward, kl = (t_interval(shares[what]) for what in ("reward", "kl"))
    return (f"Step 3 gives back {reward} of the reward that the first merge has gained and {kl} of its KL: " +
            figures.outcome(t_interval(shares["kl"] - shares["reward"]), "above", "more of the KL than of the reward",
                            "less of the KL than of the reward", "of which it gives more is unclear", apart=" ") + ".")


def length(theta: Weights, start: Weights) -> float:
    """How far weights have gone from where they started: the length of the whole task vector."""
    return torch.stack([(theta[name].double() - start[name].double()).norm() for name in start]).norm().item()


def kept(front: Sequence[dict], right: Sequence[dict], name: str) -> Interval:
    """The share of a number's change from η = 0 to 1 along the front `right` that `front` has, seed by seed."""
    changes = [figures.number(rows, name, 1) - figures.number(rows, name, 0) for rows in (front, right)]
    return t_interval(changes[0] / changes[1])


def draw_fronts(axes: Axes, fronts: Mapping[str, Sequence[dict]], colours: Mapping[str, str], name: str = "reward",
                limit: Sequence[dict] = ()) -> None:
    """Fronts by their names: the mean over seeds at each η, with its intervals in both directions, and a label. Titles
    and names of axes come before: they move what is drawn."""
    ends, heights = {}, []
    for label, rows in fronts.items():
        kl, value = figures.number(rows, "kl"), figures.number(rows, name)
        x, y = figures.draw_curve(axes, kl, value, colours[label])
        ends[label] = (x[-1], y[-1], colours[label])
        heights.append(y)
    if name == "reward" and limit:
        figures.draw_limit(axes, limit)
        heights.append(column(limit, "reward"))
    figures.frame(axes, heights)
    axes.set(xlabel=KL_LABEL, xlim=(0, 1.1 * max(x for x, _, _ in ends.values())))
    figures.label_ends(axes, ends)


def by_iteration(fronts: Mapping[int, Sequence[dict]], paths: Sequence[dict], limit: Sequence[dict],
                 labels: Mapping[str, str], titles: Mapping[str, str]) -> Figure:
    """The front of each iteration, in reward and gold reward, over the paths of single runs in grey.

    `labels` has by kind of reward the name of its axis, `titles` its title.
    """
    figure, panels = plt.subplots(1, len(labels), figsize=(5.8 * len(labels), 4.8), layout="constrained", squeeze=False)
    for axes, kind in zip(panels[0], labels):  # which make the panels smaller, before names are placed in them
        axes.set_ylabel(labels[kind])
        axes.set_title(titles[kind])
    for axes, kind in zip(panels[0], labels):
        for curve in figures.seed_curves(paths):
            for run in {row["run"] for row in curve}:
                path = sorted((row for row in curve if row["run"] == run), key=lambda row: row["step"])
                axes.plot(column(path, "kl"), column(path, kind), color=COLOURS["single"], lw=0.6, alpha=0.2)
        draw_fronts(axes, {f"iteration {i}": rows for i, rows in fronts.items()},
                    {f"iteration {i}": iteration_colour(i) for i in fronts}, kind, limit)
    return figure


def along_steps(paths: Mapping[int, Sequence[dict]], fronts: Mapping[int, Sequence[dict]], unit: str,
                titles: Sequence[str]) -> Figure:
    """Reward and KL of the single runs of each iteration against RL steps, and of their merges, as dots."""
    figure, panels = plt.subplots(1, 2, figsize=(12.5, 4.4), layout="constrained")
    for axes, what, title in zip(panels, ("reward", "kl"), titles):
        start, heights = 0, []
        for i, rows in paths.items():
            steps = np.arange(0, max(row["step"] for row in rows) + 1, 5)
            heights.append(figures.draw_sweep(axes, start + steps, figures.over_steps(rows, what, steps),
                                              iteration_colour(i)))
            start += steps[-1]
            merge = figures.number(fronts[i], what, 1)
            axes.plot(start, merge.mean(), "o", color=iteration_colour(i), ms=8, mec="black")
            heights.append(merge.mean())
        axes.plot([], [], color=COLOURS["single"], label="mean of single runs")
        axes.plot([], [], "o", color=COLOURS["single"], mec="black", label="merge of all runs")
        figures.frame(axes, heights)
        axes.set(xlabel="RL steps of one run", ylabel=KL_LABEL if what == "kl" else f"reward ({unit})")
        axes.set_title(title)
    panels[0].legend(loc="lower right")
    return figure


def compared(fronts: Mapping[str, Sequence[dict]], colours: Mapping[str, str], limit: Sequence[dict], unit: str,
             title: str) -> Figure:
    """Fronts of several ways to merge, by their names, under the limit."""
    figure, axes = plt.subplots(figsize=(7.8, 4.6), layout="constrained")
    axes.set_ylabel(f"reward ({unit})")
    axes.set_title(title)
    draw_fronts(axes, fronts, colours, limit=limit)
    return figure


def along_front(fronts: Mapping[int, Sequence[dict]], titles: Mapping[str, str]) -> Figure:
    """Length and diversity of what is written along the front of each iteration."""
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    for axes, what, words in zip(panels, titles, ("length (tokens)", "distinct pairs (share)")):
        axes.set_ylabel(words)
        axes.set_title(titles[what])
    for axes, what in zip(panels, titles):
        draw_fronts(axes, {f"iteration {i}": rows for i, rows in fronts.items()},
                    {f"iteration {i}": iteration_colour(i) for i in fronts}, what)
    return figure
