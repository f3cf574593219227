"""What the notebooks' figures share: curves with intervals over seeds, the limit, direct labels, findings.

Values over seeds are arrays (seeds, points). Bands and bars are 95 % intervals of the mean over
seeds (Student's t); where there is one seed there is no band.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ..averaging.state_dicts import Weights
from ..evaluation.front import best_within_kl, reward_at_kl
from ..evaluation.statistics import Interval, t_interval
from ..experiment import Experiment
from ..result import WarpResult
from ..storage.files import write_bytes
from ..viewing.labels import label_end, label_ends  # noqa: F401  (the notebooks' pictures take both from here)
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


def shared_level(*curves: Sequence[dict]) -> float:
    """The largest KL, in nats, that every run (`run`) of every seed of every sweep or trajectory reaches, in whole
    tenths where it is over 1."""
    reached = [{} for _ in curves]
    for highest, rows in zip(reached, curves):
        for row in rows:
            key = row["seed"], row.get("run")
            highest[key] = max(row["kl"], highest.get(key, 0.0))
    least = min(min(highest.values()) for highest in reached)
    return math.floor(10 * least) / 10 if least > 1 else least


def at_kl(rows: Sequence[dict], kl: float | np.ndarray, name: str = "reward", **which: str | int | float) -> np.ndarray:
    """The reward, or another number, where the curve of each seed (see `seed_curves`) first crosses a KL: (seeds,).

    `kl`, in nats, is one number or one a seed. Of a seed with several runs it is the mean over those that cross it; nan
    where none does. See `reward_at_kl`.
    """
    return _read(seed_curves(rows, **which), kl, lambda run, level: reward_at_kl(run, level, name))


def best_at_kl(rows: Sequence[dict], kl: float | np.ndarray) -> np.ndarray:
    """As `at_kl`, the best reward that the curve of each seed has at that KL or less (`best_within_kl`): (seeds,)."""
    return _read(seed_curves(rows), kl, best_within_kl)


def _read(curves: Sequence[Sequence[dict]], kl: float | np.ndarray,
          value: Callable[[Sequence[dict], float], float]) -> np.ndarray:
    """The value of each curve at a KL, one number or one a curve, in the mean over its runs that have one."""
    values = []
    for curve, level in zip(curves, np.broadcast_to(kl, (len(curves),))):
        runs = [[row for row in curve if row.get("run") == run] for run in {row.get("run"): None for row in curve}]
        found = [number for run in runs if math.isfinite(number := value(run, level))]
        values.append(np.mean(found) if found else math.nan)
    return np.array(values)


def over_steps(rows: Sequence[dict], name: str, steps: Sequence[int]) -> np.ndarray:
    """A number of each seed's path at RL steps, by a straight line between measured ones: (seeds, steps).

    Of a seed with several runs it is their mean.
    """
    values = []
    for curve in seed_curves(rows):
        runs = {row["run"]: None for row in curve}
        paths = [sorted((row["step"], row[name]) for row in curve if row["run"] == run) for run in runs]
        values.append(np.mean([np.interp(steps, *zip(*path)) for path in paths], axis=0))
    return np.array(values)


def reached(rows: Sequence[dict]) -> float:
    """The largest KL, in nats, that the path or front of every seed gets to."""
    return min(max(row["kl"] for row in curve) for curve in seed_curves(rows))


def best_elsewhere(table: Sequence[np.ndarray]) -> np.ndarray:
    """Of values (settings, seeds), for each seed that of the setting which is best for the other seeds: (seeds,).

    So no seed is compared by a setting that was chosen on it. A setting that lacks a value of any seed is left out; nan
    where none is left. Of a single seed it is the best.
    """
    whole_rows = np.array([row for row in table if np.isfinite(row).all()])
    if not len(whole_rows):
        return np.full(len(table[0]), np.nan)
    seeds = whole_rows.shape[1]
    others = (whole_rows.sum(1, keepdims=True) - whole_rows) / (seeds - 1) if seeds > 1 else whole_rows
    return whole_rows[others.argmax(0), np.arange(seeds)]


def two_digits(kl: float) -> float:
    """A KL, in nats, to two digits and no larger, as a place to compare at."""
    if kl <= 0:
        return kl
    unit = 10.0 ** (math.floor(math.log10(kl)) - 1)
    return round(math.floor(kl / unit + 1e-9) * unit, 12)


def seed_curves(rows: Sequence[dict], **which: str | int | float) -> list[list[dict]]:
    """One front or trajectory a seed, as lists of rows, in the order of seeds; `which` names what the rows must have,
    as `config="WARP"` or `iteration=1`."""
    chosen = [row for row in rows if all(row[name] == value for name, value in which.items())]
    return [[row for row in chosen if row["seed"] == seed] for seed in sorted({row["seed"] for row in chosen})]


def interval_band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper end of the 95 % interval over seeds of values (seeds, points): (points,) each."""
    intervals = [t_interval(values[:, i]) for i in range(values.shape[1])]
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


def draw_path(axes: Axes, rows: Sequence[dict], colour: str, name: str = "reward", edge: float = math.inf,
              **line: object) -> tuple[float, float, str]:
    """The reward, or another number, where each seed's path or front first crosses a KL (see `at_kl`): the mean and its
    band over seeds, as far as all of them get and no further than `edge` nats.

    `line` are options of `Axes.plot`. Returns the end and the colour, for `label_ends`.
    """
    start = max(curve[0]["kl"] for curve in seed_curves(rows))
    grid = start + np.linspace(0.01, 1, 40) * max(min(reached(rows), edge) - start, 0)
    mean = draw_sweep(axes, grid, np.array([at_kl(rows, kl, name) for kl in grid]).T, colour, **line)
    return grid[-1], mean[-1], colour


