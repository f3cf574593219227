"""Intervals over seeds, and the verdict that follows from one by a written rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

RULES = ("above", "below", "within")
VERDICTS = ("holds", "fails", "no difference", "unclear")
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, the number of values behind it, and of groups that are independent."""

    mean: float
    low: float
    high: float
    count: int
    groups: int

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        low, high = (f"{end:{spec}}" if math.isfinite(end) else "–" for end in (self.low, self.high))  # of one group
        return f"{self.mean:{spec}} [{low}, {high}]"

    def verdict(self, rule: str, null: float = 0.0, margin: float = 0.0, worth: float = 0.0) -> str:
        """What the interval says of a claim, by the rule "above", "below" or "within" (see `verdict`).

        Raises ValueError for another rule.
        """
        return verdict(self.low, self.high, rule, null, margin, worth)

    def with_groups(self, groups: int) -> Interval:
        """The interval that so many groups would have, a value each, with the mean and the spread of these; (nan, nan)
        of fewer than two."""
        if min(groups, self.groups) < 2:
            return Interval(self.mean, math.nan, math.nan, groups, groups)
        now, then = (stdtrit(n - 1, (1 + LEVEL) / 2) / math.sqrt(n) for n in (self.groups, groups))
        half = (self.high - self.low) / 2 * then / now
        return Interval(self.mean, self.mean - half, self.mean + half, groups, groups)

    def p_value(self, null: float = 0.0) -> float:
        """The two-sided p-value of Student's t test that the mean is `null`; nan with fewer than two groups."""
        if self.groups < 2:
            return math.nan
        df = self.groups - 1
        error = (self.high - self.low) / 2 / stdtrit(df, (1 + LEVEL) / 2)
        if error == 0:
            return float(self.mean == null)
        return float(2 * stdtr(df, -abs(self.mean - null) / error))


def t_interval(values: Sequence[float], groups: Sequence | None = None) -> Interval:
    """The mean of values (seeds,) with Student's 95 % interval.

    Values that share a group (a draw of SFT policy and reward model) are not independent: each group counts as
    one, its mean, however many values it has. Without `groups` every value is one of its own. For a paired
    difference pass the differences. NaN values are left out and not counted; with fewer than two groups the
    interval is (nan, nan).

    With few groups it covers what it says where a percentile bootstrap is too narrow: `evidence/coverage.json`
    has both by simulation. Raises ValueError if the lengths differ.
    """
    values = np.asarray(values, dtype=float)
    groups = list(range(len(values)) if groups is None else groups)
    if len(values) != len(groups):
        raise ValueError(f"there are {len(values)} values and {len(groups)} groups; give each value its group")
    parts: dict[object, list[float]] = {}
    for value, group in zip(values, groups):
        if math.isfinite(value):
            parts.setdefault(group, []).append(value)
    means = np.array([np.mean(part) for part in parts.values()])
    count = sum(map(len, parts.values()))
    if len(means) < 2:
        return Interval(float(means[0]) if len(means) else math.nan, math.nan, math.nan, count, len(means))
    half = stdtrit(len(means) - 1, (1 + LEVEL) / 2) * means.std(ddof=1) / math.sqrt(len(means))
    return Interval(float(means.mean()), float(means.mean() - half), float(means.mean() + half), count, len(means))


def verdict(low: float, high: float, rule: str, null: float = 0.0, margin: float = 0.0, worth: float = 0.0) -> str:
    """"holds", "fails", "no difference" or "unclear", from an interval alone.

    "above": holds where the whole interval lies above `null`, fails where it lies below; "below" the other way
    round. For both, an interval that lies within `worth` of the null, the smallest difference worth having, is "no
    difference" first, on whichever side; 0 asks for none. "within": holds where the interval lies within `margin`
    of `null`, fails where it lies outside of that. Everything else, NaN too, is unclear. Raises ValueError for
    another rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    if rule != "within" and worth > 0 and null - worth <= low and high <= null + worth:
        return "no difference"
    holds, fails = {
        "above": (low > null, high < null),
        "below": (high < null, low > null),
        "within": (low >= null - margin and high <= null + margin, low > null + margin or high < null - margin),
    }[rule]
    if holds:
        return "holds"
    return "fails" if fails else "unclear"
