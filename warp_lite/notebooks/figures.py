"""What the notebooks' figures share: curves with intervals over seeds, the limit, direct labels, findings.

Values over seeds are arrays (seeds, points). Bands and bars are 95 % bootstrap intervals of the mean
over seeds; where there is one seed there is no band.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ..averaging.state_dicts import Weights
from ..evaluation.front import reward_at_kl
from ..evaluation.statistics import Interval, bootstrap
from ..experiment import Experiment
from ..result import WarpResult
from ..storage.files import write_bytes
from ..viewing.plots import COLOURS, column

if TYPE_CHECKING:
    from ipywidgets import ValueWidget, VBox


def by_seed(rows: Sequence[dict], name: str, over: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """(points,) of `over` and (seeds, points) of the number `name`; what shares a seed and a point is averaged."""
    seeds, points = sorted({row["seed"] for row in rows}), sorted({row[over] for row in rows})
    sums, counts = np.zeros((len(seeds), len(points))), np.zeros((len(seeds), len(points)))
    for row in rows:
        if row.get(name) is not None:
            place = seeds.index(row["seed"]), points.index(row[over])
            sums[place] += row[name]
            counts[place] += 1
    with np.errstate(invalid="ignore"):
        return np.array(points), sums / counts


def rows_from_start(experiment: Experiment) -> list[dict]:
    """The trajectories of an experiment's first iteration with the SFT policy, KL 0, as their step 0."""
    rows = [row for row in experiment.trajectory_rows() if row["iteration"] == 1]
    (start,) = experiment.measure([next(iter(experiment.results.values()))[0].sft], samples=1)
    runs = {(row["config"], row["seed"], row["run"]) for row in rows}
    first = [{"config": config, "seed": seed, "iteration": 1, "run": run, "step": 0, **start.as_dict()}
             for config, seed, run in sorted(runs)]
    return first + rows


def sweep(experiment: Experiment, results: Sequence[WarpResult],
          make: Callable[[WarpResult, float], Weights], values: Sequence[float], texts: bool = False) -> list[dict]:
    """The metrics of the weights `make(result, value)`, on the held-out prompts: a row a seed and value.

    `texts`: with the perplexity of held-out texts, where there are any.
    """
    rows = []
    for result in results:
        measured = experiment.measure((make(result, value) for value in values), texts=texts)
        rows += [{"seed": result.config.seed, "value": value, **metrics.as_dict()}
                 for value, metrics in zip(values, measured)]
    return rows


def number(rows: Sequence[dict], name: str, value: float | None = None) -> np.ndarray:
    """A number of the rows of a sweep: (seeds, values), or (seeds,) at one value."""
    at, array = by_seed(rows, name, over="value")
    return array if value is None else array[:, np.flatnonzero(np.isclose(at, value))[0]]


def level(*curves: Sequence[dict]) -> float:
    """The largest KL, in nats, that every seed of every sweep reaches, in whole tenths where it is over 1."""
    reached = min(number(rows, "kl").max(1).min() for rows in curves)
    return np.floor(10 * reached) / 10 if reached > 1 else reached


def at_kl(rows: Sequence[dict], kl: float | np.ndarray, name: str = "reward", **which: str | int | float) -> np.ndarray:
    """The reward, or another number, where the curve of each seed (see `seed_curves`) first crosses a KL: (seeds,).

    `kl`, in nats, is one number or one a seed. Of a seed with several runs it is the mean over those that cross it; nan
    where none does. See `reward_at_kl`.
    """
    curves = seed_curves(rows, **which)
    values = []
    for curve, level in zip(curves, np.broadcast_to(kl, (len(curves),))):
        runs = [[row for row in curve if row.get("run") == run] for run in {row.get("run"): None for row in curve}]
        crossed = [value for run in runs if math.isfinite(value := reward_at_kl(run, level, name))]
        values.append(np.mean(crossed) if crossed else math.nan)
    return np.array(values)


def seed_curves(rows: Sequence[dict], **which: str | int | float) -> list[list[dict]]:
    """One front or trajectory a seed, as lists of rows, in the order of seeds; `which` names what the rows must have,
    as `config="WARP"` or `iteration=1`."""
    chosen = [row for row in rows if all(row[name] == value for name, value in which.items())]
    return [[row for row in chosen if row["seed"] == seed] for seed in sorted({row["seed"] for row in chosen})]


