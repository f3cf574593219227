"""A law that says how much merging gains, from the angle between two short runs; it can be wrong, and is tested.

The law is of a reward that is linear and a KL that is quadratic in the weights. A task vector is signal, alike in all
runs, and noise, which is not; ρ = cos of the angle between two of them is the signal's share of their squared length.
Merging M leaves a share ρ / (ρ + (1 − ρ) / M). The reward at a KL k is proportional to √k times the root of that
share, so merging gains c √k · G(ρ) with G(ρ) = √(ρ / (ρ + (1 − ρ) / M)) − √ρ. Signal grows as the steps and noise as
their root, were nothing to hold them back, so that the odds ρ / (1 − ρ) of two short runs grow with the steps: as
their power α. c and α are fitted; ρ of two short runs is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..policies.randomness import generator
from .settings import NOISE_GRID, SHORT

MERGED = NOISE_GRID[0].runs


def share_of_signal(short_angle: np.ndarray | float, steps: np.ndarray | float, alpha: float) -> np.ndarray:
    """ρ of runs of so many steps, from the angle in degrees of two runs of `SHORT` steps: its odds grow as the power
    α of the steps. An angle of 90° or more has none."""
    rho = np.clip(np.cos(np.deg2rad(short_angle)), 1e-6, 1 - 1e-6)
    odds = rho / (1 - rho) * (np.asarray(steps) / SHORT) ** alpha
    return odds / (1 + odds)


def merging_gain(rho: np.ndarray | float, merged: int = MERGED) -> np.ndarray:
    """G(ρ): what merging so many runs adds to the root of the signal's share. 0 at ρ = 0 and ρ = 1."""
    rho = np.asarray(rho)
    return np.sqrt(rho / (rho + (1 - rho) / merged)) - np.sqrt(rho)


@dataclass(frozen=True)
class Law:
    """The gain of merging at a KL, c √KL · G(ρ), with ρ from the angle of two short runs."""

    c: float      # reward per root of a nat
    alpha: float

    def gain(self, short_angle: np.ndarray | float, steps: np.ndarray | float, kl: np.ndarray | float,
             merged: int = MERGED) -> np.ndarray:
        """The reward that merging adds at `kl` nats, over single runs of so many steps."""
        return self.c * np.sqrt(kl) * merging_gain(share_of_signal(short_angle, steps, self.alpha), merged)

    def mean_gain(self, cells: Sequence[dict]) -> np.ndarray:
        """The gain of cells in the mean over KL from 0 to the reach of each, as `noise` measures it."""
        angle, steps, reach = (np.array([cell[name] for cell in cells]) for name in ("short angle", "steps", "reach"))
        return self.gain(angle, steps, reach) * 2 / 3  # the mean of √k over 0 … reach is ⅔ √reach


def fit_law(cells: Sequence[dict]) -> Law:
    """The law with the least squared error of the mean gains of cells, among α from −2 to 4 in steps of .05."""
    gains = np.array([cell["gain"] for cell in cells])

    def fitted(alpha: float) -> tuple[float, Law]:
        shape = Law(1.0, alpha).mean_gain(cells)
        c = float(shape @ gains / (shape @ shape))
        return float(np.square(gains - c * shape).sum()), Law(c, alpha)

    return min((fitted(alpha) for alpha in np.arange(-40, 81) / 20), key=lambda pair: pair[0])[1]


def fitting_cells(cell: dict) -> bool:
    """Whether a cell is of the half that the law is fitted on: every other, as the black fields of a chessboard."""
    batches, rates = (sorted({getattr(config, name) for config in NOISE_GRID}) for name in ("batch_size", "lr"))
    return (batches.index(cell["batch"]) + rates.index(cell["lr"])) % 2 == 0


def quality_of(predicted: np.ndarray, gains: np.ndarray) -> dict[str, float]:
    """R² and Spearman's correlation of predicted gains with those measured."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (predicted, gains)]
    error, spread = np.square(gains - predicted).sum(), np.square(gains - gains.mean()).sum()
    return {"r_squared": float(1 - error / spread), "rank_correlation": float(np.corrcoef(*ranks)[0, 1])}


def tested_law(rows_by_world: Mapping[str, Sequence[dict]], fitted_in: str, resamples: int = 1000) -> dict:
    """The law fitted on half of the cells of one world, and how well it says the gains of the other half there and of
    all cells of every other world: R² and rank correlation, with 95 % intervals over resampled draws.

    Rows are those of `noise` with their `draw`. Cells are means over rows. Draws are resampled in every world, and the
    law fitted again each time, so that an interval has what is uncertain of fit and test.
    """
    draws = {world: sorted({row["draw"] for row in rows}) for world, rows in rows_by_world.items()}
    by_draw = {world: {draw: [row for row in rows if row["draw"] == draw] for draw in draws[world]}
               for world, rows in rows_by_world.items()}
    rng = generator(0)

    def test(picked: Mapping[str, Sequence[int]]) -> tuple[Law, dict[str, dict[str, float]]]:
        cells = {world: mean_cells([row for draw in some for row in by_draw[world][draw]])
                 for world, some in picked.items()}
        law = fit_law([cell for cell in cells[fitted_in] if fitting_cells(cell)])
        tests = {"other half": [cell for cell in cells[fitted_in] if not fitting_cells(cell)],
                 **{world: of_world for world, of_world in cells.items() if world != fitted_in}}
        return law, {name: quality_of(law.mean_gain(some), np.array([cell["gain"] for cell in some]))
                     for name, some in tests.items()}

    law, found = test(draws)
    again = [test({world: rng.choice(some, len(some)) for world, some in draws.items()}) for _ in range(resamples)]

    def with_interval(value: float, values: list[float]) -> dict[str, float]:
        low, high = np.quantile(values, [0.025, 0.975])
        return {"value": round(value, 4), "ci_low": round(float(low), 4), "ci_high": round(float(high), 4)}

    return {"fitted_in": fitted_in, "short_steps": SHORT,
            "c": with_interval(law.c, [one.c for one, _ in again]),
            "alpha": with_interval(law.alpha, [one.alpha for one, _ in again]),
            "tests": {name: {measure: with_interval(value, [qualities[name][measure] for _, qualities in again])
                             for measure, value in measures.items()} for name, measures in found.items()}}


def mean_cells(rows: Sequence[dict]) -> list[dict]:
    """The cells of batch × learning rate: means over rows."""
    by_cell: dict[tuple[int, float], list[dict]] = {}
    for row in rows:
        by_cell.setdefault((row["batch"], row["lr"]), []).append(row)
    return [{"batch": batch, "lr": lr, **{name: float(np.mean([row[name] for row in some]))
                                          for name in ("gain", "reach", "short angle", "steps")}}
            for (batch, lr), some in sorted(by_cell.items())]
