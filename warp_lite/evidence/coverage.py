"""How often a 95 % interval holds the truth, by simulation: why verdicts use Student's t on the means of draws.

`python -m warp_lite.evidence.coverage` writes coverage.json beside this file. An effect is a mean shared by all,
plus what its draw of SFT policy and reward model adds, plus what its seed adds; draws spread `ratio` times as far
as seeds. Either part is normal, or skewed (an exponential).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from ..policies.randomness import generator
from ..storage.files import write_json

DRAWS, SEEDS, RATIOS, SHAPES = (4, 8, 16), (1, 2, 4), (0.0, 0.5, 1.0, 2.0, 4.0), ("normal", "skewed")
METHODS = ("Student's t on draw means", "cluster bootstrap-t", "hierarchical percentile bootstrap")
REPETITIONS, RESAMPLES = 2000, 400


def coverage(draws: int, seeds: int, ratio: float, shape: str, repetitions: int = REPETITIONS,
             resamples: int = RESAMPLES, seed: int = 0) -> dict[str, float]:
    """The share of simulated experiments whose interval holds the true mean, 0, for each of `METHODS`.

    draws: groups; seeds: values in each; ratio: spread of draws over that of seeds; shape: of `SHAPES`. The
    bootstraps resample draws; the percentile bootstrap seeds within them too. Its standard error is about
    sqrt(.05 · .95 / repetitions).
    """
    rng = generator(seed)
    deviate = rng.standard_normal if shape == "normal" else lambda size: rng.standard_exponential(size) - 1
    held = np.zeros(len(METHODS))
    for _ in range(repetitions):
        values = ratio * deviate((draws, 1)) + deviate((draws, seeds))
        means = values.mean(1)
        mean, error = means.mean(), means.std(ddof=1) / np.sqrt(draws)
        picked = rng.integers(draws, size=(resamples, draws))
        again = means[picked]
        spread = again.std(1, ddof=1) / np.sqrt(draws)
        usable = spread > 1e-12  # a resample of one draw alone has no spread
        t_low, t_high = np.quantile((again.mean(1)[usable] - mean) / spread[usable], [0.025, 0.975])
        within = rng.integers(seeds, size=(resamples, draws, seeds))
        low, high = np.quantile(values[picked[:, :, None], within].mean((1, 2)), [0.025, 0.975])
        half = stdtrit(draws - 1, 0.975) * error
        held += [abs(mean) <= half, mean - t_high * error <= 0 <= mean - t_low * error, low <= 0 <= high]
    return {name: float(share) for name, share in zip(METHODS, held / repetitions)}


def main() -> None:
    """Simulate every cell and write coverage.json."""
    cells = [{"draws": draws, "seeds": seeds, "ratio": ratio, "shape": shape, **coverage(draws, seeds, ratio, shape)}
             for draws, seeds, ratio, shape in product(DRAWS, SEEDS, RATIOS, SHAPES)]
    write_json(Path(__file__).parent / "coverage.json", {"repetitions": REPETITIONS, "cells": cells})
    for shape, draws, method in product(SHAPES, DRAWS, METHODS):
        shares = [cell[method] for cell in cells if (cell["shape"], cell["draws"]) == (shape, draws)]
        print(f"{shape:7} {draws:3} draws  {method:34} covers {min(shares):.1%} to {max(shares):.1%}")


if __name__ == "__main__":
    main()
