"""How long the training of a task will take, told before it starts: by one batch, sampled and scored."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..averaging.state_dicts import stack
from ..config import WarpConfig
from ..policies.forward import Forward, make_forward
from ..policies.prompts import Prompts
from ..policies.randomness import token_uniforms
from ..policies.sampling import Policies
from ..task import Task
from .iteration import TRAJECTORY_SAMPLES, measured_steps
from .reinforce import draw, forward_for, score
from .run import Run

MEASURED_FORWARDS = 2  # a completion that is measured is scored by the policy and by θ_sft
SOME = 32  # completions by which the time of a measurement is told
WORTH_SAYING = 60.0  # seconds from which on the estimate is printed


@dataclass(frozen=True)
class Duration:
    """The training of a task: `steps` policy steps of `step_seconds` each, and `measured_seconds` of measuring."""

    steps: int
    step_seconds: float
    measured_seconds: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.steps * self.step_seconds + self.measured_seconds

    def __str__(self) -> str:
        digits = ".0f" if self.step_seconds >= 10 else ".2g"
        measuring = f" and {spoken(self.measured_seconds)} to measure them" if self.measured_seconds >= 1 else ""
        return (f"about {spoken(self.seconds)} by a first trial: {self.steps} policy steps of "
                f"{self.step_seconds:{digits}} s{measuring}")


def spoken(seconds: float) -> str:
    """A time as a person says it: seconds up to two minutes, minutes up to two hours, hours."""
    for unit, size, upto in (("seconds", 1, 120), ("minutes", 60, 120)):
        if seconds < size * upto:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} hours" if seconds < 36000 else f"{seconds / 3600:.0f} hours"


def expected_duration(task: Task, config: WarpConfig, executor: str, at_once: int = 1) -> Duration:
    """What the training of all runs of all iterations will take, by a batch of `at_once` policies that are sampled
    together and scored, as `executor` does, "serial" or "batched", and by some completions of held-out prompts where
    runs are measured on their way. The time of the rewards, of merging and of the front after it is not in it.

    Raises ValueError as `forward_for` does.
    """
    count = max(1, min(at_once, config.runs))
    runs = [Run(config, 1, m, task.sft, task.sft, reward)
            for m, reward in enumerate(task.rewards(config.runs)[:count], 1)]
    forward = forward_for(task.policy, executor, config)
    sampling, scoring = seconds_of(task, forward, config, *draw(runs, 0, task.prompts))
    steps, points = config.iterations * config.runs * config.steps, len(measured_steps(config))
    measuring = 0.0
    if points:
        completions = len(task.eval_prompts) * math.ceil(TRAJECTORY_SAMPLES / len(task.eval_prompts))
        some = min(SOME, completions)
        uniforms = token_uniforms(runs[0].key, 0, some, config.max_new_tokens).unsqueeze(0).to(task.policy.device)
        held_out = task.eval_prompts.batch(np.arange(some)[None] % len(task.eval_prompts))
        sampled, scored = seconds_of(task, make_forward(task.policy), config, held_out, uniforms)
        measuring = (sampled + MEASURED_FORWARDS * scored) * completions / some
    return Duration(steps, (sampling + forwards(config) * scoring) / count,
                    config.iterations * config.runs * points * measuring)


@torch.no_grad()
def seconds_of(task: Task, forward: Forward, config: WarpConfig, prompts: Prompts,
               uniforms: Tensor) -> tuple[float, float]:
    """Seconds of sampling a completion of each prompt (E, B, P) by E copies of θ_sft, and of scoring them without a
    gradient: of two times the shorter, as the first has what is done once in it."""
    weights = stack([task.sft] * len(uniforms), task.policy.device)
    sampling = scoring = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        rollout = Policies(forward, weights).sample(prompts, uniforms, task.tokenizer, config.temperature,
                                                    config.sample_batch)
        sampled = time.perf_counter()
        score(forward, weights, rollout, config).sum().item()  # waits for a GPU
        sampling, scoring = min(sampling, sampled - started), min(scoring, time.perf_counter() - sampled)
        if sampled - started > 1:
            break
    return sampling, scoring


def forwards(config: WarpConfig) -> int:
    """What a step takes beside sampling, in forward passes without gradients: the policy's, its backward at two, and
    the anchor's where there is a KL; once more the policy's for checkpoints, and where the batch is in parts."""
    return 3 + (config.beta > 0) + config.checkpointing + (0 < config.micro_batch < config.batch_size)