def interval_band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper end of the 95 % interval over seeds of values (seeds, points): (points,) each."""
    intervals = [bootstrap(values[:, i]) for i in range(values.shape[1])]
    return tuple(np.array([getattr(interval, end) for interval in intervals]) for end in ("mean", "low", "high"))


def draw_sweep(axes: Axes, x: Sequence[float] | np.ndarray, values: np.ndarray, colour: str, label: str | None = None,
               **line: object) -> np.ndarray:
    """Mean and band of values (seeds, points) against x (points,), with the label at the end of the line.

    `line` are options of `Axes.plot`. Returns the mean (points,).
    """
    mean, low, high = interval_band(values)
    axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    axes.plot(x, mean, color=colour, **line)
    if label:
        label_end(axes, x, mean, label, colour)
    return mean


def draw_curve(axes: Axes, kl: np.ndarray, reward: np.ndarray, colour: str, label: str | None = None,
               **line: object) -> tuple[np.ndarray, np.ndarray]:
    """Mean reward against mean KL, both (seeds, points), with bars in both directions.

    `line` are options of `Axes.errorbar`. Returns mean KL, in nats, and mean reward, (points,) each.
    """
    (x, x_low, x_high), (y, y_low, y_high) = interval_band(kl), interval_band(reward)
    bars = {} if np.isnan(x_low).all() else {"xerr": [x - x_low, x_high - x], "yerr": [y - y_low, y_high - y]}
    axes.errorbar(x, y, **bars, color=colour, **{"marker": "o", "ms": 3.5, "elinewidth": 0.8, **line})
    if label:
        label_end(axes, x, y, label, colour)
    return x, y


def draw_over_kl(axes: Axes, rows: Sequence[dict], colour: str, label: str, name: str = "reward",
                 shift: tuple[float, float] = (5, 0), **line: object) -> None:
    """A number of a sweep against KL, in nats, with its band, as far as every seed reaches.

    `shift` moves the label, in points; `line` are options of `Axes.plot`.
    """
    grid = np.linspace(0.05, 1, 25) * level(rows)
    values = np.array([at_kl(rows, kl, name) for kl in grid]).T
    draw_sweep(axes, grid, values, colour, **line)
    label_end(axes, grid, values.mean(0), label, colour, shift)


def label_end(axes: Axes, x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, text: str, colour: str,
              shift: tuple[float, float] = (5, 0)) -> None:
    """A label right of the last point of a line x, y (points,), in its colour, moved by `shift` points."""
    axes.annotate(text, (x[-1], y[-1]), textcoords="offset points", xytext=shift, color=colour, va="center", fontsize=9,
                  path_effects=[withStroke(linewidth=3, foreground="white")], zorder=10)


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]], gap: float = 12.0) -> None:
    """Labels at the ends (x, y, colour) of several lines, moved apart to `gap` points; call it when all is drawn."""
    figure = axes.figure
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    order = sorted(ends, key=lambda name: ends[name][1])
    heights = np.array([axes.transData.transform(ends[name][:2])[1] * scale for name in order])
    placed = heights.copy()
    for _ in range(100):
        for i in range(1, len(placed)):
            lack = gap - (placed[i] - placed[i - 1])
            near = abs(axes.transData.transform(ends[order[i]][:2])[0]
                       - axes.transData.transform(ends[order[i - 1]][:2])[0]) * scale < 60
            if lack > 0 and near:
                placed[i - 1] -= lack / 2
                placed[i] += lack / 2
    for name, before, after in zip(order, heights, placed):
        x, y, colour = ends[name]
        label_end(axes, [x], [y], name, colour, shift=(6, after - before))


def draw_limit(axes: Axes, limit: Sequence[dict], label: str = "limit") -> None:
    """The limit with a band of two standard errors, as far as it can be trusted."""
    if not limit:
        return
    kl, reward, error = column(limit, "kl"), column(limit, "reward"), 2 * column(limit, "reward_se")
    axes.fill_between(kl, reward - error, reward + error, color=COLOURS["limit"], alpha=0.12, lw=0)
    axes.plot(kl, reward, color=COLOURS["limit"], ls="--", lw=1.4)
    label_end(axes, kl, reward, label, COLOURS["limit"], shift=(-8, 10))


def finding(claim: str, interval: Interval, rule: str, unit: str = "", null: float = 0.0, margin: float = 0.0) -> str:
    """A title: the claim, its verdict by `rule`, and the interval that the verdict follows from."""
    count = f"{interval.count} seed{'s' if interval.count != 1 else ''}"
    return f"{claim}: {interval.verdict(rule, null, margin)}\n{interval}{' ' + unit if unit else ''}, {count}"


def keep(folder: str | Path, name: str, **measured: object) -> None:
    """Write what a notebook measured to `folder`/`name`.json, whole or not at all. Raises CannotWrite."""
    write_bytes(Path(folder) / f"{name}.json", json.dumps(measured, indent=1).encode())  # NaN and all
    print(f"written: {name}.json")


def sliders(draw: Callable[..., Figure], **controls: ValueWidget) -> VBox:
    """A widget that draws anew when a control moves: `draw(**values)` returns a figure, and may print.

    Like `interact` of ipywidgets, but into an Image and a text: for an Output widget, which interact uses,
    a program that executes notebooks writes to the kernel while it listens to it, and now and then both
    wait for ever. What `draw` raises is shown below the picture, and raised.
    """
    import ipywidgets as w

    picture, text = w.Image(format="png"), w.HTML()

    def redraw(change=None) -> None:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                figure = draw(**{name: control.value for name, control in controls.items()})
            page = io.BytesIO()
            figure.savefig(page, format="png")
            plt.close(figure)  # or the notebook would show it a second time
            picture.value = page.getvalue()
        except Exception:
            printed.write(traceback.format_exc())
            raise
        finally:
            text.value = f"<pre>{html.escape(printed.getvalue())}</pre>"

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    return w.VBox([*controls.values(), picture, text])
