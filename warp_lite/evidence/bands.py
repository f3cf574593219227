"""Curves with bands: what the draws come to at one KL, or at one proxy reward, and how sure that is.

Claims compare at one KL, and so do these curves. A mean over seeds at each η would not: seeds stand at other KLs there,
and the mean of points on a bent curve does not lie on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..evaluation.front import reward_at_kl
from ..evaluation.statistics import t_interval
from ..storage.files import write_bytes
from .bench import draw_of
from .effects import Rows, gold_at_proxy

LEVELS = 41  # of a curve, evenly from where all of its fronts have begun to where the first of them ends
NUMBERS = ("reward", "gold", "length", "perplexity")


def banded(rows: Rows, line: str | dict, x: str = "kl") -> list[dict]:
    """A line of a study as points: the level of `x` ("kl", in nats, or "reward", the proxy's), and for every number
    that its rows have (at a proxy reward for gold alone) the mean and half of its 95 % interval, Student's t on draws.

    Levels end where the first front of any seed ends, so that each mean is over the same seeds: there are no points if
    that is before another begins. Raises KeyError for a line that the study does not have.
    """
    fronts = {seed: rows.fronts(line, seed) for seed in rows.seeds}
    every = [[row[x] for row in front] for of_seed in fronts.values() for front in of_seed]
    start, end = max(values[0] for values in every), min(map(max, every))
    if start >= end:
        return []
    first, draws, points = next(iter(fronts.values()))[0][0], [draw_of(seed) for seed in fronts], []
    names = [name for name in NUMBERS if name in first] if x == "kl" else ["gold"]
    for level in np.linspace(start, end, LEVELS):
        point: dict[str, float | list[float]] = {x: round(float(level), 4)}
        for name in names:
            values = [np.mean([gold_at_proxy(front, level) if x == "reward" else reward_at_kl(front, level, name)
                               for front in of_seed]) for of_seed in fronts.values()]
            interval = t_interval(values, draws)
            point[name] = [round(float(number), 4) for number in (interval.mean, interval.high - interval.mean)]
        points.append(point)
    return points


def all_banded(curves: Sequence[dict], evidence: Mapping[tuple[str, str], Rows]) -> list[dict]:
    """The curves of a report, which have a `world`, `study` and `line`, with the points of `banded`. Those of weak
    regularisation, which claims compare at one proxy reward, have their levels there."""
    made = []
    for curve in curves:
        x = "reward" if curve["study"] == "weak" else "kl"
        made.append({**{name: curve[name] for name in ("world", "study", "line")}, "x": x,
                     "points": banded(evidence[curve["world"], curve["study"]], curve["line"], x)})
    return made


def write_bands(found: dict, evidence: Mapping[tuple[str, str], Rows], path: Path) -> None:
    """The file bands.json: the curves of a report with their bands, a line each, and what made their rows.

    `found` is what claims.json holds. Raises CannotWrite.
    """
    lines = ",\n".join(json.dumps(curve, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
                       for curve in all_banded(found["curves"], evidence))
    about = {name: found[name] for name in ("seeds", "draws", "level", "provenance")}
    head = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in about.items())
    write_bytes(path, f"{{\n{head}\"curves\": [\n{lines}\n]}}\n".encode())
