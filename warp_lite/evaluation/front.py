"""Fronts of KL against reward: the area under one, the reward at a KL."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MIN_ESS = 30.0  # effective samples below which a point of the limit cannot be trusted
GRID = 2001  # points of the KL grid on which a front's area is taken


def points_array(points: Sequence) -> np.ndarray:
    """(N, 2) of KL and reward, sorted by KL, from dicts with `kl` and `reward`, or pairs.

    Raises ValueError when there are none or a value is not finite.
    """
    pairs = [(p["kl"], p["reward"]) if isinstance(p, dict) else tuple(p) for p in points]
    if not pairs:
        raise ValueError("the front has no points; give at least one")
    array = np.array(pairs, dtype=float)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"a front is pairs of (kl, reward), not an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"point {int(np.argmin(np.isfinite(array).all(1)))} of the front is not finite")
    return array[np.lexsort((array[:, 1], array[:, 0]))]


def reward_at_kl(points: Sequence, kl: float, kind: str = "reward") -> float:
    """The reward where a curve first gets to a KL, in nats, by a straight line between its points.

    points: dicts with `kl` and `reward`, or pairs of both. A trajectory, dicts with a `step`, is followed in the
    order of its steps; a front in the order of KL, with the better of two points at one KL. `kind` names another
    number of the dicts to be read in place of the reward. nan where the curve begins above that KL or does not get
    to it: never an extrapolation.

    The first crossing, and not the best within a budget of KL: it is the policy that one has who
    stops there, and it counts noise as often up as down, while a maximum over noisy points is too high, the more so
    the more points a curve has. A front crosses a KL once, so that fronts and trajectories are compared by one rule.

    Raises ValueError when there are no points or a value is not finite.
    """
    pairs = [(p["kl"], p[kind]) if isinstance(p, dict) else tuple(p) for p in points]
    front = points_array(pairs)
    if all(isinstance(p, dict) and "step" in p for p in points):
        order = sorted(range(len(pairs)), key=lambda i: points[i]["step"])
        return first_crossing(*np.array(pairs, dtype=float)[order].T, kl)
    return first_crossing(*_unique(front).T, kl)


def best_within_kl(points: Sequence, kl: float) -> float:
    """The best reward that a curve has at a KL, in nats, or less, by straight lines between its points in the order of
    KL; nan where it begins above that KL or does not get to it.

    What a trajectory has that passes a KL early and comes back to it with more reward. Chosen on the numbers that it
    is reported by: too high, the more so the more points a curve has.

    Raises ValueError when there are no points or a value is not finite.
    """
    array = points_array(points)
    if not array[0, 0] <= kl <= array[-1, 0]:
        return math.nan
    return float(running_maximum(array, np.array([kl]))[0])


def first_crossing(x: Sequence[float], y: Sequence[float], level: float) -> float:
    """y where x, in the order of the points (N,), first rises to a level, by a straight line between two points.

    nan where x begins above the level or never gets to it.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x[0] == level:
        return float(y[0])
    after = int(np.argmax(x >= level))
    return float(np.interp(level, x[after - 1:after + 1], y[after - 1:after + 1])) if after else math.nan


def running_maximum(points: Sequence, grid: np.ndarray) -> np.ndarray:
    """The best reward at or below each KL of the grid (G,), in nats: (G,); −∞ before the first point, flat past the
    last.

    Raises ValueError when there are no points or a value is not finite.
    """
    array = _unique(points_array(points))
    reward = np.interp(grid, array[:, 0], array[:, 1])
    reward[grid < array[0, 0]] = -np.inf
    for kl, value in array:  # a line between points is never above both, so the points so far decide
        reward[grid >= kl] = np.maximum(reward[grid >= kl], value)
    return reward


def hypervolume(points: Sequence, reference: tuple[float, float]) -> float:
    """The area between a front and `reference = (kl_max, reward_min)`, for KL from 0 to kl_max.

    Under the running maximum of the front on a fixed grid of KL, by trapezoids, held flat past
    its last point; rewards below reward_min count as none. In reward units times nats. Raises
    ValueError for a reference that is not finite or a kl_max that is not positive.
    """
    kl_max, reward_min = map(float, reference)
    if not (math.isfinite(kl_max) and math.isfinite(reward_min) and kl_max > 0):
        raise ValueError(f"reference must be a finite (kl_max > 0, reward_min), not {reference}")
    grid = np.linspace(0, kl_max, GRID)
    height = np.clip(running_maximum(points, grid) - reward_min, 0, None)
    return float(np.trapezoid(height, grid))


def _unique(array: np.ndarray) -> np.ndarray:
    """Points of one KL become their best, so that the front is a function."""
    last = np.append(array[1:, 0] != array[:-1, 0], True)
    return array[last]
