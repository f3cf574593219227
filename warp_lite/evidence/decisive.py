"""Where would merging win? Six experiments, each with what was predicted before it was run.

Each asks for one condition under which WARP ought to gain more than in the settings of `studies`: many noisy runs,
other sizes of policy, poor reward models, a reward model of each run's own, other prompts at test time, and an
anchor that has the time to move. A prediction is the interval of effects that was expected; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..averaging.slerp import lerp, slerp
from ..averaging.state_dicts import Weights
from ..evaluation.front import reward_at_kl
from ..policies.prompts import Prompts
from ..rewards.bradley_terry import BradleyTerry
from ..task import World
from ..worlds.reviews import reviews_world
from .bench import Bench
from .effects import KLS, Effect, Rows, compare_values
from .settings import ANCHORS, ETAS, NOISY, WEAK_ETAS
from .tuned import asks

# parameters of the policy: width and layers of the tiny GPT-2
SIZES = {"30k": {"width": 32}, "110k": {"width": 64}, "400k": {"width": 128}, "1.6M": {"width": 256}}
QUALITIES = {"250 pairs": {"pairs": 250}, "4000 pairs": {}}
UNSEEN = ("sequel", "remake", "western", "musical", "documentary", "drama")  # nouns held out of training
LONG = ANCHORS.replace(steps=900, mu=0.1, lr=3e-4, eval_every=30)  # μT = 90, as in the paper
LONG_BETAS = {"ema": (0.3, 1.0, 3.0), "sft": (0.03, 0.1, 0.3)}
OWN = NOISY.replace(steps=160, batch_size=8, beta=0.1)


def many_runs(bench: Bench) -> list[dict]:
    """Sixteen runs with batches of 2, merged in disjoint groups. Lines: `run` (1 to 4), `slerp-4` (four groups, as
    runs), `slerp-8` (two) and `slerp-16`."""
    experiment = bench.train({"runs": NOISY.replace(batch_size=2, runs=16)})
    lines: list[tuple[dict, Weights]] = []
    for seed, result in zip(bench.seeds, experiment.results["runs"]):
        policies = result.iterations[0].policies
        lines += [({"line": "run", "seed": seed, "run": m}, policy) for m, policy in enumerate(policies[:4], 1)]
        lines += [({"line": f"slerp-{M}", "seed": seed, "run": start // M + 1},
                   slerp(result.sft, policies[start:start + M]))
                  for M in (4, 8, 16) for start in range(0, 16, M)]
    return bench.fronts(lines, ETAS)


def sizes(bench: Bench) -> list[dict]:
    """Four runs, merged, of policies of four sizes, the learning rate as 1/width. Lines, with `size`: `run`,
    `slerp-4`."""
    rows = []
    for size, shape in SIZES.items():
        sized = replace(bench, world=reviews_world(seed=bench.draw, taste=bench.taste, progress=False, **shape))
        lines = four_and_merge(sized, lr=NOISY.lr * 64 / shape["width"])
        rows += [{**row, "size": size} for row in sized.fronts(lines, ETAS)]
    return rows


def four_and_merge(bench: Bench, **changes: object) -> list[tuple[dict, Weights]]:
    """Four runs of the noisy setting with some changes: `run`, each alone, and `slerp-4`, with their weights."""
    experiment = bench.train({"runs": NOISY.replace(**changes)})
    lines: list[tuple[dict, Weights]] = []
    for seed, result in zip(bench.seeds, experiment.results["runs"]):
        policies = result.iterations[0].policies
        lines += [({"line": "run", "seed": seed, "run": m}, policy) for m, policy in enumerate(policies, 1)]
        lines.append(({"line": "slerp-4", "seed": seed}, slerp(result.sft, policies)))
    return lines


@asks("merged, β = 0.01", "batch of 32, β = 0.01")
def quality(bench: Bench) -> list[dict]:
    """Weak regularisation, β = 0.01, with a poor and with a good reward model: four runs of batches of 8, merged,
    against one of batches of 32. Lines, with `quality`: `lerp`, `batch of 32`, `run`."""
    rows = []
    for name, settings in QUALITIES.items():
        judged = replace(bench, world=reviews_world(seed=bench.draw, taste=bench.taste, progress=False, **settings))
        experiment = judged.train({"runs": bench.tuned("merged, β = 0.01"),
                                   "wide": bench.tuned("batch of 32, β = 0.01")})
        lines: list[tuple[dict, Weights]] = []
        for seed, four, wide in zip(bench.seeds, experiment.results["runs"], experiment.results["wide"]):
            policies = four.iterations[0].policies
            lines += [({"line": "run", "seed": seed, "run": m}, policy) for m, policy in enumerate(policies, 1)]
            lines += [({"line": "lerp", "seed": seed}, lerp(four.sft, policies)),
                      ({"line": "batch of 32", "seed": seed}, wide.iterations[0].policies[0])]
        rows += [{**row, "quality": name} for row in judged.fronts(lines, WEAK_ETAS)]
    return rows


class MeanReward:
    """The mean of several reward models."""

    def __init__(self, rewards: Sequence[BradleyTerry]):
        self.rewards, self.tokenizer = tuple(rewards), rewards[0].tokenizer

    def from_ids(self, prompts: Prompts, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards (…) of completions ids (…, T), mask 1 up to their end, of prompts (…, P)."""
        return torch.stack([reward.from_ids(prompts, ids, mask) for reward in self.rewards]).mean(0)


