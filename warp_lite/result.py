"""What Algorithm 1 leaves: every policy, the merges, the front; in memory and as a run folder."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from .config import WarpConfig
from .evaluation.metrics import PolicyMetrics, evaluate_many, evaluation_uniforms, policies_at_once
from .files import first_line, locked, read_json, vouched, weights_hash
from .forward import make_forward
from .liti import liti
from .policies import (
    Prompts,
    Weights,
    completions_text,
    encode_prompts,
    load_policy,
    load_weights,
    parameters,
    room_for_prompts,
    sample,
    save_policy,
    stack,
)
from .reinforce import RunState
from .rewards import call_reward, load_reward, reward_name
from .runs import COPY, RunFolder, check_out, json_hash, read_config

ETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
EVALUATION_SAMPLES = 512  # completions a point of a front is measured on, spread over the prompts
NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # policies that are widened while they train
WEIGHTS_AT_ONCE = 2**29  # bytes of weights that are stacked to be measured together


@dataclass
class Failure:
    """A run that was left out of its iteration's merge: its number, its last good step, policy and anchor, and why."""

    run: int
    step: int
    reason: str
    policy: Weights
    anchor: Weights


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
        forward = make_forward(self.model)
        encoded = self._encode(prompts).repeat(1)
        uniforms = evaluation_uniforms(seed, len(encoded), 1, self.config.max_new_tokens, self.model.device)[None]
        weights = forward.prepare(stack([self.weights(eta, iteration)], self.model.device))
        rollout = sample(forward, weights, encoded, uniforms, self.tokenizer, self.config.temperature)
        return completions_text(self.tokenizer, rollout.ids, rollout.mask)

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


def mean_reward(rewards: Sequence[Callable]) -> Callable:
    """The mean of several rewards, as one."""
    if len({id(reward) for reward in rewards}) == 1:
        return rewards[0]

    def mean(prompts, completions, **kwargs):
        values = [call_reward(reward, prompts, completions, **kwargs) for reward in rewards]
        return np.array(values, dtype=float).mean(0).tolist()

    return mean


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


def load_result(path, reward=None, gold=None, texts=None, device="cpu") -> WarpResult:
    """A finished run folder as a WarpResult. `reward` is found by config.json where it says how.

    Weights, policy and reward model stand on `device`.

    Raises ValueError for a folder that is not one, is not finished, or was altered.
    """
    path = Path(path)
    settings = read_config(path)["settings"]
    try:
        config = WarpConfig(**settings["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'} holds no settings that can be read: {first_line(error)}") from None
    vouched(path / "sft", ["."], COPY)
    model, tokenizer = load_policy(path / "sft", dtype="auto", device=device)
    sft = copy_weights(parameters(model))
    folder = RunFolder(path, settings, sft, resume=True)
    for i in range(1, config.iterations + 1):
        missing = [m for m in range(1, config.runs + 1)
                   if not any((folder.run(i, m) / name).is_file() for name in ("DONE", "FAILED"))]
        if missing or not folder.finished_iteration(i):
            which = f"run {missing[0]} of iteration {i}" if missing else f"the merge of iteration {i}"
            raise ValueError(f"{path} is not finished: {which} is missing; continue it with `warp-lite run --resume`")
    if reward is None:
        reward, gold, texts = find_reward(settings.get("source"), path, device)
    prompts = read_json(path / "prompts.json")
    if not isinstance(prompts, dict) or not {"train", "eval", "eval_columns"} <= prompts.keys():
        raise ValueError(f"{path / 'prompts.json'} is not what config.json vouches for; {COPY}")
    result = WarpResult(
        config, model, tokenizer, reward, prompts["eval"], sft, gold=gold, texts=texts,
        train_prompts=prompts["train"], eval_columns=prompts["eval_columns"], source=settings.get("source"),
        dtype=NARROW.get(settings.get("dtype")))
    found = run_settings(result)
    for name, part in (("policy", "sft"), ("prompts", "prompts.json")):
        if found[name] != settings.get(name):
            raise ValueError(f"{path / part} is not what config.json vouches for; {COPY}")
    theta_init = result.sft
    for i in range(1, config.iterations + 1):
        finished, failures = [], []
        for m in range(1, config.runs + 1):
            failed = folder.failed_run(i, m)
            if failed is None:
                finished.append(folder.finished_run(i, m))
            else:
                failures.append(Failure(m, *failed))
            result.trajectories += folder.trajectory(i, m)
        if not finished:
            raise ValueError(f"every run of iteration {i} in {path} failed, so there is no merge; run it again")
        merged = parameters(load_policy(folder.iteration(i) / "merged", dtype="auto", device=device)[0])
        next_init = liti(theta_init, merged, config.eta)
        result.iterations.append(Iteration(theta_init, *map(list, zip(*finished)), merged, next_init, failures))
        theta_init = next_init
    return result


def find_reward(source, folder: Path, device="cpu"):
    """Reward, gold reward and held-out texts from what a run folder's config.json says of their source.

    Raises ValueError where it says nothing, and where it names code that cannot be a reward of the user's own: a
    function of the standard library, or a module that would be found in the folder itself.
    """
    source = source if isinstance(source, dict) else {}
    if "world" in source:
        from .tasks import load_rewards
        return load_rewards(source["world"], device)
    spec = source.get("reward")
    if not isinstance(spec, str):
        raise ValueError("config.json does not say where the reward is; pass it: load_result(path, reward=…)")
    if ":" in spec and not Path(spec).exists():
        inside = Path.cwd().resolve().is_relative_to(folder.resolve())  # modules are found where we are
        if inside or spec.partition(":")[0].partition(".")[0] in sys.stdlib_module_names:
            raise ValueError(f"{folder / 'config.json'} names the code {spec!r} as the reward, which is not run for "
                             "it; if it is yours, pass it: load_result(path, reward=…)")
    return load_reward(spec, device, **source.get("reward_options", {})), None, None


def copy_weights(weights: Weights) -> Weights:
    """The same weights in memory of their own, on the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
