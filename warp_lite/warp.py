"""Algorithm 1: iterations of M RL runs, their merge, and the interpolation back; and the front it draws."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .config import WarpConfig
from .evaluation.metrics import evaluate_many, evaluation_uniforms
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
from .reinforce import Run, RunState, train_batched, train_serial
from .rewards import load_reward, reward_name
from .runs import RunFolder, read_json, read_lines, write_json
from .slerp import lerp, slerp

ETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
EVALUATION_SAMPLES = 512  # completions a point of a front is measured on, spread over the prompts
TRAJECTORY_SAMPLES = 128


@dataclass
class Iteration:
    """One iteration: θ_init, the M policies and their anchors, θ_slerp, and the θ_init of the next."""

    init: Weights
    policies: list[Weights]
    anchors: list[Weights]
    merged: Weights
    next_init: Weights


@dataclass
class WarpResult:
    """What Algorithm 1 leaves: every policy, the merges, and the way to draw the front from them.

    `trajectories` are measurements of the single runs while they trained: dicts with
    `iteration`, `run`, `step` and the numbers of `PolicyMetrics`.
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
            raise ValueError(f"there is no iteration {iteration}; there are 1 to {len(self.iterations)}, or -1 for the last")
        return iteration - 1

    def policy(self, eta: float = 1.0, iteration: int = -1, toward: str = "sft"):
        """The Hugging Face model at any η."""
        return load_weights(copy.deepcopy(self.model), self.weights(eta, iteration, toward))

    def front(self, etas: Sequence[float] = ETAS, iterations: Sequence[int] | None = None, toward: str = "sft",
              prompts: Sequence[str] | None = None, samples: int | None = None, seed: int = 0) -> list[dict]:
        """Measure the front: a dict a point with `iteration`, `eta` and the numbers of `PolicyMetrics`.

        `prompts` default to the held-out ones and `samples` a prompt to what makes 512 in all.
        """
        numbers = [i + 1 for i in map(self._index, iterations or range(1, len(self.iterations) + 1))]
        places = [(i, float(eta)) for i in numbers for eta in etas]
        states = [self.weights(eta, i, toward) for i, eta in places]
        return [{"iteration": i, "eta": eta, **metrics.as_dict()}
                for (i, eta), metrics in zip(places, self.measure(states, prompts, samples, seed))]

    def measure(self, states: Sequence[Weights], prompts=None, samples=None, seed=0) -> list:
        """`PolicyMetrics` of any weights of this architecture, against the SFT policy."""
        config = self.config
        encoded = encode_prompts(self.tokenizer, prompts or self.eval_prompts, room_for_prompts(self.model, config.max_new_tokens))
        samples = samples or max(1, math.ceil(EVALUATION_SAMPLES / len(encoded)))
        return evaluate_many(
            self.model, stack(states), self.sft, self.judge, encoded, self.tokenizer, gold=self.gold,
            texts=self.texts, samples=samples, max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=seed)

    @torch.no_grad()
    def completions(self, prompts: Sequence[str], eta: float = 1.0, iteration: int = -1, seed: int = 0) -> list[str]:
        """One completion a prompt at η; the same random numbers at every η."""
        forward = make_forward(self.model)
        encoded = encode_prompts(self.tokenizer, prompts).repeat(1)
        uniforms = evaluation_uniforms(seed, len(prompts), 1, self.config.max_new_tokens).unsqueeze(0)
        weights = forward.prepare(stack([self.weights(eta, iteration)]))
        rollout = sample(forward, weights, encoded, uniforms, self.tokenizer, self.config.temperature)
        return completions_text(self.tokenizer, rollout.ids, rollout.mask)

    def save_policy(self, folder, eta: float = 1.0, iteration: int = -1) -> None:
        """Any point of the front as a Hugging Face folder with its tokenizer."""
        save_policy(self.policy(eta, iteration), self.tokenizer, folder)

    def save(self, path) -> None:
        """The whole result as a run folder, which `load_result` reads. Raises ValueError if it is not empty."""
        folder = RunFolder(path, _settings(self.config, self.reward, self.train_prompts, self.eval_prompts))
        _write_start(folder, self)
        for i, iteration in enumerate(self.iterations, 1):
            for m, (policy, anchor) in enumerate(zip(iteration.policies, iteration.anchors), 1):
                rows = [row for row in self.trajectories if (row["iteration"], row["run"]) == (i, m)]
                folder.append(i, m, "trajectory.jsonl", rows)
                folder.finish_run(i, m, RunState(self.config.steps, policy, anchor, {}, {}))
            _write_iteration(folder, self, i, iteration)