def frame(axes: Axes, values: Sequence[np.ndarray]) -> None:
    """Limit the height to that of what is drawn, `values`, and half of it above and below: with few seeds bars reach
    so far that nothing else would be seen."""
    low, high = min(map(np.nanmin, values)), max(map(np.nanmax, values))
    room = 0.5 * (high - low) or 1.0
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - room), min(top, high + room))


def shades(colour: str, count: int) -> list[tuple[float, float, float]]:
    """So many shades of a colour, from light to the colour itself, as (red, green, blue)."""
    return [tuple(1 - share * (1 - part) for part in to_rgb(colour)) for share in np.linspace(0.6, 1, count)]


def draw_over_kl(axes: Axes, rows: Sequence[dict], colour: str, label: str, name: str = "reward",
                 shift: tuple[float, float] = (5, 0), **line: object) -> None:
    """A number of a sweep against KL, in nats, with its band, as far as every seed reaches.

    `shift` moves the label, in points; `line` are options of `Axes.plot`.
    """
    grid = np.linspace(0.05, 1, 25) * level(rows)
    values = np.array([at_kl(rows, kl, name) for kl in grid]).T
    draw_sweep(axes, grid, values, colour, **line)
    label_end(axes, grid, values.mean(0), label, colour, shift)


def draw_limit(axes: Axes, limit: Sequence[dict], label: str = "limit") -> None:
    """The limit with a band of two standard errors over prompts, as far as it can be trusted."""
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


def outcome(interval: Interval, rule: str, holds: str, fails: str, unclear: str, unit: str = "", null: float = 0.0,
            margin: float = 0.0, apart: str = "\n") -> str:
    """What happened, in words chosen by the verdict, and the interval that it follows from.

    `holds`, `fails` and `unclear` say what is the case with each verdict of `rule`: for a title, or a sentence with
    `apart=" "`.
    """
    words = {"holds": holds, "fails": fails, "unclear": unclear}[interval.verdict(rule, null, margin)]
    count = f"{interval.count} seed{'s' if interval.count != 1 else ''}"
    return f"{words}{apart}({interval}{' ' + unit if unit else ''}, {count})"


def say(*sentences: str) -> None:
    """Show sentences, which were computed, as one paragraph of text."""
    from IPython.display import Markdown, display

    display(Markdown(" ".join(sentences)))


def keep(folder: str | Path, name: str, **measured: object) -> None:
    """Write what a notebook measured to `folder`/`name`.json, whole or not at all. Raises CannotWrite."""
    write_bytes(Path(folder) / f"{name}.json", json.dumps(measured, indent=1).encode())  # NaN and all
    print(f"written: {name}.json")


STAGES = {"EMA": "M runs, each held to\nits own moving average", "SLERP": "their merge\nalong the arc",
          "LITI": "a step back\ntoward the start"}


def stages(lit: str) -> Figure:
    """Algorithm 1 as a picture, one stage of it lit: "EMA", "SLERP" or "LITI"; "WARP" lights all.

    Raises ValueError for another word.
    """
    if lit not in (*STAGES, "WARP"):
        raise ValueError(f"the stage to light is one of {', '.join(STAGES)} or WARP, not {lit!r}")
    figure, axes = plt.subplots(figsize=(8.4, 2.3), layout="constrained")
    axes.set(xlim=(0, 10.2), ylim=(0, 2.9))
    axes.axis("off")

    def shade(name: str) -> tuple[str, float]:
        on = lit in (name, "WARP")
        return (COLOURS[name.lower()], 1.0) if on else (COLOURS["single"], 0.45)

    def arrow(start: tuple[float, float], end: tuple[float, float], stage: str, **style: object) -> None:
        colour, alpha = shade(stage)
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "alpha": alpha, "lw": 1.6,
                                                  "shrinkA": 0, "shrinkB": 0, **style})

    for y in (0.75, 1.35, 1.95):
        arrow((1.05, 1.35), (3.1, y), "EMA")
        arrow((3.6, y), (5.5, 1.35), "SLERP")
        axes.text(3.35, y, "θ", ha="center", va="center", color=shade("EMA")[0], alpha=shade("EMA")[1])
    arrow((6.6, 1.35), (8.6, 1.35), "LITI")
    arrow((9.1, 1.05), (0.6, 1.05), "LITI", connectionstyle="arc3,rad=-0.2", lw=1.0)
    axes.text(0.55, 1.35, "θ_init", ha="center", va="center", fontweight="bold")
    axes.text(6.05, 1.35, "θ_slerp", ha="center", va="center", fontweight="bold")
    axes.text(9.3, 1.35, "next θ_init", ha="center", va="center", fontweight="bold")
    for (stage, words), x in zip(STAGES.items(), (2.1, 4.7, 7.6)):
        colour, alpha = shade(stage)
        axes.text(x, 2.5, stage, ha="center", va="bottom", color=colour, alpha=alpha, fontweight="bold")
        axes.text(x, 2.48, words, ha="center", va="top", fontsize=7.5, color=colour, alpha=alpha)
    return figure


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
            figure.savefig(page, format="png", bbox_inches=figure.bbox_inches)  # one size wherever the slider stands
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
