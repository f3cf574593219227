"""The explorer's picture, quick enough to follow a slider.

Axes, limit and trajectories are drawn once for each setting of the toggles and kept as pixels; a move
puts them back and draws the fronts and the point upon them.
"""

from __future__ import annotations

import dataclasses
import io
import itertools

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ..labels import label_end, line_strokes, place
from ..plots import COLOURS, KL_LABEL, column, iteration_colour, style
from .grid import View, line_at, shown_kl

ROOT_LABEL = "√(KL to the SFT policy, in nats per sequence)"
SIZE, DPI = (7.2, 4.6), 100
PLACE = (0.1, 0.13, 0.87, 0.7)  # of the axes in the figure: left, bottom, width, height


class Picture:
    """One matplotlib figure that is used again for every view of a grid."""

    def __init__(self, grid: dict):
        self.grid = grid
        self.grounds: dict[tuple, tuple] = {}  # by toggles: pixels, limits of the axes, strokes
        self.figure = Figure(figsize=SIZE, dpi=DPI)
        self.canvas = FigureCanvasAgg(self.figure)
        with style():
            self.axes = self.figure.add_axes(PLACE)

    def prepare(self, view: View) -> None:
        """Draw the grounds of all toggles now, so that no move has to."""
        rewards = ("reward", "gold") if self.grid["gold"] else ("reward",)
        with style():
            for reward, root, trajectories, limit in itertools.product(rewards, *[(False, True)] * 3):
                self.ground(dataclasses.replace(view, reward=reward, root=root, trajectories=trajectories, limit=limit))

    def ground(self, view: View) -> tuple:
        """The pixels of a setting of the toggles, the limits of its axes, and the strokes of its lines, (N, 2, 2)."""
        key = (view.reward, view.root, view.trajectories, view.limit)
        if key not in self.grounds:
            self.axes.clear()
            draw_ground(self.axes, self.grid, view)
            self.canvas.draw()
            pixels = self.canvas.copy_from_bbox(self.figure.bbox)
            self.grounds[key] = (pixels, self.axes.get_xlim(), self.axes.get_ylim(), line_strokes(self.axes.lines))
        return self.grounds[key]

    def png(self, view: View, point: dict) -> bytes:
        """The picture of a view and its point as a PNG."""
        with style():
            pixels, xlim, ylim, below = self.ground(view)
            self.canvas.restore_region(pixels)
            self.axes.set(xlim=xlim, ylim=ylim)
            for artist in draw_view(self.axes, self.grid, view, point, below):
                self.axes.draw_artist(artist)
                artist.remove()
        data = io.BytesIO()
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB").save(data, "png", compress_level=1)
        return data.getvalue()


def draw_picture(grid: dict, view: View, point: dict) -> Figure:
    """The picture of a view and its point as a figure of its own."""
    with style():
        figure = Figure(figsize=SIZE, dpi=DPI)
        axes = figure.add_axes(PLACE)
        draw_ground(axes, grid, view)
        draw_view(axes, grid, view, point, line_strokes(axes.lines))
    return figure


def draw_ground(axes: Axes, grid: dict, view: View) -> None:
    """What does not follow the sliders: axes, limit, trajectories."""
    name = view.reward
    fronts = [p for line in grid["lines"] for p in line["points"]]
    shown = fronts + (grid["limit"] if view.limit else [])
    widest = shown_kl(grid, view.limit)
    low, high = min(column(fronts, name)), max(column(shown, name))
    if view.trajectories:
        rows = grid["trajectories"]
        for i, m in sorted({(row["iteration"], row["run"]) for row in rows}):
            run = [fronts[0], *(row for row in rows if (row["iteration"], row["run"]) == (i, m))][0 if i == 1 else 1:]
            axes.plot(across(column(run, "kl"), view), column(run, name), color=COLOURS["single"], lw=0.8, alpha=0.5)
    if view.limit and grid["limit"]:
        kl, value = across(column(grid["limit"], "kl"), view), column(grid["limit"], name)
        axes.plot(kl, value, color=COLOURS["limit"], ls="--", lw=1.4)
    margin = 0.08 * (high - low) or 1.0
    axes.set(xlim=across(np.array([0.0, widest]), view), ylim=(low - margin, high + margin),
             xlabel=ROOT_LABEL if view.root else KL_LABEL,
             ylabel=f"{reward_label(grid, name)} ({grid['unit']})")


def draw_view(axes: Axes, grid: dict, view: View, point: dict, below: np.ndarray) -> list[Artist]:
    """The fronts of all iterations, the viewed one bold, the point with its errors, and their names; returns what was
    drawn.

    The point is a diamond where it was measured live, and an arrow at the edge where it lies beyond it. Names stand
    where nothing strikes them: `below` are the strokes of the ground (see `line_strokes`).
    """
    name, artists, labels, edge = view.reward, [], [], axes.get_xlim()[1]
    for i in grid["iterations"]:
        points = line_at(grid, dataclasses.replace(view, iteration=i))
        chosen, colour = i == view.iteration, iteration_colour(i)
        kl, value = across(column(points, "kl"), view), column(points, name)
        artists += axes.plot(kl, value, color=colour, marker="o", ms=4 if chosen else 2.5, lw=2 if chosen else 1,
                             alpha=1 if chosen else 0.45)
        labels.append(label_end(axes, [min(kl[-1], edge)], value[-1:], f"iteration {i}", colour))
        labels[-1].set_alpha(1 if chosen else 0.6)
    if view.limit and grid["limit"]:
        end = grid["limit"][-1]
        words = "limit" if name == "reward" else "optimum of the proxy"
        labels.append(label_end(axes, across(column([end], "kl"), view), [end[name]], words, COLOURS["limit"]))
    kl, value, error, height = (point[key] for key in ("kl", name, "kl_se", f"{name}_se"))
    ends = across(np.array([kl - error, kl, kl + error]), view)
    artists += axes.plot(ends, [value] * 3, color="black", lw=1.2)
    artists += axes.plot([ends[1]] * 2, [value - height, value + height], color="black", lw=1.2)
    marker = "D" if "live" in point else "o"
    if ends[1] > edge:
        marker = ">"
    artists += axes.plot(min(ends[1], edge), value, marker=marker, ms=10, mec="black", mew=1.4, clip_on=False,
                         mfc=iteration_colour(view.iteration))
    title = axes.text(0, 1.03, heading(view, point), transform=axes.transAxes, fontsize=11, va="bottom")
    place(axes, labels, np.concatenate([below, line_strokes(artists)]), [title.get_window_extent()])
    return [*artists, *labels, title]


def heading(view: View, point: dict) -> str:
    """The point in two lines: where it is, and what it measures."""
    merged = f"{view.runs} runs merged" if view.runs > 1 else "one run"
    share = f" at λ = {view.lam:.2f}" if view.runs == 2 else ""
    place = f"iteration {view.iteration}, {merged}{share}, η = {view.eta:.2f}"
    name = "gold reward" if view.reward == "gold" else "reward"
    return (f"{place}\nKL {point['kl']:.2f} ± {point['kl_se']:.2f} nats, "
            f"{name} {point[view.reward]:.2f} ± {point[view.reward + '_se']:.2f}")


def across(kl: np.ndarray, view: View) -> np.ndarray:
    """KL (N,) in nats as the axis has it: itself or its root."""
    return np.sqrt(np.clip(kl, 0, None)) if view.root else kl


def reward_label(grid: dict, reward: str) -> str:
    """What a reward is called where there is a gold one, and where there is none."""
    if reward == "gold":
        return "gold reward"
    return "proxy reward" if grid["gold"] else "reward"