def run_warp(policy, tokenizer=None, reward=None, prompts=None, config: WarpConfig | None = None, out=None,
             resume: bool = False, executor: str = "batched", *, eval_prompts=None, gold=None, texts=None,
             progress: bool = True, stop: Callable[[], bool] | None = None, source: dict | None = None) -> WarpResult:
    """Algorithm 1 on any Hugging Face causal LM.

    policy: a model, or a name or folder (then its tokenizer comes with it). reward: a function of
    TRL's signature, or a list with one for each of the M runs. prompts: a list of str, or a data set
    with a `prompt` column; without `eval_prompts` a fifth of them is held out. executor: "batched"
    trains the M runs as one program, "serial" one after the other.
    out: a run folder, written as the run goes; with resume=True an unfinished one is continued.
    gold, texts: a true reward and held-out texts, measured but never trained on. stop: asked after
    every step; when it says True the state is saved and KeyboardInterrupt raised. source: noted in
    config.json, so that the run folder can find its rewards again.

    Raises ValueError or TypeError on input that cannot be used, before anything is written, and
    ValueError or FloatingPointError, naming run and step, when a reward or gradient is not finite.
    """
    config = config or WarpConfig()
    if isinstance(policy, (str, Path)):
        policy, tokenizer = load_policy(policy)
    if tokenizer is None or reward is None or prompts is None:
        missing = [n for n, v in (("tokenizer", tokenizer), ("reward", reward), ("prompts", prompts)) if v is None]
        raise TypeError(f"run_warp needs {' and '.join(missing)}")
    if executor not in ("batched", "serial"):
        raise ValueError(f"executor must be 'batched' or 'serial', not {executor!r}")
    rewards = list(reward) if isinstance(reward, (list, tuple)) else [reward] * config.runs
    if len(rewards) != config.runs:
        raise ValueError(f"there are {len(rewards)} rewards for {config.runs} runs; give one, or one for each run")
    room = room_for_prompts(policy, config.max_new_tokens)
    encoded = encode_prompts(tokenizer, prompts, room).to(policy.device)
    encoded, held_out = (encoded, encode_prompts(tokenizer, eval_prompts, room)) if eval_prompts else hold_out(encoded)
    result = WarpResult(config, policy, tokenizer, reward, held_out.texts, _copy(parameters(policy)), gold=gold,
                        texts=texts, train_prompts=encoded.texts)
    folder = None
    if out is not None:
        folder = RunFolder(out, _settings(config, reward, encoded.texts, held_out.texts, source), resume)
        _write_start(folder, result)
    train = {"batched": train_batched, "serial": train_serial}[executor]

    theta_init = result.sft
    for i in range(1, config.iterations + 1):
        runs = [Run(config, i, m, theta_init, result.sft, rewards[m - 1]) for m in range(1, config.runs + 1)]
        states = train_runs(train, runs, encoded, result, folder, progress, stop)
        policies = [state.policy for state in states]
        theta_slerp = merge(theta_init, policies, config.merge)
        next_init = liti(theta_init, theta_slerp, config.eta)
        result.iterations.append(Iteration(theta_init, policies, [s.anchor for s in states], theta_slerp, next_init))
        if folder is not None:
            _write_iteration(folder, result, i, result.iterations[-1])
        theta_init = next_init
    load_weights(policy, result.sft)  # the caller's model is given back as it came
    return result


