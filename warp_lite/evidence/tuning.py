"""Settings chosen on seeds and draws of their own, which no reported verdict uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ..config import WarpConfig
from .bench import TUNING_SEEDS, Bench, draw_of
from .settings import ANCHORS, EQUAL, ETAS, LARGE, TRACED, WEAK, WEAK_ETAS, WIDE, area

# What is tried. A choice at the edge of it is named (wording.py).
ANCHOR_BETAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # of either anchor
EQUAL_LRS, EQUAL_BETAS = (3.75e-5, 7.5e-5, 1.5e-4, 3e-4, 6e-4, 1.2e-3), (0.075, 0.15, 0.3, 0.6, 1.2, 2.4)
WEAK_LRS = (2e-5, 4e-5, 8e-5, 1.5e-4, 3e-4, 7e-4, 1.5e-3, 3e-3)
LARGE_BETAS = (0.15, 0.3, 0.6, 1.2)
PARTS = ("anchors", "equal", "plain", "weak", "best")  # each a study of its own
WAYS = ("anchors", "plain")  # parts that are measured on the ways of their runs
WEAK_PURPOSES = [f"{name}, β = {beta:g}" for beta in (0.0, 0.01) for name in ("merged", "batch of 32")]


def grids(part: str | None = None) -> dict[str, dict[str, WarpConfig]]:
    """The settings that are tried, by what they are for and by name; of one part of them, or of all."""
    found: dict[str, dict[str, dict[str, WarpConfig]]] = {"anchors": {
        f"{anchor.upper()} anchor": {f"β={beta:g}": ANCHORS.replace(beta=beta, anchor=anchor) for beta in ANCHOR_BETAS}
        for anchor in ("ema", "sft")}}
    for part_of, traced in (("equal", False), ("plain", True)):
        found[part_of] = {name: {f"lr={lr:g}, β={beta:g}": config.replace(lr=lr, beta=beta)
                                 for lr in EQUAL_LRS for beta in EQUAL_BETAS}
                          for name, config in EQUAL.items() if (name in TRACED) == traced}
    found["weak"] = {f"{name}, β = {beta:g}": {f"lr={lr:g}": config.replace(lr=lr, beta=beta)
                                               for lr in WEAK_LRS}
                     for beta in (0.0, 0.01) for name, config in (("merged", WEAK), ("batch of 32", WIDE))}
    found["best"] = {"best WARP": {f"β={beta:g}": LARGE.replace(beta=beta) for beta in LARGE_BETAS}}
    if part is not None:
        return found[part]
    return {purpose: some for purposes in found.values() for purpose, some in purposes.items()}


def tuning(bench: Bench, part: str) -> list[dict]:
    """A row for each purpose and setting of a part, with its score for each seed of this draw.

    The score is the area of the front up to 4 nats; of the ways of `WAYS` that of the trajectory; under weak
    regularisation how much gold reward is left. None where a front does not get as far as is asked.
    """
    configs = {(purpose, name): config if part in WAYS else config.replace(eval_every=0)
               for purpose, some in grids(part).items() for name, config in some.items()}
    experiment = bench.train(configs, traced=1)
    rows = []
    for (purpose, name), results in experiment.results.items():
        if part in WAYS:
            found = bench.trajectories(experiment, (purpose, name), name)
        else:
            found = bench.fronts([({"seed": seed}, result.iterations[-1].merged)
                                  for seed, result in zip(bench.seeds, results)],
                                 WEAK_ETAS if purpose in WEAK_PURPOSES else ETAS)
        measure = gold_kept if purpose in WEAK_PURPOSES else area
        fronts = [[row for row in found if row["seed"] == seed] for seed in bench.seeds]
        rows.append({"purpose": purpose, "name": name, "scores": [measure(front) for front in fronts]})
    return rows


def gold_kept(front: list[dict], upto: float = 1.6) -> float | None:
    """The mean gold reward while the proxy reward of a front rises to `upto`; None where it does not get there."""
    proxy, gold = (np.array([row[kind] for row in front]) for kind in ("reward", "gold"))
    reached = np.maximum.accumulate(proxy)
    if reached[-1] < upto:
        return None
    return float(np.interp(np.linspace(max(proxy[0], 0), upto, 33), reached, gold).mean())


def choose(scores: Mapping[str, list[float | None]]) -> str:
    """The name with the highest mean score, among those that have one for every seed.

    Raises ValueError where none has.
    """
    whole = {name: float(np.mean(of_name)) for name, of_name in scores.items() if None not in of_name}
    if not whole:
        raise ValueError(f"none of {', '.join(scores)} has a score for every seed; widen the grid")
    return max(whole, key=whole.get)


def chosen_settings(rows: list[dict]) -> dict[str, dict]:
    """What tuned.json holds of a world: the setting chosen for each purpose, and every score."""
    found = {}
    for purpose, configs in grids().items():
        scores: dict[str, list[float | None]] = {}
        for row in rows:
            if row["purpose"] == purpose:
                scores.setdefault(row["name"], []).extend(row["scores"])
        name = choose(scores)
        found[purpose] = {"chosen": name, "config": dataclasses.asdict(configs[name]), "seeds": list(TUNING_SEEDS),
                          "draws": [draw_of(seed) for seed in TUNING_SEEDS],
                          "scores": {n: None if None in s else round(float(np.mean(s)), 4) for n, s in scores.items()}}
    return found
