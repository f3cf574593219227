"""Many settings and many seeds at once: everything that can share a batch trains as one program.

Error bars need seeds, and on small models a step is mostly overhead, so S seeds of M runs of
several settings cost little more than one run. Evaluation is batched in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from .config import WarpConfig
from .evaluation.metrics import PolicyMetrics, evaluate_many
from .liti import liti
from .policies import Weights, check_ids, encode_prompts, parameters, room_for_prompts, stack
from .precision import full_precision
from .reinforce import SHARED, Run, train_batched
from .result import ETAS, Iteration, WarpResult, copy_weights
from .slerp import lerp
from .warp import merge

POLICIES_AT_ONCE = 128  # more in one program is no faster on a CPU
NOT_OF_A_RUN = {"iterations": 1, "runs": 1, "eta": 0.0, "merge": "none", "save_every": 1}  # what no single run sees


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
        places, states = [], []
        for name in names or self.results:
            for seed, result in zip(self.seeds, self.results[name]):
                for i in iterations or range(1, len(result.iterations) + 1):
                    for eta in etas:
                        places.append({"config": name, "seed": seed, "iteration": i, "eta": float(eta)})
                        states.append(result.weights(eta, i, toward))
        return [{**place, **metrics.as_dict()} for place, metrics in zip(places, self.measure(states, samples))]

    def trajectory_rows(self, names: Sequence[str] | None = None) -> list[dict]:
        """The measurements of every run while it trained: dicts with `config`, `seed`, `iteration`, `run`, `step`."""
        return [{"config": name, "seed": seed, **row} for name in names or self.results
                for seed, result in zip(self.seeds, self.results[name]) for row in result.trajectories]

    def measure(self, states: Sequence[Weights], samples: int = 2) -> list[PolicyMetrics]:
        """Metrics of any weights, all in batches, on the held-out prompts; `samples` completions a prompt."""
        any_result = next(iter(self.results.values()))[0]
        at_once = 8 * POLICIES_AT_ONCE  # what is stacked is a copy
        metrics = []
        for start in range(0, len(states), at_once):
            metrics += any_result.measure(states[start:start + at_once], samples=samples)
        return metrics


@dataclass
class _Job:
    """One setting with one seed, and where each of its runs starts next."""

    name: str
    config: WarpConfig
    rewards: list[Callable]
    result: WarpResult
    inits: list[Weights]


def run_experiment(policy, tokenizer, reward, prompts, configs: Mapping[str, WarpConfig], seeds: Sequence[int], *,
                   eval_prompts: Sequence[str], gold=None, texts=None, rewards: Mapping[str, object] | None = None,
                   starts: Mapping[str, Callable[[WarpResult, int], Weights]] | None = None,
                   checkpoints: Callable[[str, int, int, int, int, Weights], None] | None = None,
                   trajectory_samples: int = 1, progress: bool = True) -> Experiment:
    """Algorithm 1 for every setting and seed, whatever can share a program in one, and a run that
    several settings have in common once.

    `configs` by name; each is run with every seed in place of its own. `rewards` gives some of
    them another reward, or a list with one for each run; the fronts of all are measured by
    `reward`. `starts` gives some of them another outer step: where run m of the next iteration
    starts, as a function of the result so far and m, in place of LITI; runs that start apart are
    merged around the mean of their starts. Trajectories are measured every `eval_every` steps with
    `trajectory_samples` completions a held-out prompt, and `checkpoints`, where given, is called
    with what is measured: name, seed, iteration, run, step, weights. The policies equal those of
    `run_warp` with the same settings. Raises what `run_warp` does.
    """
    seeds = tuple(seeds)
    if not configs or not seeds:
        raise ValueError("run_experiment needs at least one setting and one seed")
    policy = full_precision(policy)
    sft = copy_weights(parameters(policy))
    longest = max(config.max_new_tokens for config in configs.values())
    room = room_for_prompts(policy, longest)
    encoded, held_out = (encode_prompts(tokenizer, some, room).to(policy.device) for some in (prompts, eval_prompts))
    for some in (encoded, held_out):
        check_ids(policy, tokenizer, some)
    jobs: dict[str, list[_Job]] = {}
    for name, config in configs.items():
        own = (rewards or {}).get(name, reward)
        own = list(own) if isinstance(own, (list, tuple)) else [own] * config.runs
        if len(own) != config.runs:
            raise ValueError(f"there are {len(own)} rewards for the {config.runs} runs of {name!r}")
        jobs[name] = [_Job(name, config.replace(seed=seed), own, WarpResult(
            config.replace(seed=seed), policy, tokenizer, reward, held_out.given, sft, gold=gold, texts=texts,
            train_prompts=encoded.given), [sft] * config.runs) for seed in seeds]
    flat = [job for some in jobs.values() for job in some]
    with tqdm(desc="training", unit="step", disable=None if progress else True, leave=False) as bar:
        for i in range(1, max(job.config.iterations for job in flat) + 1):
            active = [job for job in flat if i <= job.config.iterations]
            shared: dict[tuple, tuple[list[_Job], Run]] = {}  # a run that several settings have in common trains once
            for job in active:
                for m, (init, reward_) in enumerate(zip(job.inits, job.rewards), 1):
                    key = (job.config.replace(**NOT_OF_A_RUN), m, id(init), id(reward_))
                    shared.setdefault(key, ([], Run(job.config, i, m, init, sft, reward_)))[0].append(job)
            trained = {}
            bar.set_description(f"training, iteration {i}")
            bar.reset(total=sum(run.config.steps for _, run in shared.values()))
            for group in _groups(list(shared.values())):
                on_step = _measure_trajectories(group, held_out, trajectory_samples, checkpoints, bar)
                states = train_batched(policy, tokenizer, encoded, [run for _, run in group], on_step)
                trained |= {(id(job), run.number): state for (some, run), state in zip(group, states) for job in some}
            for job in active:
                states = [trained[id(job), m] for m in range(1, job.config.runs + 1)]
                policies = [state.policy for state in states]
                init = _mean(job.inits)
                merged = merge(init, policies, job.config.merge)
                next_init = liti(init, merged, job.config.eta)
                job.result.iterations.append(
                    Iteration(init, policies, [state.anchor for state in states], merged, next_init))
                job.inits = [next_init] * job.config.runs
                if job.name in (starts or {}):
                    job.inits = [starts[job.name](job.result, m) for m in range(1, job.config.runs + 1)]
                    job.result.iterations[-1].next_init = _mean(job.inits)
    for job in flat:
        job.result.trajectories.sort(key=lambda row: (row["iteration"], row["run"], row["step"]))
    return Experiment({name: [job.result for job in some] for name, some in jobs.items()}, seeds)


def _groups(runs: list[tuple[list[_Job], Run]]) -> list[list[tuple[list[_Job], Run]]]:
    """Runs with the jobs they are of, in groups that can share a program and are not too large; equal
    learning rates side by side."""
    by_shape: dict[tuple, list] = {}
    for some, run in runs:
        by_shape.setdefault(tuple(getattr(run.config, name) for name in SHARED), []).append((some, run))
    groups = []
    for some in by_shape.values():
        some.sort(key=lambda pair: pair[1].config.lr)
        parts = -(-len(some) // POLICIES_AT_ONCE)
        groups += [list(part) for part in _split(some, parts)]
    return groups


def _mean(inits: list[Weights]) -> Weights:
    return inits[0] if all(init is inits[0] for init in inits) else lerp(inits[0], inits)


def _split(items: list, parts: int) -> list[list]:
    edges = np.linspace(0, len(items), parts + 1).round().astype(int)
    return [items[a:b] for a, b in zip(edges, edges[1:])]


def _measure_trajectories(group, held_out, samples: int, checkpoints, bar):
    """The callback that measures a group's policies as they train, those whose turn it is."""

    def on_step(runs, step, states, metrics):
        bar.update(len(runs))
        due = [e for e, run in enumerate(runs)
               if run.config.eval_every and (step % run.config.eval_every == 0 or step == run.config.steps)]
        if not due:
            return
        job = group[0][0][0]
        now = states()
        config = runs[0].config
        measured = evaluate_many(
            job.result.model, stack([now[e].policy for e in due]), job.result.sft, job.result.judge, held_out,
            job.result.tokenizer, gold=job.result.gold, samples=samples, max_new_tokens=config.max_new_tokens,
            temperature=config.temperature)
        for e, point in zip(due, measured):
            sharing, run = group[e]
            row = {"iteration": run.iteration, "run": run.number, "step": step, **point.as_dict()}
            for job in sharing:
                job.result.trajectories.append(row)
                if checkpoints is not None:
                    checkpoints(job.name, job.config.seed, run.iteration, run.number, step, now[e].policy)

    return on_step


