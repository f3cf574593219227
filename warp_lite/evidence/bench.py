"""A draw of a world and the RL seeds that are run in it: what every study trains and measures with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..averaging.liti import liti
from ..averaging.state_dicts import Weights, stack
from ..config import WarpConfig
from ..evaluation.limit import limit_rewards
from ..evaluation.metrics import evaluate_many
from ..experiment import Experiment, run_experiment
from ..policies.forward import make_forward
from ..policies.randomness import prompt_indices, token_uniforms
from ..policies.sampling import Policies
from ..rewards.calling import rollout_rewards
from ..task import World
from ..training.reinforce import advantages, regularised_rewards, reinforce_loss
from ..worlds.reviews import reviews_world
from .tuned import tuned

WORLDS = {"sentiment": "film reviews that should praise", "detail": "film reviews that should go into detail"}
TUNING_SEEDS = (9000, 9001, 9002)  # on which settings are chosen, never reported
TUNING_DRAW = 101  # of the first of them; the others have the next. No reported seed has one of these draws
LIMIT_SAMPLES = 4096  # completions a prompt: the limit is known to 4 nats, and more move its area by 0.2 % at most
SAMPLES = 2  # completions a held-out prompt and point of a curve; of each draw by random numbers of its own


def draw_of(seed: int) -> int:
    """The draw of SFT policy and reward model that an RL seed belongs to: each has one of its own, since the spread
    between draws is most of the spread there is."""
    if seed in TUNING_SEEDS:
        return TUNING_DRAW + TUNING_SEEDS.index(seed)
    return 1 + seed if 1 + seed < TUNING_DRAW else 1 + seed + len(TUNING_SEEDS)


@dataclass
class Bench:
    """One draw of a world, and some RL seeds.

    Rows are dicts: what they are of (`line`, `seed`, and `run`, `iteration` or `step` where there are
    several), `eta`, and the numbers of `PolicyMetrics`.
    """

    taste: str
    draw: int
    seeds: tuple[int, ...]
    world: World
    lines: frozenset[str] | None = None  # the lines that are asked for; None: all
    asks: tuple[str, ...] | None = None  # the purposes whose settings may be used (tuned.py); None: all

    @classmethod
    def of(cls, taste: str, draw: int, seeds: Sequence[int]) -> Bench:
        """The bench of a draw; its policy and reward model are trained if they are not in the cache."""
        return cls(taste, draw, tuple(seeds), reviews_world(seed=draw, taste=taste, progress=False))

    @property
    def sft(self) -> Weights:
        """θ_sft of this draw, on the CPU."""
        return self.world.sft

    def tuned(self, purpose: str) -> WarpConfig:
        """The setting that was chosen for a purpose in this world.

        Raises ValueError where none was, or for a purpose that the study does not say it uses: its rows would be kept
        when that setting changes.
        """
        if self.asks is not None and purpose not in self.asks:
            raise ValueError(f"the study uses the setting for {purpose!r}, but is marked with "
                             f"{', '.join(self.asks) or 'none'}; add it to its @asks")
        return tuned(self.taste, purpose)

    def train(self, configs: Mapping[str, WarpConfig], **options: object) -> Experiment:
        """`run_experiment` of the settings, by name, for every seed of the bench; `options` are its own.

        Raises ValueError where a run fails or cannot be made.
        """
        return run_experiment(self.world, configs, self.seeds, progress=False,
                              **{"trajectory_samples": SAMPLES, **options})

    def measure(self, states: Sequence[Weights], samples: int = SAMPLES, texts: bool = False) -> list[dict]:
        """Metrics of any weights on the held-out prompts, a dict each; with the perplexity of held-out texts or not."""
        rows = []
        for start in range(0, len(states), 512):  # what is stacked is a copy
            metrics = evaluate_many(self.world, stack(states[start:start + 512]), samples=samples, texts=texts)
            rows += [{name: round(value, 5) for name, value in m.as_dict().items() if value is not None}
                     for m in metrics]
        return rows

    def wants(self, *lines: str) -> bool:
        """Whether one of those lines is asked for. What only others need is not measured."""
        return self.lines is None or not self.lines.isdisjoint(lines)

    def fronts(self, lines: Sequence[tuple[dict, Weights]], etas: Sequence[float], texts: bool = False,
               samples: int = SAMPLES) -> list[dict]:
        """The LITI fronts from θ_sft to each of the weights, if their line is asked for: a row a point, that of η = 0
        included."""
        lines = [(label, weights) for label, weights in lines if self.wants(label.get("line", ""))]
        if not lines:
            return []
        places = [(label, weights, float(eta)) for label, weights in lines for eta in etas]
        states = [self.sft, *(liti(self.sft, weights, eta) for _, weights, eta in places)]
        start, *rest = self.measure(states, samples, texts)
        return [{**label, "eta": 0.0, **start} for label, _ in lines] + [
            {**label, "eta": eta, **row} for (label, _, eta), row in zip(places, rest)]

    def trajectories(self, experiment: Experiment, name: str, line: str) -> list[dict]:
        """What was measured of the first iteration's runs while they trained, from θ_sft on, if the line is asked
        for."""
        if not self.wants(line):
            return []
        (start,) = self.measure([self.sft])
        rows = [{"line": line, "seed": row["seed"], "run": row["run"], "step": row["step"],
                 **{key: round(value, 5) for key, value in row.items() if isinstance(value, float)}}
                for row in experiment.trajectory_rows([name]) if row["iteration"] == 1]
        runs = sorted({(row["seed"], row["run"]) for row in rows})
        return [{"line": line, "seed": seed, "run": run, "step": 0, **start} for seed, run in runs] + rows

    def limit_rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards and gold rewards (prompts, samples) of θ_sft on the held-out prompts, from the cache or sampled."""
        return limit_rewards(self.world, LIMIT_SAMPLES)

    def noise_scale(self, policy: Weights, anchor: Weights, beta: float, key: tuple[int, ...],
                    batches: int = 16, batch: int = 32) -> float:
        """The gradient noise scale tr(Σ) / |G|² of the policy gradient, in completions, from `batches` batches.

        A batch of so many completions has as much noise as signal (McCandlish et al. 2018, arXiv
        1812.06162). Both parts are estimated without bias; inf where the signal is not above 0.
        """
        w = self.world
        prompts, length = w.prompts, w.max_new_tokens
        index = np.stack([prompt_indices((*key, b), 0, batch, len(prompts)) for b in range(batches)])
        uniforms = torch.stack([token_uniforms((*key, b), 0, batch, length) for b in range(batches)])
        forward = make_forward(w.policy)
        leaves = {name: tensor.detach().expand(batches, *tensor.shape).clone().requires_grad_()
                  for name, tensor in policy.items()}
        with torch.no_grad():
            rollout = Policies(forward, leaves).sample(prompts.batch(index), uniforms, w.tokenizer)
            frozen = {name: tensor.expand(batches, *tensor.shape) for name, tensor in anchor.items()}
            anchor_logp = Policies(forward, frozen).logprobs(rollout).sum(-1)
        rewards = rollout_rewards([w.reward] * batches, rollout, w.tokenizer)
        logp = Policies(forward, leaves).logprobs(rollout).sum(-1)
        advantage = advantages(regularised_rewards(rewards, logp, anchor_logp, beta))
        grads = torch.autograd.grad(reinforce_loss(logp, advantage, length).sum(), list(leaves.values()))
        return noise_scale(torch.cat([grad.flatten(1) for grad in grads], 1), batch)


def noise_scale(gradients: torch.Tensor, batch: int) -> float:
    """tr(Σ) / |G|² in samples, from gradients (batches, P) that each are the mean over `batch` samples."""
    gradients = gradients.double()
    trace = gradients.var(0, unbiased=True).sum()                # of the mean over one batch
    signal = gradients.mean(0).square().sum() - trace / len(gradients)
    return float(batch * trace / signal) if signal > 0 else float("inf")


Study = Callable[[Bench], list[dict]]