def merge(init: Weights, policies: Sequence[Weights], method: str) -> Weights:
    """Stage 2: the merge of an iteration's policies; a single one is taken as it is."""
    if len(policies) == 1:
        return dict(policies[0])
    return {"slerp": slerp, "lerp": lerp}[method](init, policies)


def train_runs(train, runs: list[Run], prompts: Prompts, result: WarpResult, folder: RunFolder | None,
               progress: bool, stop: Callable[[], bool] | None) -> list[RunState]:
    """The M runs of an iteration, measured as they train; saved, and taken up again, where there is a folder."""
    config, model, tokenizer = result.config, result.model, result.tokenizer
    iteration = runs[0].iteration
    done: dict[int, RunState] = {}
    if folder is not None:
        for run in runs:
            finished = folder.finished_run(iteration, run.number)
            if finished is not None:
                done[run.number] = RunState(config.steps, *finished, {}, {})
            else:
                run.state = folder.load_state(iteration, run.number)
                folder.cut_logs(iteration, run.number, run.state.step if run.state else 0)
            result.trajectories += _logged(folder, iteration, run.number)
    left = [run for run in runs if run.number not in done]
    held_out = encode_prompts(tokenizer, result.eval_prompts).to(prompts.ids.device)
    taken = sum(run.state.step if run.state else 0 for run in left)
    bar = tqdm(total=len(left) * config.steps, initial=taken, desc=f"iteration {iteration}", unit="step",
               disable=None if progress and left else True, leave=False)

    def on_step(members: Sequence[Run], step: int, states: Callable[[], list[RunState]], metrics: list[dict]) -> None:
        numbers = [run.number for run in members]
        bar.update(len(members))
        bar.set_postfix_str(f"reward {np.mean([m['reward'] for m in metrics]):.2f}", refresh=False)
        rows = [[] for _ in members]
        if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
            rows = _trajectory_points(result, members, step, states(), held_out)
            result.trajectories += [row for some in rows for row in some]
        if folder is None:
            return
        for m, metric, points in zip(numbers, metrics, rows):
            folder.append(iteration, m, "metrics.jsonl", [metric])
            folder.append(iteration, m, "trajectory.jsonl", points)
        stopping = stop is not None and stop()
        if step % config.save_every == 0 or stopping:
            folder.save_states(iteration, numbers, states())
        if stopping:
            raise KeyboardInterrupt(f"step {step} of iteration {iteration} is saved in {folder.path}")

    for group in _groups(left, one_by_one=train is train_serial):
        for run, state in zip(group, train(model, tokenizer, prompts, group, on_step)):
            done[run.number] = state
            if folder is not None:
                folder.finish_run(iteration, run.number, state)
    bar.close()
    result.trajectories.sort(key=lambda row: (row["iteration"], row["run"], row["step"]))
    return [done[run.number] for run in runs]


def _groups(runs: list[Run], one_by_one: bool) -> list[list[Run]]:
    """Runs that can train together: those at one step; each by itself for the serial executor."""
    if one_by_one:
        return [[run] for run in runs]
    by_step: dict[int, list[Run]] = {}
    for run in runs:
        by_step.setdefault(run.state.step if run.state else 0, []).append(run)
    return list(by_step.values())


