"""The noise map: what merging gains over batch size and learning rate, and what predicts it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..averaging.slerp import slerp
from ..averaging.state_dicts import Weights
from ..evaluation.front import reward_at_kl
from ..policies.randomness import generator
from .bench import Bench
from .settings import ETAS, NOISE_GRID, SHORT
from .studies import geometry

PREDICTORS = ("noise over signal", "angle", "noise scale", "short angle")


def noise(bench: Bench) -> list[dict]:
    """M = 4 runs in each cell of batch × learning rate.

    A row a cell and seed: `gain`, the mean over KL of the reward of LITI of the merge less the mean of
    LITI of the single runs, from 0 to the KL that all five fronts reach; `reach`, that KL; `angle`,
    degrees; `noise scale` of the last policy's gradient, completions; `noise over signal`, the same
    over the batch size; `short angle`, that of two runs of `SHORT` steps; `steps`, of the runs.
    """
    names = [f"{config.batch_size}, {config.lr:g}" for config in NOISE_GRID]
    short = {name: config.replace(runs=2, steps=SHORT) for name, config in zip(names, NOISE_GRID)}
    experiment, first = bench.train(dict(zip(names, NOISE_GRID))), bench.train(short)
    rows = []
    for name, config in zip(names, NOISE_GRID):
        for seed, result, start in zip(bench.seeds, experiment.results[name], first.results[name]):
            found = result.iterations[0]
            lines = [({"run": m}, policy) for m, policy in enumerate([slerp(result.sft, found.policies),
                                                                      *found.policies])]
            points = bench.fronts(lines, ETAS)
            fronts = [[row for row in points if row["run"] == m] for m in range(len(lines))]
            gain, reach = mean_gain(fronts[0], fronts[1:])
            scale = float(np.mean([bench.noise_scale(policy, anchor, config.beta, (seed, m)) for m, (policy, anchor)
                                   in enumerate(zip(found.policies[:2], found.anchors[:2]))]))
            angle, short_angle = (angle_between(result.sft, policies, seed)
                                  for policies in (found.policies, start.iterations[0].policies))
            rows.append({"batch": config.batch_size, "lr": config.lr, "seed": seed, "gain": round(gain, 5),
                         "reach": round(reach, 4), "angle": round(angle, 3), "noise scale": min(scale, 1e6),
                         "noise over signal": min(scale, 1e6) / config.batch_size,
                         "short angle": round(short_angle, 3), "steps": config.steps})
    return rows


def angle_between(init: Weights, policies: list[Weights], seed: int) -> float:
    """The mean angle between task vectors over weight matrices, in degrees."""
    return next(row["value"] for row in geometry(init, policies, seed) if row["line"] == "angle")


def mean_gain(merged: Sequence[dict], singles: Sequence[Sequence[dict]]) -> tuple[float, float]:
    """The mean over KL of one front less the mean of others, from 0 to the KL that all reach; and that KL."""
    reach = min(max(point["kl"] for point in front) for front in (merged, *singles))
    grid = np.linspace(0, reach, 41)[1:]
    gains = [reward_at_kl(merged, kl) - np.mean([reward_at_kl(front, kl) for front in singles]) for kl in grid]
    return float(np.mean(gains)), reach


def correlations(rows: Sequence[dict], draws: Sequence[int], resamples: int = 2000) -> dict[str, dict]:
    """Spearman's correlation over the cells between the mean gain and each predictor, with 95 % intervals.

    Draws of the world are resampled, then seeds within each; cells are those of the grid. `draws` has
    each row's draw.
    """
    cells = sorted({(row["batch"], row["lr"]) for row in rows})
    by_seed: dict[tuple, dict[tuple, dict]] = {}
    for row, draw in zip(rows, draws):
        by_seed.setdefault((draw, row["seed"]), {})[row["batch"], row["lr"]] = row
    names = ("gain", *PREDICTORS)
    values = np.array([[[some[cell][name] for cell in cells] for name in names] for some in by_seed.values()])
    drawn = [draw for draw, _ in by_seed]
    groups = [[i for i, draw in enumerate(drawn) if draw == group] for group in dict.fromkeys(drawn)]
    rng = generator(0)

    def spearman(some: np.ndarray) -> np.ndarray:
        middle = np.median(some, 0)  # of seeds: a noise scale has a long tail
        ranks = np.argsort(np.argsort(middle, 1), 1).astype(float)
        return np.array([np.corrcoef(ranks[0], ranks[k])[0, 1] for k in range(1, len(names))])

    found = []
    for _ in range(resamples):
        picked = [groups[g] for g in rng.integers(len(groups), size=len(groups))]
        seeds = [group[i] for group in picked for i in rng.integers(len(group), size=len(group))]
        found.append(spearman(values[seeds]))
    low, high = np.quantile(found, [0.025, 0.975], 0)
    return {name: {"correlation": float(c), "ci_low": float(a), "ci_high": float(b), "cells": len(cells)}
            for name, c, a, b in zip(PREDICTORS, spearman(values), low, high)}