def own_rewards(bench: Bench) -> list[dict]:
    """Four runs merged, each with a reward model of its own, or all with one, or all with the mean of the four.

    Lines: `own`, `one`, `mean` (merged) and `one run on the mean` (each alone). Gold decides.
    """
    models = [reviews_world(seed=bench.draw, taste=bench.taste, reward_seed=k, progress=False).reward for k in range(4)]
    rewards = {"own": models, "one": [models[0]] * 4, "mean": [MeanReward(models)] * 4}
    experiment = bench.train({name: OWN for name in rewards}, rewards=rewards)
    lines: list[tuple[dict, Weights]] = []
    for name, results in experiment.results.items():
        for seed, result in zip(bench.seeds, results):
            lines.append(({"line": name, "seed": seed}, result.iterations[0].merged))
            if name == "mean":
                lines += [({"line": "one run on the mean", "seed": seed, "run": m}, policy)
                          for m, policy in enumerate(result.iterations[0].policies, 1)]
    return bench.fronts(lines, ETAS)


def shift(bench: Bench) -> list[dict]:
    """Prompts of nouns that training never saw, and of those that it did. Lines, with `prompts`: `run`, `slerp-4`."""
    whole = bench.world
    by_noun = {noun: [text for text in (*whole.prompts.given, *whole.eval_prompts.given)
                      if (text.split()[2] in UNSEEN) == (noun == "unseen")] for noun in ("seen", "unseen")}
    benches = {noun: replace(bench, world=replace(World.of(
        whole.policy, whole.tokenizer, whole.reward, by_noun["seen"], texts[:64], gold=whole.gold, texts=whole.texts,
        max_new_tokens=whole.max_new_tokens), eval_seed=whole.eval_seed)) for noun, texts in by_noun.items()}
    lines = four_and_merge(benches["seen"])
    return [{**row, "prompts": noun} for noun, measuring in benches.items() for row in measuring.fronts(lines, ETAS)]


def long_anchor(bench: Bench) -> list[dict]:
    """One long run with μT = 90 under each anchor and several β. Lines: `EMA, β = …`, `SFT, β = …`."""
    configs = {f"EMA, β = {beta:g}": LONG.replace(beta=beta) for beta in LONG_BETAS["ema"]}
    configs |= {f"SFT, β = {beta:g}": LONG.replace(beta=beta, anchor="sft") for beta in LONG_BETAS["sft"]}
    experiment = bench.train(configs, traced=1)
    return [row for name in configs for row in bench.trajectories(experiment, name, name)]


def difference_of_gains(a: dict, b: dict) -> Callable[[Rows], Effect]:
    """What merging four adds where rows have `a`, less what it adds where they have `b`, at the highest KL that all
    four lines of every seed reach."""
    def gains(rows: Rows, kl: float) -> dict[int, float]:
        def at(line: str, which: dict, seed: int) -> float:
            return float(np.mean([reward_at_kl(front, kl) for front in rows.fronts({"line": line, **which}, seed)]))
        return {seed: at("slerp-4", a, seed) - at("run", a, seed) - at("slerp-4", b, seed) + at("run", b, seed)
                for seed in rows.seeds}
    return lambda rows: compare_values(rows, KLS, lambda kl: gains(rows, kl))


def best_of_others(a: Sequence[str], b: Sequence[str]) -> Callable[[Rows], Effect]:
    """The reward at one KL of the best line of `a` less that of the best of `b`; for each seed the lines are those
    that are best in the mean of all other seeds, so that no seed has a part in its own choice."""
    def effect(rows: Rows) -> Effect:
        def choose(names: Sequence[str], kl: float, seed: int) -> float:
            at = {name: {s: reward_at_kl(rows.fronts(name, s)[0], kl) for s in rows.seeds} for name in names}
            others = {name: np.mean([value for s, value in values.items() if s != seed] or [np.nan])
                      for name, values in at.items()}
            reaching = {name: mean for name, mean in others.items() if np.isfinite(mean)}
            return at[max(reaching, key=reaching.get)][seed] if reaching else float("nan")
        return compare_values(rows, KLS, lambda kl: {seed: choose(a, kl, seed) - choose(b, kl, seed)
                                                     for seed in rows.seeds})
    return effect


DECISIVE: dict[str, Callable[[Bench], list[dict]]] = {
    "many runs": many_runs, "sizes": sizes, "quality": quality, "own rewards": own_rewards, "shift": shift,
    "long anchor": long_anchor}