def _trajectory_points(result: WarpResult, members, step, states, held_out: Prompts) -> list[list[dict]]:
    config = result.config
    metrics = evaluate_many(
        result.model, stack([state.policy for state in states]), result.sft, result.judge, held_out, result.tokenizer,
        gold=result.gold, samples=max(1, math.ceil(TRAJECTORY_SAMPLES / len(held_out))),
        max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    return [[{"iteration": run.iteration, "run": run.number, "step": step, **m.as_dict()}]
            for run, m in zip(members, metrics)]


def _logged(folder: RunFolder, iteration: int, number: int) -> list[dict]:
    path = folder.run(iteration, number) / "trajectory.jsonl"
    return read_lines(path) if path.is_file() else []


def hold_out(prompts: Prompts) -> tuple[Prompts, Prompts]:
    """Training and held-out prompts: every fifth distinct one is held out.

    Raises ValueError for fewer than two distinct prompts.
    """
    distinct = list(dict.fromkeys(prompts.texts))
    if len(distinct) < 2:
        raise ValueError("there is only one distinct prompt and none can be held out; give more, or eval_prompts")
    chosen = set(distinct[::5])
    held_out = np.array([prompts.texts.index(text) for text in distinct if text in chosen])
    rest = np.array([i for i, text in enumerate(prompts.texts) if text not in chosen])
    return prompts.batch(rest), prompts.batch(held_out)


def mean_reward(rewards: Sequence[Callable]) -> Callable:
    """The mean of several rewards, as one."""
    if len({id(reward) for reward in rewards}) == 1:
        return rewards[0]

    def mean(prompts, completions, **kwargs):
        from .rewards import accepted
        values = [reward(prompts, completions, **accepted(reward, **kwargs)) for reward in rewards]
        return np.mean(values, axis=0).tolist()

    return mean


def load_result(path, reward=None, gold=None, texts=None) -> WarpResult:
    """A finished run folder as a WarpResult. `reward` is found by config.json where it says how.

    Raises ValueError for a folder that is not one, is not finished, or was altered.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a run folder: it has no config.json")
    settings = read_json(path / "config.json")["settings"]
    config = WarpConfig(**settings["config"])
    folder = RunFolder(path, settings, resume=True)
    model, tokenizer = load_policy(path / "sft")
    prompts = read_json(path / "prompts.json")
    if reward is None:
        reward, gold, texts = find_reward(settings.get("source") or {})
    result = WarpResult(config, model, tokenizer, reward, prompts["eval"], _copy(parameters(model)), gold=gold,
                        texts=texts, train_prompts=prompts["train"])
    theta_init = result.sft
    for i in range(1, config.iterations + 1):
        finished = [folder.finished_run(i, m) for m in range(1, config.runs + 1)]
        if None in finished:
            raise ValueError(f"{path} is not finished: run {finished.index(None) + 1} of iteration {i} is missing; "
                             "continue it with --resume")
        policies = [policy for policy, _ in finished]
        merged = merge(theta_init, policies, config.merge)
        next_init = liti(theta_init, merged, config.eta)
        result.iterations.append(Iteration(theta_init, policies, [anchor for _, anchor in finished], merged, next_init))
        theta_init = next_init
        for m in range(1, config.runs + 1):
            result.trajectories += _logged(folder, i, m)
    return result


def find_reward(source: dict):
    """Reward, gold reward and held-out texts from what config.json says of their source."""
    if "preset" in source:
        from .tasks.reviews import reviews_world
        world = reviews_world(source["architecture"])
        return world.reward, world.gold, world.texts
    if "reward" in source:
        return load_reward(source["reward"]), None, None
    raise ValueError("config.json does not say where the reward is; pass it to load_result")


def _settings(config, reward, train, held_out, source=None) -> dict:
    return {"config": dataclasses.asdict(config), "reward": reward_name(reward), "source": source,
            "prompts": {"train": len(train), "eval": len(held_out)}}


def _write_start(folder: RunFolder, result: WarpResult) -> None:
    folder.write_folder(folder.path / "sft", lambda path: save_policy(result.model, result.tokenizer, path))
    write_json(folder.path / "prompts.json", {"train": result.train_prompts, "eval": result.eval_prompts})


def _write_iteration(folder: RunFolder, result: WarpResult, i: int, iteration: Iteration) -> None:
    for name, weights in (("merged", iteration.merged), ("next-init", iteration.next_init)):
        folder.write_folder(folder.iteration(i) / name, lambda path, weights=weights: save_policy(
            load_weights(copy.deepcopy(result.model), weights), result.tokenizer, path))


def _copy(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}
