"""Intervals over seeds, and the verdict that follows from one by a written rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..policies.randomness import generator

RULES = ("above", "below", "within")


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval and the number of values behind it."""

    mean: float
    low: float
    high: float
    count: int

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def verdict(self, rule: str, null: float = 0.0, margin: float = 0.0) -> str:
        """What the interval says of a claim: "holds", "fails" or "unclear", by the rule "above", "below" or "within".

        Raises ValueError for another rule.
        """
        return verdict(self.low, self.high, rule, null, margin)


def bootstrap(values: Sequence[float], level: float = 0.95, draws: int = 4000, seed: int = 0) -> Interval:
    """The mean of values (seeds,) with its percentile bootstrap interval. NaN values are left out and not counted.

    For a paired difference pass the differences: policies that share a seed are resampled together.
    With fewer than two values the interval is (nan, nan).
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    if len(values) == 1:
        return Interval(float(values[0]), math.nan, math.nan, 1)
    rows = generator(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[rows].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def hierarchical_bootstrap(values: Sequence[float], groups: Sequence, level: float = 0.95, draws: int = 4000,
                           seed: int = 0) -> Interval:
    """The mean of values (seeds,) with an interval that allows for the draw of the world they share.

    Groups (the draws of SFT policy and reward model) are resampled with replacement, then the seeds
    within each of those drawn, and the mean is that of the groups' means: a draw counts as one,
    however many seeds it has. The mean itself is the mean of the groups' means too. NaN values are
    left out. With fewer than two groups the interval is (nan, nan); with few groups it is rough
    (Davison and Hinkley 1997, section 3.8). Raises ValueError if the lengths differ.
    """
    values, groups = np.asarray(values, dtype=float), list(groups)
    if len(values) != len(groups):
        raise ValueError(f"there are {len(values)} values and {len(groups)} groups; give each value its group")
    parts = [values[[g == group for g in groups]] for group in dict.fromkeys(groups)]
    parts = [part[np.isfinite(part)] for part in parts]
    parts = [part for part in parts if len(part)]
    count = sum(map(len, parts))
    if not parts:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean([part.mean() for part in parts]))
    if len(parts) == 1:
        return Interval(mean, math.nan, math.nan, count)
    rng = generator(seed)
    # each group's resampled means once a draw and place, of which the drawn group's is taken
    means = np.stack([part[rng.integers(len(part), size=(draws, len(parts), len(part)))].mean(-1) for part in parts])
    chosen = rng.integers(len(parts), size=(draws, len(parts)))
    picked = np.take_along_axis(means, chosen[None], 0)[0]                                # (draws, groups)
    low, high = np.quantile(picked.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), count)


def verdict(low: float, high: float, rule: str, null: float = 0.0, margin: float = 0.0) -> str:
    """"holds", "fails" or "unclear", from an interval alone.

    "above": holds where the whole interval lies above `null`, fails where it lies below; "below"
    the other way round. "within": holds where it lies within `margin` of `null`, fails where it
    lies outside of that. Everything else, NaN too, is unclear. Raises ValueError for another rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    holds, fails = {
        "above": (low > null, high < null),
        "below": (high < null, low > null),
        "within": (low >= null - margin and high <= null + margin, low > null + margin or high < null - margin),
    }[rule]
    if holds:
        return "holds"
    return "fails" if fails else "unclear"
