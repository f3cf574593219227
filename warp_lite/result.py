"""What Algorithm 1 leaves: every policy, the merges, the front; in memory and as a run folder."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from transformers import PreTrainedModel

from .averaging.liti import liti
from .averaging.state_dicts import Weights, bytes_of, load_weights, stack
from .config import LoraSettings, WarpConfig
from .evaluation.metrics import PolicyMetrics, evaluate_many, policies_at_once, sample_completions
from .policies.loading import save_policy
from .storage.files import locked
from .storage.run_config import check_out
from .task import Task
from .training.iteration import Trained
from .training.memory import WEIGHTS_AT_ONCE
from .training.run import Failure, RunState
from .training.run_folder import RunFolder, run_settings, write_iteration, write_start

ETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
EVALUATION_SAMPLES = 512  # completions a point of a front is measured on, spread over the prompts


def stacked_together(task: Task, samples: int) -> int:
    """How many policies of a task are stacked to be measured, `samples` completions a held-out prompt: full batches
    where they are small, else as many as are no more than WEIGHTS_AT_ONCE; one at least."""
    at_once, count = policies_at_once(samples * len(task.eval_prompts)), max(1, WEIGHTS_AT_ONCE // bytes_of(task.sft))
    return count - count % at_once if count > at_once else count


@dataclass
class Iteration:
    """One iteration: θ_init, the policies that were merged and their anchors, θ_slerp, the θ_init of the next, and
    the runs that were left out."""

    init: Weights
    policies: list[Weights]
    anchors: list[Weights]
    merged: Weights
    next_init: Weights
    failures: list[Failure] = field(default_factory=list)

    @classmethod
    def of(cls, init: Weights, trained: Trained, merged: Weights, next_init: Weights) -> Iteration:
        """An iteration by what stage 1 left of it."""
        return cls(init, trained.policies, trained.anchors, merged, next_init, trained.failures)

    @property
    def runs(self) -> list[int]:
        """The numbers of the runs (from 1) whose policies were merged."""
        failed = {failure.run for failure in self.failures}
        return [m for m in range(1, len(self.policies) + len(failed) + 1) if m not in failed]


@dataclass
class WarpResult:
    """What Algorithm 1 leaves: every policy, the merges, and the way to draw the front from them.

    `task` is what was trained and what everything is measured on. `trajectories` are measurements of the single
    runs while they trained: dicts with `iteration`, `run`, `step` and the numbers of `PolicyMetrics`. `lora` are the
    LoraSettings of runs that trained adapters.
    All weights are float32 or wider and on the CPU; models that are handed out, or saved by `save_policy`,
    are of the `dtype` of the policy that came in.
    """

    task: Task
    config: WarpConfig
    iterations: list[Iteration] = field(default_factory=list)
    trajectories: list[dict] = field(default_factory=list)
    lora: LoraSettings | None = None

    @property
    def sft(self) -> Weights:
        """θ_sft: the weights of the policy that came in, float32 or wider, on the CPU."""
        return self.task.sft

    def weights(self, eta: float = 1.0, iteration: int = -1, toward: str = "sft") -> Weights:
        """θ_η of an iteration (1 … I, or −1 for the last): from the SFT policy (the paper's front) or,
        with toward="init", from that iteration's init (Fig. 17). Raises ValueError for another word."""
        if toward not in ("sft", "init"):
            raise ValueError(f"toward must be 'sft' or 'init', not {toward!r}")
        chosen = self.iterations[self._index(iteration)]
        return liti(self.sft if toward == "sft" else chosen.init, chosen.merged, eta)

    def _index(self, iteration: int) -> int:
        if iteration == -1:
            return len(self.iterations) - 1
        if not 1 <= iteration <= len(self.iterations):
            raise ValueError(f"no iteration {iteration}; there are 1 to {len(self.iterations)}, and -1, the last")
        return iteration - 1

    def policy(self, eta: float = 1.0, iteration: int = -1, toward: str = "sft") -> PreTrainedModel:
        """The Hugging Face model at any η, a copy, in the dtype and on the device of the policy that came in.

        η, iteration and `toward` are those of `weights`. Raises ValueError for those that there are none of.
        """
        model = copy.deepcopy(self.task.policy).to(self.task.dtype or self.task.policy.dtype)
        return load_weights(model, self.weights(eta, iteration, toward))

    def front(self, etas: Sequence[float] = ETAS, iterations: Sequence[int] | None = None, toward: str = "sft",
              prompts: Sequence[str] | None = None, samples: int | None = None,
              seed: int | None = None) -> list[dict]:
        """Measure the front: a dict a point with `iteration`, `eta` and the numbers of `PolicyMetrics`.

        `prompts` default to the held-out ones, `samples` a prompt to what makes 512 in all, and `seed` to the task's
        `eval_seed`.
        Raises ValueError for no η or no iteration, and for one that is not there.
        """
        chosen = range(1, len(self.iterations) + 1) if iterations is None else iterations
        places = [(self._index(i) + 1, float(eta)) for i in chosen for eta in etas]
        if not places:
            raise ValueError("a front needs at least one eta and one iteration")
        states = (self.weights(eta, i, toward) for i, eta in places)  # one by one: each is as large as the policy
        return [{"iteration": i, "eta": eta, **metrics.as_dict()}
                for (i, eta), metrics in zip(places, self.measure(states, prompts, samples, seed))]

    def measure(self, states: Iterable[Weights], prompts: Sequence | None = None, samples: int | None = None,
                seed: int | None = None, texts: bool = True) -> list[PolicyMetrics]:
        """`PolicyMetrics` of any weights of this architecture, against the SFT policy, `samples` completions a prompt.

        `texts`: with the perplexity of held-out texts, where there are any.
        """
        task, metrics, states = self.task if prompts is None else self.task.measured_on(prompts), [], iter(states)
        samples = samples or max(1, math.ceil(EVALUATION_SAMPLES / len(task.eval_prompts)))
        while batch := list(islice(states, stacked_together(task, samples))):
            metrics += evaluate_many(task, stack(batch), samples=samples, seed=seed, texts=texts)
        return metrics

    def completions(self, prompts: Sequence, eta: float = 1.0, iteration: int = -1,
                    seed: int | None = None) -> list[str]:
        """One completion a prompt at η; the same random numbers at every η, the task's unless `seed` says others.

        Raises ValueError for prompts that cannot be used.
        """
        return sample_completions(self.task.measured_on(prompts), [self.weights(eta, iteration)], seed)[0]

    def save_policy(self, folder: str | Path, eta: float = 1.0, iteration: int = -1) -> None:
        """Any point of the front as a Hugging Face folder with its tokenizer."""
        save_policy(self.policy(eta, iteration), self.task.tokenizer, folder)

    def save(self, path: str | Path) -> None:
        """The whole result as a run folder, which `load_result` reads. Raises ValueError if it is not empty."""
        check_out(path)
        with locked(Path(path)):
            folder = RunFolder(path, run_settings(self.task, self.config, self.lora), self.sft)
            write_start(folder, self.task)
            for i, iteration in enumerate(self.iterations, 1):
                ends = [(m, self.config.steps, *weights, None)
                        for m, *weights in zip(iteration.runs, iteration.policies, iteration.anchors)]
                ends += [(f.run, f.step, f.policy, f.anchor, f.reason) for f in iteration.failures]
                for m, step, policy, anchor, failure in ends:
                    rows = [row for row in self.trajectories if (row["iteration"], row["run"]) == (i, m)]
                    folder.append(i, m, "trajectory.jsonl", rows)
                    folder.finish_run(i, m, RunState.finished(step, policy, anchor), failure)
                write_iteration(folder, self.task, i, iteration.merged, iteration.next_init)
