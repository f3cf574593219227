"""What the notebooks' figures share: curves with intervals over seeds, the limit, direct labels, findings.

Values over seeds are arrays (seeds, points). Bands and bars are 95 % bootstrap intervals of the mean
over seeds; where there is one seed there is no band.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .evaluation.statistics import Interval, bootstrap
from .plots import COLOURS, column


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


def interval_band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper end over seeds of values (seeds, points)."""
    intervals = [bootstrap(values[:, i]) for i in range(values.shape[1])]
    return tuple(np.array([getattr(interval, end) for interval in intervals]) for end in ("mean", "low", "high"))


def draw_sweep(axes, x, values: np.ndarray, colour: str, label: str | None = None, **line):
    """Mean and band of values (seeds, points) against x (points,), with the label at the end of the line."""
    mean, low, high = interval_band(values)
    axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    axes.plot(x, mean, color=colour, **line)
    if label:
        label_end(axes, x, mean, label, colour)
    return mean


def draw_curve(axes, kl: np.ndarray, reward: np.ndarray, colour: str, label: str | None = None, **line):
    """Mean reward against mean KL, both (seeds, points), with bars in both directions."""
    (x, x_low, x_high), (y, y_low, y_high) = interval_band(kl), interval_band(reward)
    bars = {} if np.isnan(x_low).all() else {"xerr": [x - x_low, x_high - x], "yerr": [y - y_low, y_high - y]}
    axes.errorbar(x, y, **bars, color=colour, elinewidth=0.8, **{"marker": "o", "ms": 3.5, **line})
    if label:
        label_end(axes, x, y, label, colour)
    return x, y


def label_end(axes, x, y, text: str, colour: str, shift: tuple[float, float] = (5, 0)) -> None:
    """A label right of the last point of a line, in its colour."""
    axes.annotate(text, (x[-1], y[-1]), textcoords="offset points", xytext=shift, color=colour, va="center", fontsize=9)


def draw_limit(axes, limit: Sequence[dict], label: str = "limit") -> None:
    """The limit with a band of two standard errors, as far as it can be trusted."""
    if not limit:
        return
    kl, reward, error = column(limit, "kl"), column(limit, "reward"), 2 * column(limit, "reward_se")
    axes.fill_between(kl, reward - error, reward + error, color=COLOURS["limit"], alpha=0.12, lw=0)
    axes.plot(kl, reward, color=COLOURS["limit"], ls="--", lw=1.4)
    label_end(axes, kl, reward, label, COLOURS["limit"])


def finding(claim: str, interval: Interval, rule: str, unit: str = "", null: float = 0.0, margin: float = 0.0) -> str:
    """A title: the claim, its verdict by `rule`, and the interval that the verdict follows from."""
    count = f"{interval.count} seed{'s' if interval.count != 1 else ''}"
    return f"{claim}: {interval.verdict(rule, null, margin)}\n{interval}{' ' + unit if unit else ''}, {count}"
