"""Many settings and many seeds at once: everything that can share a batch trains as one program.

Error bars need seeds, and on small models a step is mostly overhead, so S seeds of M runs of
several settings cost little more than one run. Evaluation is batched in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .averaging.slerp import lerp
from .averaging.state_dicts import Weights, stack
from .config import WarpConfig, check_count
from .evaluation.metrics import PolicyMetrics, evaluate_many
from .result import ETAS, Iteration, WarpResult
from .rewards.calling import RewardFunc
from .storage.provenance import source_hash
from .task import Task, check_rewards
from .training.batched import SHARED, train_batched
from .training.iteration import MeasuredSteps
from .training.kept_runs import NOT_OF_A_RUN, KeptRuns
from .training.memory import MEMORY_SHARE, free_memory, training_memory, worth_together
from .training.run import OnStep, Run
from .warp import finish_iteration

POLICIES_AT_ONCE = 128  # more in one program is no faster on a CPU


@dataclass
class Experiment:
    """Results by name of the settings, one a seed, in the order of `seeds`."""

    results: dict[str, list[WarpResult]]
    seeds: tuple[int, ...]

    def front_rows(self, etas: Sequence[float] = ETAS, names: Sequence[str] | None = None,
                   iterations: Sequence[int] | None = None, toward: str = "sft", samples: int = 2) -> list[dict]:
        """The fronts of all seeds: a dict a point with `config`, `seed`, `iteration`, `eta` and its metrics.

        `samples` completions a held-out prompt. Seeds are the error bars, so each needs fewer
        samples than the front of a single run.
        """
        places = [(name, seed, result, i, eta) for name in names or self.results
                  for seed, result in zip(self.seeds, self.results[name])
                  for i in iterations or range(1, len(result.iterations) + 1) for eta in etas]
        measured = self.measure((result.weights(eta, i, toward) for _, _, result, i, eta in places), samples)
        return [{"config": name, "seed": seed, "iteration": i, "eta": float(eta), **metrics.as_dict()}
                for (name, seed, _, i, eta), metrics in zip(places, measured)]

    def trajectory_rows(self, names: Sequence[str] | None = None) -> list[dict]:
        """The measurements of every run while it trained: dicts with `config`, `seed`, `iteration`, `run`, `step`."""
        return [{"config": name, "seed": seed, **row} for name in names or self.results
                for seed, result in zip(self.seeds, self.results[name]) for row in result.trajectories]

    def measure(self, states: Iterable[Weights], samples: int = 2, texts: bool = False) -> list[PolicyMetrics]:
        """Metrics of any weights, in batches, on the held-out prompts; `samples` completions a prompt. `texts`: with
        the perplexity of held-out texts.

        Large weights are better made one by one, by a generator: only those of a batch are held at once.
        """
        any_result = next(iter(self.results.values()))[0]
        return any_result.measure(states, samples=samples, texts=texts)


@dataclass
class _Job:
    """One setting with one seed, and where each of its runs starts next."""

    name: str
    config: WarpConfig
    rewards: list[RewardFunc]
    result: WarpResult
    inits: list[Weights]


@dataclass
class _SharedRun:
    """A run, and the jobs that have it in common."""

    run: Run
    jobs: list[_Job]


def run_experiment(task: Task, configs: Mapping[str, WarpConfig], seeds: Sequence[int], *,
                   rewards: Mapping[str, RewardFunc | Sequence[RewardFunc]] | None = None,
                   starts: Mapping[str, Callable[[WarpResult, int], Weights]] | None = None,
                   checkpoints: Callable[[str, int, int, int, int, Weights], None] | None = None,
                   trajectory_samples: int = 1, traced: int | None = None, progress: bool = True,
                   out: str | Path | None = None) -> Experiment:
    """Algorithm 1 for every setting and seed, whatever can share a program in one, and a run that
    several settings have in common once.

    `configs` by name; each is run with every seed in place of its own. `rewards` gives some of
    them another reward, or a list with one for each run; the fronts of all are measured by the
    task's. `starts` gives some of them another outer step: where run m of the next iteration
    starts, as a function of the result so far and m, in place of LITI; runs that start apart are
    merged around the mean of their starts. Trajectories are measured every `eval_every` steps with
    `trajectory_samples` completions a held-out prompt; with `traced`, only runs 1 … `traced` of each iteration
    are, and closely where their KL grows fast (see `MeasuredSteps`). `checkpoints`, where there are any, is called
    with what is measured: name, seed, iteration, run, step, weights. The policies equal those of
    `run_warp` with the same settings. `out` is a folder in which every run is kept when it ends: the same
    call goes on where it was stopped, and weights are read from there as they are needed, so that they
    need not fit in memory. Raises TypeError for arguments of another kind, ValueError without settings or seeds, for
    settings that cannot be used, a name that is none of theirs, and where a run fails, CannotWrite where `out` cannot
    be written.
    """
    if not isinstance(task, Task):
        raise TypeError(f"task is {type(task).__name__}; pass a Task: Task.of(policy, tokenizer, reward, prompts)")
    if not isinstance(configs, Mapping) or not all(isinstance(config, WarpConfig) for config in configs.values()):
        raise TypeError(f"configs is {str(configs)[:60]}; pass a dict of WarpConfigs by their names")
    if isinstance(seeds, int):
        raise TypeError(f"seeds is the number {seeds}; pass a list of them, or range({seeds})")
    seeds = tuple(seeds)
    if not configs or not seeds:
        raise ValueError("run_experiment needs at least one setting and one seed")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {list(seeds)}, which has one twice; runs of one seed are equal, and no error bar")
    for what, by_name in (("rewards", rewards), ("starts", starts)):
        for name in (by_name or {}).keys() - configs.keys():
            raise ValueError(f"{what} has {name!r}, which is none of the settings: {', '.join(configs)}")
    check_count("trajectory_samples", trajectory_samples)
    if traced is not None:
        check_count("traced", traced)
    jobs = {name: _jobs(task, name, config, seeds, (rewards or {}).get(name, task.reward))
            for name, config in configs.items()}
    all_jobs = [job for of_config in jobs.values() for job in of_config]
    kept = None
    if out is not None:
        kept = KeptRuns(out, task.policy, task.prompts, task.eval_prompts, trajectory_samples, source_hash(__name__),
                        traced)
    with tqdm(desc="training", unit="step", disable=None if progress else True, leave=False) as bar:
        for i in range(1, max(job.config.iterations for job in all_jobs) + 1):
            active = [job for job in all_jobs if i <= job.config.iterations]
            trained = _train(task, _shared_runs(active, i), kept, trajectory_samples, traced, checkpoints, bar, i)
            for job in active:
                policies, anchors = map(list, zip(*(trained[id(job), m] for m in range(1, job.config.runs + 1))))
                init = _mean(job.inits)
                merged, next_init = finish_iteration(init, policies, job.config)
                job.result.iterations.append(Iteration(init, policies, anchors, merged, next_init))
                job.inits = [next_init] * job.config.runs
                if job.name in (starts or {}):
                    job.inits = [starts[job.name](job.result, m) for m in range(1, job.config.runs + 1)]
                    job.result.iterations[-1].next_init = _mean(job.inits)
    for job in all_jobs:
        job.result.trajectories.sort(key=lambda row: (row["iteration"], row["run"], row["step"]))
    return Experiment({name: [job.result for job in of_config] for name, of_config in jobs.items()}, seeds)


def _jobs(task: Task, name: str, config: WarpConfig, seeds: Sequence[int],
          reward: RewardFunc | Sequence[RewardFunc]) -> list[_Job]:
    """A setting with each seed, ready to start."""
    check_rewards(reward)
    rewards = list(reward) if isinstance(reward, (list, tuple)) else [reward] * config.runs
    if len(rewards) != config.runs:
        raise ValueError(f"there are {len(rewards)} rewards for the {config.runs} runs of {name!r}")
    task = task.as_in(config)
    return [_Job(name, config.replace(seed=seed), rewards, WarpResult(task, config.replace(seed=seed)),
                 [task.sft] * config.runs) for seed in seeds]


def _shared_runs(jobs: list[_Job], i: int) -> list[_SharedRun]:
    """The runs of iteration i; one that several jobs have in common is there once."""
    shared: dict[tuple, _SharedRun] = {}
    for job in jobs:
        for m, (init, reward) in enumerate(zip(job.inits, job.rewards), 1):
            key = (job.config.replace(**NOT_OF_A_RUN), m, id(init), id(reward))
            run = Run(job.config, i, m, init, job.result.sft, reward)
            shared.setdefault(key, _SharedRun(run, [])).jobs.append(job)
    return list(shared.values())


def _train(task: Task, shared: list[_SharedRun], kept: KeptRuns | None, trajectory_samples: int, traced: int | None,
           checkpoints: Callable | None, bar: tqdm, i: int) -> dict[tuple[int, int], tuple[Weights, Weights]]:
    """Policy and anchor of every run of iteration i, by its job and number: those that are kept, and the others
    trained in groups."""
    trained = {}
    bar.set_description(f"training, iteration {i}")
    bar.reset(total=sum(member.run.config.steps for member in shared))
    waiting = []
    for member in shared:
        weights = None if kept is None else kept.load(member.run, member.jobs)
        if weights is None:
            waiting.append(member)
        else:
            trained |= {(id(job), member.run.number): weights for job in member.jobs}
            bar.update(member.run.config.steps)
    for group in _groups(waiting, task):
        on_step = _measure_trajectories(group, trajectory_samples, traced, checkpoints, bar)
        states = train_batched(task.policy, task.tokenizer, task.prompts, [member.run for member in group], on_step)
        for member, state in zip(group, states):
            weights = (state.policy, state.anchor)  # Adam's moments are of no more use
            if kept is not None:
                kept.save(member.run, member.jobs, *weights)
                weights = kept.load(member.run, [])  # read from disk as they are needed, so not all are in memory
            trained |= {(id(job), member.run.number): weights for job in member.jobs}
        del states
    return trained


def _groups(shared: list[_SharedRun], task: Task) -> list[list[_SharedRun]]:
    """Runs in groups that can share a program and fit in memory; equal learning rates side by side."""
    by_shape: dict[tuple, list[_SharedRun]] = {}
    for member in shared:
        by_shape.setdefault(tuple(getattr(member.run.config, name) for name in SHARED), []).append(member)
    groups = []
    for members in by_shape.values():
        members.sort(key=lambda member: member.run.config.lr)
        groups += _split(members, math.ceil(len(members) / policies_that_fit(task, members[0].run.config)))
    return groups


def policies_that_fit(task: Task, config: WarpConfig) -> int:
    """How many runs train as one program, by the memory that is free on the policy's device and by what is worth it;
    one at least."""
    device, of_one = task.policy.device, training_memory(
        task.policy, 1, config.batch_size, task.prompts.ids.shape[-1], config.max_new_tokens).total
    fit = min(POLICIES_AT_ONCE, int(MEMORY_SHARE * free_memory(device) / of_one))
    return max(1, min(fit, worth_together(task)))


def _mean(inits: list[Weights]) -> Weights:
    """The mean of where runs start; exactly that start where they share it."""
    return inits[0] if all(init is inits[0] for init in inits) else lerp(inits[0], inits)


def _split(items: list, count: int) -> list[list]:
    """A list as so many lists, as equal in length as can be."""
    edges = np.linspace(0, len(items), count + 1).round().astype(int)
    return [items[a:b] for a, b in zip(edges, edges[1:])]


def _measure_trajectories(group: list[_SharedRun], samples: int, traced: int | None, checkpoints: Callable | None,
                          bar: tqdm) -> OnStep:
    """The callback that measures a group's policies as they train, those whose turn it is."""
    turns = [MeasuredSteps(member.run, traced) for member in group]

    def on_step(runs, step, states, metrics):
        bar.update(len(runs))
        due = [e for e, turn in enumerate(turns) if turn.is_due(step)]
        if not due:
            return
        task, current = group[0].jobs[0].result.task, states()
        measured = evaluate_many(task, stack([current[e].policy for e in due]), samples=samples, texts=False)
        for e, point in zip(due, measured):
            turns[e].note(step, point.kl)
            run = group[e].run
            row = {"iteration": run.iteration, "run": run.number, "step": step, **point.as_dict()}
            for job in group[e].jobs:
                job.result.trajectories.append(row)
                if checkpoints is not None:
                    checkpoints(job.name, job.config.seed, run.iteration, run.number, step, current[e].policy)

    return on_step
