"""Many settings and many seeds at once: everything that can share a batch trains as one program.

Error bars need seeds, and on small models a step is mostly overhead, so S seeds of M runs of
several settings cost little more than one run. Evaluation is batched in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .averaging.liti import liti
from .averaging.merging import merge
from .averaging.slerp import lerp
from .averaging.state_dicts import Weights, copy_weights, parameters, stack
from .config import WarpConfig
from .evaluation.metrics import PolicyMetrics, evaluate_many
from .policies.loading import check_whole
from .policies.precision import full_precision
from .policies.prompts import check_ids, encode_prompts, room_for_prompts
from .result import ETAS, Iteration, WarpResult
from .rewards.calling import reward_name
from .storage.files import load_tensors, read_json, save_tensors, weights_hash, write_json
from .storage.provenance import __version__, json_hash
from .training.batched import SHARED, train_batched
from .training.memory import MEMORY_SHARE, free_memory, training_memory
from .training.run import Run

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

    def measure(self, states: Iterable[Weights], samples: int = 2) -> list[PolicyMetrics]:
        """Metrics of any weights, in batches, on the held-out prompts; `samples` completions a prompt.

        Large weights are better made one by one, by a generator: only those of a batch are held at once.
        """
        any_result = next(iter(self.results.values()))[0]
        return any_result.measure(states, samples=samples)


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
                   trajectory_samples: int = 1, progress: bool = True, out=None) -> Experiment:
    """Algorithm 1 for every setting and seed, whatever can share a program in one, and a run that
    several settings have in common once.

    `configs` by name; each is run with every seed in place of its own. `rewards` gives some of
    them another reward, or a list with one for each run; the fronts of all are measured by
    `reward`. `starts` gives some of them another outer step: where run m of the next iteration
    starts, as a function of the result so far and m, in place of LITI; runs that start apart are
    merged around the mean of their starts. Trajectories are measured every `eval_every` steps with
    `trajectory_samples` completions a held-out prompt, and `checkpoints`, where given, is called
    with what is measured: name, seed, iteration, run, step, weights. The policies equal those of
    `run_warp` with the same settings. `out` is a folder in which every run is kept when it ends: the same
    call goes on where it was stopped, and weights are read from there as they are needed, so that they
    need not fit in memory. Raises what `run_warp` does.
    """
    seeds = tuple(seeds)
    if not configs or not seeds:
        raise ValueError("run_experiment needs at least one setting and one seed")
    check_whole(policy)
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
            kept = None if out is None else _KeptRuns(out, policy, encoded, held_out, trajectory_samples)
            left = []
            for some, run in shared.values():
                found = None if kept is None else kept.load(run, some)
                if found is None:
                    left.append((some, run))
                else:
                    trained |= {(id(job), run.number): found for job in some}
                    bar.update(run.config.steps)
            for group in _groups(left, policy, encoded):
                on_step = _measure_trajectories(group, held_out, trajectory_samples, checkpoints, bar)
                states = train_batched(policy, tokenizer, encoded, [run for _, run in group], on_step)
                for (some, run), state in zip(group, states):
                    ended = (state.policy, state.anchor)  # Adam's moments are of no more use
                    if kept is not None:
                        kept.save(run, some, *ended)
                        ended = kept.load(run, [])
                    trained |= {(id(job), run.number): ended for job in some}
                del states
            for job in active:
                policies, anchors = map(list, zip(*(trained[id(job), m] for m in range(1, job.config.runs + 1))))
                init = _mean(job.inits)
                merged = merge(init, policies, job.config.merge)
                next_init = liti(init, merged, job.config.eta)
                job.result.iterations.append(
                    Iteration(init, policies, anchors, merged, next_init))
                job.inits = [next_init] * job.config.runs
                if job.name in (starts or {}):
                    job.inits = [starts[job.name](job.result, m) for m in range(1, job.config.runs + 1)]
                    job.result.iterations[-1].next_init = _mean(job.inits)
    for job in flat:
        job.result.trajectories.sort(key=lambda row: (row["iteration"], row["run"], row["step"]))
    return Experiment({name: [job.result for job in some] for name, some in jobs.items()}, seeds)


class _KeptRuns:
    """The runs of an experiment in a folder, each by a hash of all that it depends on: weights and measurements."""

    def __init__(self, out, policy, prompts, held_out, samples: int):
        self.folder = Path(out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.names, self.hashes = [name for name, _ in policy.named_parameters()], {}
        self.about = [__version__, json_hash([prompts.given, held_out.given, samples])]

    def path(self, run: Run) -> Path:
        """Where a run's weights are, or will be."""
        hashes = [self.hashes.setdefault(id(weights), (weights_hash(weights), weights))[0]  # kept alive: so is its id
                  for weights in (run.init, run.sft)]
        settings = dataclasses.asdict(run.config.replace(**NOT_OF_A_RUN))
        key = json_hash([*self.about, settings, run.iteration, run.number, reward_name(run.reward), hashes])
        return self.folder / f"run-{key[:16]}.safetensors"

    def load(self, run: Run, jobs: list[_Job]) -> tuple[Weights, Weights] | None:
        """The policy and anchor of a run that has ended, its measurements given to the jobs; else None.

        Raises ValueError where the file cannot be read.
        """
        path = self.path(run)
        if not path.is_file():
            return None
        tensors = load_tensors(path, "cpu", "remove it to train that run again")
        for job in jobs:
            job.result.trajectories += read_json(path.with_suffix(".json"))["trajectory"]
        return tuple({name: tensors[f"{part}.{name}"] for name in self.names} for part in ("policy", "anchor"))

    def save(self, run: Run, jobs: list[_Job], policy: Weights, anchor: Weights) -> None:
        """Keep a run that has ended; the weights come last, since they say that it is whole."""
        rows = [row for row in jobs[0].result.trajectories
                if (row["iteration"], row["run"]) == (run.iteration, run.number)]
        write_json(self.path(run).with_suffix(".json"), {"trajectory": rows})
        parts = {"policy": policy, "anchor": anchor}
        save_tensors({f"{part}.{name}": w for part, weights in parts.items() for name, w in weights.items()},
                     self.path(run))


def _groups(runs: list[tuple[list[_Job], Run]], policy, prompts) -> list[list[tuple[list[_Job], Run]]]:
    """Runs with the jobs they are of, in groups that can share a program and fit in memory; equal
    learning rates side by side."""
    by_shape: dict[tuple, list] = {}
    for some, run in runs:
        by_shape.setdefault(tuple(getattr(run.config, name) for name in SHARED), []).append((some, run))
    groups = []
    for some in by_shape.values():
        some.sort(key=lambda pair: pair[1].config.lr)
        parts = -(-len(some) // policies_that_fit(policy, prompts, some[0][1].config))
        groups += [list(part) for part in _split(some, parts)]
    return groups


def policies_that_fit(policy, prompts, config: WarpConfig) -> int:
    """How many runs train as one program, by the memory that is free on the policy's device; one at least."""
    one = training_memory(policy, 1, config.batch_size, prompts.ids.shape[-1], config.max_new_tokens).total
    return max(1, min(POLICIES_AT_ONCE, int(MEMORY_SHARE * free_memory(policy.device) / one)))


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
