"""Effects: a number a seed, which decides a claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..evaluation.front import best_within_kl, first_crossing, hypervolume, reward_at_kl
from .bench import draw_of
from .settings import KL_MAX, area

KLS = (4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5)  # nats at which fronts are compared, highest first
PROXIES = (1.6, 1.2, 0.8, 0.4)  # proxy rewards at which gold is compared
POINTS = 60  # of a mean trajectory
REWARD, AREA = "reward", "reward × nats"
# A line of a study by its name, by that and what else its rows must have, or by a function of the world.
Line = str | dict | Callable[[str], str]


class Rows:
    """The rows of a study in one world, over all its draws, with the limit and best-of-n of each draw."""

    def __init__(self, world: str, rows: Sequence[dict], limits: Mapping[int, list[dict]] | None = None,
                 best_of_n: Mapping[int, list[dict]] | None = None):
        self.world, self.limits, self.best_of_n = world, limits or {}, best_of_n or {}
        self.cpu_seconds = 0.0
        self.kept: list[dict] = []  # what the files of its units hold, and of those of its limits
        self.by_line: dict[str, list[dict]] = {}
        for row in rows:
            self.by_line.setdefault(row["line"], []).append(row)
        self.seeds = sorted({row["seed"] for row in rows if row["seed"] is not None})

    def fronts(self, line: str | dict, seed: int) -> list[list[dict]]:
        """The fronts or trajectories of a line with one seed, one for each of its runs."""
        which = {"line": line} if isinstance(line, str) else line
        rows = [row for row in self.by_line[which["line"]] if row["seed"] == seed
                and all(row[name] == value for name, value in which.items())]
        return [[row for row in rows if row.get("run") == run] for run in sorted({row.get("run") for row in rows},
                                                                                 key=str)]

    def value(self, line: str, seed: int) -> float:
        """A line that is one number a seed."""
        (row,) = [row for row in self.by_line[line] if row["seed"] == seed]
        return row["value"]

    def mean_curve(self, line: str | dict, seeds: Sequence[int] | None = None) -> list[dict]:
        """The mean over seeds and runs of every number at each η, or step.

        Runs are measured after steps of their own (see `MeasuredSteps`), so their numbers are taken on straight lines
        between these, at `POINTS` steps at most, up to where the first of them ends.
        """
        fronts = [front for seed in seeds or self.seeds for front in self.fronts(line, seed)]
        numbers = ("kl", "reward", "gold", "length", "distinct", "perplexity")
        if "step" in fronts[0][0]:
            steps = sorted({row["step"] for front in fronts for row in front})
            steps = [step for step in steps if step <= min(max(row["step"] for row in front) for front in fronts)]
            steps = sorted({*steps[::math.ceil(len(steps) / POINTS)], steps[-1]})
            columns = {name: np.mean([np.interp(steps, *zip(*sorted((row["step"], row[name]) for row in front)))
                                      for front in fronts], 0) for name in numbers if name in fronts[0][0]}
            return [{"step": step, **{name: round(float(column[n]), 5) for name, column in columns.items()}}
                    for n, step in enumerate(steps)]
        place, found = "eta", []
        for at in sorted({row[place] for front in fronts for row in front}):
            some = [row for front in fronts for row in front if row[place] == at]
            found.append({place: at, **{name: round(float(np.mean([row[name] for row in some])), 5)
                                        for name in numbers if name in some[0]}})
        return found


@dataclass
class Effect:
    """A number a seed, and at which KL or proxy reward it was taken.

    Of each level tried, `reached` says how many seeds get there on both sides and `means` what the mean over those
    seeds would be: what was not chosen, since a level that some seeds do not reach compares the others alone.
    """

    values: dict[int, float]
    level: float | None = None
    reached: dict[str, int] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)


def gold_at_proxy(front: Sequence[dict], proxy: float) -> float:
    """The gold reward where the proxy reward of a front, in the order of η, first gets to a level; nan if never."""
    ordered = sorted(front, key=lambda row: row["eta"])
    return first_crossing([row["reward"] for row in ordered], [row["gold"] for row in ordered], proxy)


def compare(rows: Rows, a: str | dict, b: str | dict, levels: Sequence[float],
            value: Callable[[list[dict], float], float]) -> Effect:
    """a − b, each the mean over its runs, at the highest level that every seed of both sides reaches.

    `value(front, level)` is nan where a front does not reach the level. No values where there is no such level.
    """
    return compare_values(rows, levels, lambda level: {
        seed: np.mean([value(front, level) for front in rows.fronts(a, seed)])
        - np.mean([value(front, level) for front in rows.fronts(b, seed)]) for seed in rows.seeds})


def compare_values(rows: Rows, levels: Sequence[float], values_at: Callable[[float], dict[int, float]]) -> Effect:
    """The values, a number a seed, at the highest level at which every seed has one that is finite."""
    reached: dict[str, int] = {}
    means: dict[str, float] = {}
    chosen: Effect | None = None
    for level in levels:
        values = values_at(level)
        there = [value for value in values.values() if math.isfinite(value)]
        reached[f"{level:g}"] = len(there)
        if there:
            means[f"{level:g}"] = round(float(np.mean(there)), 5)
        if chosen is None and len(there) == len(rows.seeds):
            chosen = Effect({seed: float(value) for seed, value in values.items()}, level)
    return replace(chosen or Effect({}), reached=reached, means=means)


def at_one_kl(a: Line, b: Line, kind: str = "reward") -> Callable[[Rows], Effect]:
    """The effect of two lines: their difference in reward (or another number) at one KL, of `KLS`, in nats."""
    return lambda rows: compare(rows, line_of(a, rows), line_of(b, rows), KLS,
                                lambda front, kl: reward_at_kl(front, kl, kind))


def within_one_kl(a: Line, b: Line) -> Callable[[Rows], Effect]:
    """The effect of two lines: their difference in the best reward at one KL, of `KLS`, in nats, or less."""
    return lambda rows: compare(rows, line_of(a, rows), line_of(b, rows), KLS, best_within_kl)


def at_proxy(a: str | dict, b: str | dict) -> Callable[[Rows], Effect]:
    """The effect of two lines: their difference in gold reward at one proxy reward, of `PROXIES`."""
    return lambda rows: compare(rows, a, b, PROXIES, gold_at_proxy)


def areas(a: Line, b: Line) -> Callable[[Rows], Effect]:
    """The effect of two lines: their difference in the area of their fronts up to 4 nats, in reward times nats."""
    def effect(rows: Rows) -> Effect:
        return Effect({seed: float(np.mean([area(f) for f in rows.fronts(line_of(a, rows), seed)])
                                   - np.mean([area(f) for f in rows.fronts(line_of(b, rows), seed)]))
                       for seed in rows.seeds})
    return effect


def ends(a: str | dict, b: str | dict | None, kind: str) -> Callable[[Rows], Effect]:
    """The effect of two lines: their difference in a number at η = 1, or the last step; with b = None, from θ_sft."""
    def last(front):
        place = "step" if "step" in front[0] else "eta"
        end = max(row[place] for row in front) if place == "step" else 1.0
        return next(row[kind] for row in front if row[place] == end)

    def first(front):
        return min(front, key=lambda row: row.get("step", row.get("eta")))[kind]

    def effect(rows: Rows) -> Effect:
        return Effect({seed: float(np.mean([last(f) for f in rows.fronts(a, seed)])
                                   - np.mean([last(f) for f in rows.fronts(b, seed)] if b is not None
                                             else [first(f) for f in rows.fronts(a, seed)]))
                       for seed in rows.seeds})
    return effect


def plain(line: str) -> Callable[[Rows], Effect]:
    """The effect of a line that is one number a seed: that number."""
    return lambda rows: Effect({seed: rows.value(line, seed) for seed in rows.seeds})


def curvature(line: str, kind: str) -> Callable[[Rows], Effect]:
    """The η² coefficient of a least-squares parabola through a number along the front, η from 0 to 1."""
    def effect(rows: Rows) -> Effect:
        found = {}
        for seed in rows.seeds:
            (front,) = rows.fronts(line, seed)
            points = [(row["eta"], row[kind]) for row in front if row["eta"] <= 1]
            found[seed] = float(np.polyfit(*np.array(points).T, 2)[0])
        return Effect(found)
    return effect


def under_the_chord(line: str, eta: float) -> Callable[[Rows], Effect]:
    """η · KL(1) − KL(η) at one η, in nats. (The least over several would be biased by their noise.)"""
    def effect(rows: Rows) -> Effect:
        found = {}
        for seed in rows.seeds:
            (front,) = rows.fronts(line, seed)
            kl = {row["eta"]: row["kl"] for row in front}
            found[seed] = eta * kl[1.0] - kl[eta]
        return Effect(found)
    return effect


def share(line: str | dict) -> Callable[[Rows], Effect]:
    """The share of the limit's area above θ_sft, up to 4 nats, that a line's front attains. A line with
    several iterations is one front of all of them."""
    def effect(rows: Rows) -> Effect:
        found = {}
        for seed in rows.seeds:
            limit = rows.limits[draw_of(seed)]
            fronts = rows.fronts(line, seed)
            found[seed] = float(np.mean([area(front) for front in fronts])) / limit_area(limit)
        return Effect(found)
    return effect


def limit_area(limit: Sequence[dict]) -> float:
    """The area of the limit above the reward of θ_sft, its first point, up to 4 nats. It is held flat past its last
    point, if that comes before."""
    return hypervolume([(p["kl"], p["reward"]) for p in limit], (KL_MAX, limit[0]["reward"]))


def line_of(line: Line, rows: Rows) -> str | dict:
    """A line, or the one that a function of the world names."""
    return line(rows.world) if callable(line) else line


def best_of_n_area(rows: Rows, seed: int) -> float:
    """The area of best-of-n of a seed's draw, above its first point, which is θ_sft (n = 1); its KL is an upper bound,
    so the area is a lower one."""
    points = rows.best_of_n[draw_of(seed)]
    return hypervolume([(p["kl"], p["reward"]) for p in points], (KL_MAX, points[0]["reward"]))
