"""What M workers gain in waiting time: merged at the end, against one run that shares the batch at every step.

Both spend the same completions in the same number of sequential steps. Workers that are merged exchange their weights
once; those that share a batch exchange gradients after every step, and learn more from each. Which waits less depends
on what an exchange costs, in units of the time of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import sqrt

import numpy as np

from ..averaging.slerp import slerp
from ..averaging.state_dicts import Weights
from .bench import Bench
from .effects import Effect, Rows
from .settings import ETAS, area
from .tuned import asks

STEPS = 200
WORKERS, BATCHES = (4, 8), (4, 2)  # how many, and of how many completions a step each
MERGED, SHARED = "merged", "shared batch"


@asks("one iteration", "batch of 16", "batch of 32")
def waiting(bench: Bench) -> list[dict]:
    """Workers merged at the end, and one run of their batches together, at every 50 steps up to 200.

    Settings are those chosen for one iteration and for batches of 16 and 32; the two batch sizes that nothing was
    chosen for take the learning rate of twice the batch, divided by √2. Lines, with `steps`: `merged`, with `workers`
    and `batch` of each, and `shared batch`, with `completions` a step.
    """
    merged, shared = bench.tuned("one iteration"), bench.tuned("batch of 16")
    configs = {(MERGED, 4): merged.replace(runs=max(WORKERS)),
               (MERGED, 2): merged.replace(runs=max(WORKERS), batch_size=2, lr=merged.lr / sqrt(2)),
               (SHARED, 8): shared.replace(batch_size=8, lr=shared.lr / sqrt(2)),
               (SHARED, 16): shared, (SHARED, 32): bench.tuned("batch of 32")}
    kept: dict[tuple, dict[int, Weights]] = {}

    def keep(name, seed, iteration, run, step, weights):
        kept.setdefault((name, seed, min(step, STEPS)), {})[run] = weights

    bench.train({name: config.replace(steps=STEPS, eval_every=50) for name, config in configs.items()},
                checkpoints=keep)
    lines: list[tuple[dict, Weights]] = []
    for ((line, batch), seed, steps), by_run in kept.items():
        if line == SHARED:
            lines.append(({"line": line, "seed": seed, "steps": steps, "completions": batch}, by_run[1]))
            continue
        lines += [({"line": line, "seed": seed, "steps": steps, "workers": M, "batch": batch},
                   slerp(bench.sft, [by_run[m] for m in range(1, M + 1)])) for M in WORKERS]
    return bench.fronts(lines, ETAS)


def areas_by_steps(rows: Rows, which: dict, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps taken, from 0 on, and the areas of the fronts up to 4 nats that a line has after them."""
    taken = sorted({row["steps"] for row in rows.by_line[which["line"]]})
    reached = [area(rows.fronts({**which, "steps": steps}, seed)[0]) for steps in taken]
    return np.array([0, *taken]), np.array([0.0, *reached])


def both(workers: int, batch: int) -> tuple[dict, dict]:
    """The lines of merged workers and of one run of their batches together."""
    return ({"line": MERGED, "workers": workers, "batch": batch}, {"line": SHARED, "completions": workers * batch})


def at_the_end(workers: int, batch: int) -> Callable[[Rows], Effect]:
    """The area of the merged workers' front less that of the shared batch, after all steps."""
    merged, shared = both(workers, batch)
    return lambda rows: Effect({seed: float(areas_by_steps(rows, merged, seed)[1][-1]
                                            - areas_by_steps(rows, shared, seed)[1][-1]) for seed in rows.seeds})


def break_even(workers: int, batch: int) -> Callable[[Rows], Effect]:
    """What an exchange must cost, in times of a step, for merged workers to wait less than a shared batch does for the
    same area: the steps that they take longer over the exchanges that they save. 0 where they take no longer."""
    merged, shared = both(workers, batch)

    def effect(rows: Rows) -> Effect:
        return Effect({seed: cost_of_exchange(*areas_by_steps(rows, shared, seed),
                                              areas_by_steps(rows, merged, seed)[1][-1]) for seed in rows.seeds})
    return effect


def cost_of_exchange(steps: np.ndarray, areas: np.ndarray, wanted: float) -> float:
    """The cost of an exchange at which a run that exchanges at every step and one that does so once, and has the area
    `wanted` after as many steps, wait equally long. `areas` are those of the first after `steps`, straight between."""
    reached = np.maximum.accumulate(areas)
    needed = float(np.interp(wanted, reached, steps)) if wanted < reached[-1] else float(steps[-1])
    return (steps[-1] - needed) / max(needed - 1, 1)


CASES = tuple(product(WORKERS, BATCHES))
