"""What Algorithm 1 leaves: every policy, the merges, the front; in memory and as a run folder."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from .averaging.liti import liti
from .averaging.state_dicts import Weights, load_weights, stack
from .config import WarpConfig
from .evaluation.metrics import PolicyMetrics, evaluate_many, evaluation_uniforms, policies_at_once
from .policies.loading import save_policy
from .policies.prompts import Prompts, encode_prompts, room_for_prompts
from .policies.sampling import Policies, completions_text
from .rewards.calling import mean_reward, reward_name
from .storage.files import locked, weights_hash
from .storage.provenance import json_hash
from .training.run import Failure, RunState
from .training.run_folder import RunFolder, check_out

ETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
EVALUATION_SAMPLES = 512  # completions a point of a front is measured on, spread over the prompts
NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # policies that are widened while they train
WEIGHTS_AT_ONCE = 2**29  # bytes of weights that are stacked to be measured together


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

    @property
    def runs(self) -> list[int]:
        """The numbers of the runs (from 1) whose policies were merged."""
        failed = {failure.run for failure in self.failures}
        return [m for m in range(1, len(self.policies) + len(failed) + 1) if m not in failed]


@dataclass
class WarpResult:
    """What Algorithm 1 leaves: every policy, the merges, and the way to draw the front from them.

    `eval_prompts` are what everything is measured on, `eval_columns` the further columns of their data
    set. `trajectories` are measurements of the single runs while they trained: dicts with `iteration`,
    `run`, `step` and the numbers of `PolicyMetrics`. `source` says where policy and rewards came from;
    `lora` are the LoraSettings of runs that trained adapters.
    All weights are float32 or wider and on the CPU; models that are handed out, or saved by `save_policy`,
    are of the `dtype` of the policy that came in.
    """

    config: WarpConfig
    model: object
    tokenizer: object
    reward: Callable | Sequence[Callable]
    eval_prompts: list[str]
    sft: Weights
    iterations: list[Iteration] = field(default_factory=list)
    trajectories: list[dict] = field(default_factory=list)
    gold: Callable | None = None
    texts: list[str] | None = None
    train_prompts: list[str] = field(default_factory=list)
    eval_columns: dict[str, list] = field(default_factory=dict)
    source: dict | None = None
    dtype: torch.dtype | None = None
    lora: object | None = None

    @property
    def held_out(self) -> Prompts:
        """The held-out prompts, encoded."""
        encoded = self._encode(self.eval_prompts)
        encoded.columns = self.eval_columns
        return encoded

    @property
    def judge(self) -> Callable:
        """The reward that fronts are measured by: the only one, or the mean of several."""
        return mean_reward(self.reward) if isinstance(self.reward, (list, tuple)) else self.reward

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

    def policy(self, eta: float = 1.0, iteration: int = -1, toward: str = "sft"):
        """The Hugging Face model at any η."""
        model = copy.deepcopy(self.model).to(self.dtype or self.model.dtype)
        return load_weights(model, self.weights(eta, iteration, toward))

    def front(self, etas: Sequence[float] = ETAS, iterations: Sequence[int] | None = None, toward: str = "sft",
              prompts: Sequence[str] | None = None, samples: int | None = None, seed: int = 0) -> list[dict]:
        """Measure the front: a dict a point with `iteration`, `eta` and the numbers of `PolicyMetrics`.

        `prompts` default to the held-out ones and `samples` a prompt to what makes 512 in all.
        """
        chosen = range(1, len(self.iterations) + 1) if iterations is None else iterations
        places = [(self._index(i) + 1, float(eta)) for i in chosen for eta in etas]
        if not places:
            raise ValueError("a front needs at least one eta and one iteration")
        states = (self.weights(eta, i, toward) for i, eta in places)  # one by one: each is as large as the policy
        return [{"iteration": i, "eta": eta, **metrics.as_dict()}
                for (i, eta), metrics in zip(places, self.measure(states, prompts, samples, seed))]

    def measure(self, states: Iterable[Weights], prompts=None, samples: int | None = None,
                seed: int = 0) -> list[PolicyMetrics]:
        """`PolicyMetrics` of any weights of this architecture, against the SFT policy."""
        config, metrics, states = self.config, [], iter(states)
        encoded = self.held_out if prompts is None else self._encode(prompts)
        samples = samples or max(1, math.ceil(EVALUATION_SAMPLES / len(encoded)))
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.sft.values())
        together = policies_at_once(samples * len(encoded))
        together *= max(1, WEIGHTS_AT_ONCE // (size * together))
        while some := list(islice(states, together)):
            metrics += evaluate_many(
                self.model, stack(some), self.sft, self.judge, encoded, self.tokenizer, gold=self.gold,
                texts=self.texts, samples=samples, max_new_tokens=config.max_new_tokens,
                temperature=config.temperature, seed=seed)
        return metrics

    @torch.no_grad()
    def completions(self, prompts: Sequence[str], eta: float = 1.0, iteration: int = -1, seed: int = 0) -> list[str]:
        """One completion a prompt at η; the same random numbers at every η."""
        encoded = self._encode(prompts).repeat(1)
        uniforms = evaluation_uniforms(seed, len(encoded), 1, self.config.max_new_tokens, self.model.device)[None]
        policies = Policies.of(self.model, [self.weights(eta, iteration)])
        rollout = policies.sample(encoded, uniforms, self.tokenizer, self.config.temperature)
        return completions_text(self.tokenizer, rollout)

    def keep_prompts(self, count: int) -> None:
        """Measure on the first `count` of the held-out prompts only."""
        self.eval_prompts = self.eval_prompts[:count]
        self.eval_columns = {name: values[:count] for name, values in self.eval_columns.items()}

    def _encode(self, prompts) -> Prompts:
        room = room_for_prompts(self.model, self.config.max_new_tokens)
        return encode_prompts(self.tokenizer, prompts, room).to(self.model.device)

    def save_policy(self, folder, eta: float = 1.0, iteration: int = -1) -> None:
        """Any point of the front as a Hugging Face folder with its tokenizer."""
        save_policy(self.policy(eta, iteration), self.tokenizer, folder)

    def save(self, path) -> None:
        """The whole result as a run folder, which `load_result` reads. Raises ValueError if it is not empty."""
        settings, steps = run_settings(self), self.config.steps
        check_out(path)
        with locked(Path(path)):
            folder = RunFolder(path, settings, self.sft)
            write_start(folder, self)
            for i, iteration in enumerate(self.iterations, 1):
                ends = [(m, steps, *weights, None)
                        for m, *weights in zip(iteration.runs, iteration.policies, iteration.anchors)]
                ends += [(f.run, f.step, f.policy, f.anchor, f.reason) for f in iteration.failures]
                for m, step, policy, anchor, failure in ends:
                    rows = [row for row in self.trajectories if (row["iteration"], row["run"]) == (i, m)]
                    folder.append(i, m, "trajectory.jsonl", rows)
                    folder.finish_run(i, m, RunState(step, policy, anchor, {}, {}), failure)
                write_iteration(folder, self, i)


# --- the result as a run folder ---


def run_settings(result: WarpResult) -> dict:
    """What must be equal for a run to go on: the config, the policy, the rewards, the prompts.

    Raises ValueError for columns of a data set that JSON cannot hold.
    """
    try:
        hashed = json_hash([result.train_prompts, result.eval_prompts, result.eval_columns])
    except TypeError as error:
        raise ValueError(f"the prompts have a column that a run folder cannot hold ({error}); "
                         "keep text and numbers, or leave out `out`") from None
    narrow = next((name for name, dtype in NARROW.items() if dtype == result.dtype), None)
    return {"config": dataclasses.asdict(result.config), "policy": weights_hash(result.sft),
            "lora": None if result.lora is None else dataclasses.asdict(result.lora),
            "reward": reward_name(result.reward), "source": result.source, **({"dtype": narrow} if narrow else {}),
            "prompts": {"train": len(result.train_prompts), "eval": len(result.eval_prompts), "sha256": hashed}}


def write_start(folder: RunFolder, result: WarpResult) -> None:
    """θ_sft and the prompts."""
    prompts = {"train": result.train_prompts, "eval": result.eval_prompts, "eval_columns": result.eval_columns}
    folder.write_start(prompts, lambda path: save_policy(result.model, result.tokenizer, path))


def write_iteration(folder: RunFolder, result: WarpResult, i: int) -> None:
    """The merge of iteration i and the init of the next, each a Hugging Face folder."""
    def model_of(weights):
        return lambda path: save_policy(load_weights(copy.deepcopy(result.model), weights), result.tokenizer, path)

    iteration = result.iterations[i - 1]
    folder.finish_iteration(i, {"merged": model_of(iteration.merged), "next-init": model_of(iteration.next_init)})
