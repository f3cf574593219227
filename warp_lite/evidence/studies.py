"""What is trained and measured for the claims: a study each, on one draw of a world at a time.

A study returns rows; which lines it has is said in its docstring. Fronts are LITI from θ_sft unless
a line says otherwise, and η = 0 is θ_sft.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..averaging.liti import liti
from ..averaging.slerp import angles, lerp, slerp, task_vector
from ..averaging.state_dicts import Weights
from ..evaluation.limit import best_of_n_front, optimal_front
from ..policies.prompts import Prompts
from ..rewards.bradley_terry import BradleyTerry
from ..worlds.reviews import reviews_world
from .bench import Bench
from .settings import ANCHORS, BEYOND, EQUAL, ETAS, NOISY, PAST_ETAS, REFRESH, TRACED, WEAK_ETAS
from .tuned import asks


def merging(bench: Bench) -> list[dict]:
    """Five runs in the noisy setting, and every way to merge them.

    Lines: `run` (each alone), `trajectory` (of runs 1 and 2), `anchor` and `average` (of the same: the moving
    average, and the mean of the checkpoints of the second half, every ten steps), `slerp-M` and `lerp-M` for M = 2 … 5;
    `angle` in degrees and `norm` of SLERP and of LERP as a share of the mean norm, M = 2, as values.
    """
    kept: dict[tuple, list[Weights]] = {}
    config = NOISY.replace(runs=5, eval_every=10 if bench.wants("trajectory", "average") else 0)

    def keep(name, seed, iteration, run, step, weights):
        if step % 10 == 0 and 2 * step >= config.steps:
            kept.setdefault((seed, run), []).append(weights)

    experiment = bench.train({"runs": config}, checkpoints=keep, traced=2)
    rows = bench.trajectories(experiment, "runs", "trajectory")
    lines: list[tuple[dict, Weights]] = []
    beyond: list[tuple[dict, Weights]] = []
    for seed, result in zip(bench.seeds, experiment.results["runs"]):
        found = result.iterations[0]
        for m, policy in enumerate(found.policies, 1):
            lines.append(({"line": "run", "seed": seed, "run": m}, policy))
        for m in (1, 2):
            lines.append(({"line": "anchor", "seed": seed, "run": m}, found.anchors[m - 1]))
            if bench.wants("average"):
                lines.append(({"line": "average", "seed": seed, "run": m}, lerp(result.sft, kept[seed, m])))
        for M in (2, 3, 4, 5):
            lines.append(({"line": f"slerp-{M}", "seed": seed}, slerp(result.sft, found.policies[:M])))
            beyond.append(({"line": f"lerp-{M}", "seed": seed}, lerp(result.sft, found.policies[:M])))
        rows += geometry(result.sft, found.policies, seed)
    return rows + bench.fronts(lines, ETAS) + bench.fronts(beyond, BEYOND)


def geometry(init: Weights, policies: list[Weights], seed: int) -> list[dict]:
    """Values of one seed: mean angle between task vectors over weight matrices, and norms of two-policy merges."""
    matrices = [name for name, tensor in init.items() if tensor.dim() > 1]
    degrees = angles(init, policies)
    apart = ~torch.eye(len(policies), dtype=torch.bool)
    rows = [{"line": "angle", "seed": seed,
             "value": float(torch.stack([degrees[name][apart].mean() for name in matrices]).mean())}]
    norms = [[task_vector(theta, init)[name].norm() for name in matrices] for theta in policies[:2]]
    for label, merge in (("norm of SLERP", slerp), ("norm of LERP", lerp)):
        merged = task_vector(merge(init, policies[:2]), init)
        ratios = [2 * merged[name].norm() / (a + b) for name, a, b in zip(matrices, *norms)]
        rows.append({"line": label, "seed": seed, "value": float(torch.stack(ratios).mean())})
    return rows


@asks("SFT anchor")
def iterations(bench: Bench) -> list[dict]:
    """Algorithm 1 and each stage left out in turn, M = 4.

    Lines: `WARP` (iterations 1 to 3), `toward init` (iteration 2, Fig. 17), and at iteration 2
    `without EMA` (an SFT anchor, best β), `without SLERP` (one run), `LERP`, `without LITI` (the next
    iteration starts from the merge), `η = 0.5` and `mixed η` (two runs from each, Fig. 16).
    """
    def apart(result, m):
        last = result.iterations[-1]
        return liti(last.init, last.merged, 0.3 if m <= 2 else 0.5)

    two = NOISY.replace(iterations=2)
    configs = {"WARP": NOISY.replace(iterations=3), "LERP": two.replace(merge="lerp"),
               "without EMA": two.replace(anchor="sft", beta=bench.tuned("SFT anchor").beta),
               "without SLERP": two.replace(runs=1, merge="none"), "without LITI": two.replace(eta=1.0),
               "η = 0.5": two.replace(eta=0.5), "mixed η": two}
    experiment = bench.train(configs, starts={"mixed η": apart})
    lines = []
    for name, results in experiment.results.items():
        for seed, result in zip(bench.seeds, results):
            for i in (1, 2, 3) if name == "WARP" else (2,):
                lines.append(({"line": name, "seed": seed, "iteration": i}, result.iterations[i - 1].merged))
    rows = bench.fronts(lines, ETAS)
    if not bench.wants("toward init"):
        return rows
    places = [(seed, eta, result) for seed, result in zip(bench.seeds, experiment.results["WARP"])
              for eta in (0.0, *ETAS)]
    measured = bench.measure([result.weights(eta, 2, "init") for _, eta, result in places])
    return rows + [{"line": "toward init", "seed": seed, "eta": eta, **row}
                   for (seed, eta, _), row in zip(places, measured)]


@asks("EMA anchor", "SFT anchor")
def anchors(bench: Bench) -> list[dict]:
    """Trajectories of one long run a seed under each anchor.

    Lines: `EMA`, `EMA, half μ`, `EMA, double β`, `SFT` (each anchor with the β chosen for it), and `no KL`.
    """
    best = bench.tuned("EMA anchor")
    configs = {"EMA": best, "EMA, half μ": best.replace(mu=best.mu / 2),
               "EMA, double β": best.replace(beta=2 * best.beta), "no KL": ANCHORS.replace(anchor="none")}
    configs["SFT"] = bench.tuned("SFT anchor")
    experiment = bench.train(configs, traced=1)
    return [row for name in configs for row in bench.trajectories(experiment, name, name)]


@asks(*EQUAL)
def equal(bench: Bench) -> list[dict]:
    """The same number of completions spent in each way, every one with its own best lr and β.

    Lines: the names of `EQUAL`, those of `TRACED` as trajectories, and `checkpoint average` (of the long run, second
    half); fronts with perplexity.
    """
    kept: dict[int, list[Weights]] = {}
    configs = {name: bench.tuned(name) for name in EQUAL}

    def keep(name, seed, iteration, run, step, weights):
        if name == "one long run" and 2 * step >= configs[name].steps:
            kept.setdefault(seed, []).append(weights)

    experiment = bench.train(configs, checkpoints=keep, traced=1)
    lines = [({"line": name, "seed": seed}, result.iterations[-1].merged)
             for name, results in experiment.results.items() if name not in TRACED
             for seed, result in zip(bench.seeds, results)]
    lines += [({"line": "checkpoint average", "seed": seed}, lerp(bench.sft, kept[seed])) for seed in bench.seeds]
    return bench.fronts(lines, ETAS, texts=True) + [
        row for name in TRACED for row in bench.trajectories(experiment, name, name)]


def limit(bench: Bench) -> list[dict]:
    """The limit and best-of-n of this draw. Lines: `limit`, from θ_sft on (β → ∞, the mean of all samples), and
    `best of n` (its KL is an upper bound)."""
    rewards, gold = bench.limit_rewards()
    betas = np.geomspace(20, 0.04, 34) * rewards.std().item()
    bound = optimal_front(rewards=rewards, gold=gold, betas=betas)
    best_of_n = best_of_n_front(rewards=rewards)
    sft = {"beta": None, "kl": 0.0, "reward": rewards.mean().item(), "gold": gold.mean().item()}
    return [*({"line": "limit", "seed": None, **point} for point in (sft, *bound)),
            *({"line": "best of n", "seed": None, "kl": point["kl_bound"], **point} for point in best_of_n)]


def rewards(bench: Bench) -> list[dict]:
    """Two runs merged, of the same and of different rewards; M = 2, batches of 8, 160 steps.

    Lines: `plain`, `penalised` (both, by length), `one of each`; `second reward` (both runs trained
    by another reward model) and `two rewards` (one run of each). All are measured by the first reward.
    """
    config = NOISY.replace(runs=2, steps=160, batch_size=8, beta=0.1)
    first = bench.world.reward
    second = reviews_world(seed=bench.draw, taste=bench.taste, reward_seed=1, progress=False).reward
    penalised = LengthPenalty(first, 0.1)
    pairs = {"plain": [first, first], "penalised": [penalised, penalised], "one of each": [first, penalised],
             "second reward": [second, second], "two rewards": [first, second]}
    # a run's random numbers belong to its number, so the second run of each pair is the one that differs
    experiment = bench.train({name: config for name in pairs}, rewards=pairs)
    return bench.fronts([({"line": name, "seed": seed}, result.iterations[0].merged)
                         for name, results in experiment.results.items()
                         for seed, result in zip(bench.seeds, results)], ETAS)


class LengthPenalty:
    """A reward less a price for each token of the completion (the paper's appendix D.1)."""

    def __init__(self, reward: BradleyTerry, price: float):
        self.reward, self.price, self.tokenizer = reward, price, reward.tokenizer

    def from_ids(self, prompts: Prompts, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards (…) of completions ids (…, T), mask 1 up to their end, of prompts (…, P)."""
        return self.reward.from_ids(prompts, ids, mask) - self.price * mask.sum(-1)


def refresh(bench: Bench) -> list[dict]:
    """β in place of LITI: two iterations anchored to their init (a refreshed base), no step back, and the merges of
    several β and learning rates as the front. Lines: `WARP`; `refreshed base` (a point a setting, with `lr` and `beta`,
    and θ_sft)."""
    two = NOISY.replace(iterations=2)
    configs = {setting: two.replace(mu=0.0, eta=1.0, lr=setting[0], beta=setting[1]) for setting in REFRESH}
    results = bench.train({"WARP": two, **configs}).results
    merged = [(name, seed, result.iterations[-1].merged) for name, of_seeds in results.items()
              for seed, result in zip(bench.seeds, of_seeds)]
    rows = bench.fronts([({"line": "WARP", "seed": seed}, theta) for name, seed, theta in merged if name == "WARP"],
                        ETAS)
    others = [(name, seed, theta) for name, seed, theta in merged if name != "WARP"]
    if not bench.wants("refreshed base"):
        return rows
    starts = [{**row, "line": "refreshed base"} for row in rows if row["eta"] == 0]
    return rows + starts + [{"line": "refreshed base", "seed": seed, "lr": lr, "beta": beta, "eta": 1.0, **row}
                            for ((lr, beta), seed, _), row in zip(
                                others, bench.measure([theta for _, _, theta in others]))]


def outer(bench: Bench) -> list[dict]:
    """LITI as an outer step of rate η on the averaged task vector (DiLoCo), with and without momentum:
    four iterations of 40 steps, LERP. Lines: `η = 0.5`, `η = 1`, `momentum` (η = 0.5, 0.5 of the last step)."""
    config = NOISY.replace(iterations=4, steps=40, merge="lerp", eta=0.5)

    def heavy_ball(result, m):
        last, before = result.iterations[-1], result.iterations[max(0, len(result.iterations) - 2)]
        step = liti(last.init, last.merged, 0.5)
        return {name: tensor + 0.5 * (last.init[name] - before.init[name]) for name, tensor in step.items()}

    experiment = bench.train({"η = 0.5": config, "η = 1": config.replace(eta=1.0), "momentum": config},
                             starts={"momentum": heavy_ball})
    return bench.fronts([({"line": name, "seed": seed}, result.iterations[-1].merged)
                         for name, results in experiment.results.items()
                         for seed, result in zip(bench.seeds, results)], ETAS)


@asks("merged, β = 0", "batch of 32, β = 0", "merged, β = 0.01", "batch of 32, β = 0.01")
def weak(bench: Bench) -> list[dict]:
    """Weak regularisation at equal samples: four runs of batches of 8, merged, against one of batches of 32.

    Lines, with `beta`: `run` (each alone), `slerp`, `lerp`, `batch of 32` (its learning rate tuned).
    """
    configs = {}
    for beta in (0.0, 0.01):
        configs[beta, "runs"] = bench.tuned(f"merged, β = {beta:g}")
        configs[beta, "wide"] = bench.tuned(f"batch of 32, β = {beta:g}")
    experiment = bench.train(configs)
    lines = []
    for (beta, kind), results in experiment.results.items():
        for seed, result in zip(bench.seeds, results):
            policies = result.iterations[0].policies
            label = {"seed": seed, "beta": beta}
            if kind == "wide":
                lines.append(({"line": "batch of 32", **label}, policies[0]))
                continue
            lines += [({"line": "run", "run": m, **label}, policy) for m, policy in enumerate(policies, 1)]
            lines += [({"line": "slerp", **label}, slerp(result.sft, policies)),
                      ({"line": "lerp", **label}, lerp(result.sft, policies))]
    return bench.fronts(lines, WEAK_ETAS)


@asks("best WARP")
def best(bench: Bench) -> list[dict]:
    """The WARP that comes nearest to the limit, at any compute.

    Lines: `best WARP`, each iteration's front to η = 1, and `best WARP, η to 2`, the same line drawn on past
    the merge. Each point is measured with four completions a prompt: the noise of points that are compared with
    a fixed share would lift their upper envelope.
    """
    experiment = bench.train({"best": bench.tuned("best WARP")})
    points = bench.fronts([({"line": "best WARP", "seed": seed, "iteration": i}, found.merged)
                           for seed, result in zip(bench.seeds, experiment.results["best"])
                           for i, found in enumerate(result.iterations, 1)], (*ETAS, *PAST_ETAS), samples=4)
    return [row for row in points if row["eta"] <= 1] + [{**row, "line": "best WARP, η to 2"} for row in points]


STUDIES: dict[str, Callable[[Bench], list[dict]]] = {
    "limit": limit, "merging": merging, "iterations": iterations, "anchors": anchors, "equal": equal, "best": best,
    "weak": weak, "rewards": rewards, "refresh": refresh, "outer": outer}
