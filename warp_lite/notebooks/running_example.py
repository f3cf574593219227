"""The running example of the notebooks on the stages: one WARP of several seeds, trained once, kept, and found again.

All of it lies in one folder, under a hash of what it depends on: the code, the versions of packages, θ_sft, the plan.
Runs are kept as `run_experiment` keeps them, measurements by the hash of the weights that were measured.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from torch import Tensor

from ..averaging.state_dicts import Weights
from ..config import WarpConfig
from ..evaluation.limit import BETAS, limit_rewards, optimal_front
from ..evaluation.metrics import PolicyMetrics
from ..experiment import Experiment, run_experiment
from ..result import WarpResult, stacked_together
from ..storage.files import read_json, write_bytes
from ..storage.provenance import json_hash, package_versions, source_hash, writable_cache
from ..storage.tensors import weights_hash
from ..task import Task
from ..training.kept_runs import reward_key
from ..viewing.explorer.grid import build_grid, completions_of
from . import plans
from .start import Lab


@dataclass
class RunningExample:
    """WARP of several seeds with one setting, `config`: what the notebooks on the stages have in common.

    It is trained when it is first asked for. `results` has one WarpResult a seed: its iterations with init, policies,
    anchors and merge. The runs 1 … `traced` of each iteration were measured while they trained, closely (see
    `MeasuredSteps`): `paths`.
    """

    task: Task
    config: WarpConfig
    seeds: Sequence[int]
    traced: int
    samples: int  # a held-out prompt, for the limit
    folder: Path

    @cached_property
    def experiment(self) -> Experiment:
        """WARP of every seed, read from the folder or trained. Raises what `run_experiment` raises."""
        plans.announce(self.task.policy, self.config, 2 * self.config.runs * len(self.seeds))
        return self.train({"WARP": self.config})

    @property
    def results(self) -> list[WarpResult]:
        """The result of each seed, in their order."""
        return self.experiment.results["WARP"]

    @property
    def sft(self) -> Weights:
        """θ_sft, from which every seed starts and which every KL is to."""
        return self.task.sft

    def one_run(self, **changes: object) -> WarpConfig:
        """The settings of a single run of the example, but for the changes."""
        return self.config.replace(**{"runs": 1, "iterations": 1, "merge": "none", **changes})

    @cached_property
    def typical(self) -> WarpResult:
        """The result of the seed whose first merge has the median reward: what is shown of one seed is no outlier."""
        rewards = [metrics.reward for metrics in self.measure(result.iterations[0].merged for result in self.results)]
        return self.results[sorted(range(len(rewards)), key=rewards.__getitem__)[len(rewards) // 2]]

    def leashes(self) -> Experiment:
        """Single runs with no anchor, and with the SFT policy as anchor at the example's β: the first notebook's."""
        return self.train({"no anchor": self.one_run(anchor="none"),
                           f"SFT β={self.config.beta:g}": self.one_run(anchor="sft")})

    def train(self, configs: Mapping[str, WarpConfig], seeds: Sequence[int] | None = None) -> Experiment:
        """Settings from the same start, traced, and kept beside the example: a run that was trained before is not
        trained again. Raises what `run_experiment` raises.

        Ask for settings that several notebooks need by themselves: runs of one call train as one program, which rounds
        by how many they are.
        """
        return run_experiment(self.task, configs, self.seeds if seeds is None else seeds, traced=self.traced,
                              out=self.folder)

    def measure(self, states: Iterable[Weights], samples: int = 2, texts: bool = False) -> list[PolicyMetrics]:
        """Metrics of any weights on the held-out prompts, `samples` completions each, measured once and kept.

        Large weights are better made one by one, by a generator: only those that are measured together are held.
        `texts`: with the perplexity of held-out texts. Raises ValueError where what is kept cannot be read.
        """
        found, states = [], iter(states)
        while batch := list(islice(states, stacked_together(self.task, samples))):  # large ones are made as they come
            hashes = [weights_hash(dict(sorted(state.items()))) for state in batch]
            key = json_hash([self._about, samples, texts, hashes])
            path = self.folder / f"measured-{key[:16]}.json"
            if not path.is_file():
                measured = WarpResult(self.task, self.config).measure(batch, samples=samples, texts=texts)
                write_bytes(path, json.dumps([dataclasses.asdict(metrics) for metrics in measured]).encode())  # NaN too
            found += [PolicyMetrics(**values) for values in read_json(path)]
        return found

    def sweep(self, make: Callable[[WarpResult, float], Weights], values: Sequence[float],
              texts: bool = False) -> list[dict]:
        """The metrics of the weights `make(result, value)`: a row a seed and value, with `seed` and `value`."""
        places = [(result, value) for result in self.results for value in values]
        measured = self.measure((make(result, value) for result, value in places), texts=texts)
        return [{"seed": result.config.seed, "value": value, **metrics.as_dict()}
                for (result, value), metrics in zip(places, measured)]

    @cached_property
    def paths(self) -> list[dict]:
        """What was measured of the traced runs of each iteration while they trained, from where they started, as their
        step 0: rows with `seed`, `iteration`, `run`, `step`."""
        return self.from_start(self.experiment)

    def path(self, iteration: int, run: int) -> list[dict]:
        """Of `paths` those of one iteration, from 1, and of one run of each seed, from 1."""
        return [row for row in self.paths if (row["iteration"], row["run"]) == (iteration, run)]

    def from_start(self, experiment: Experiment) -> list[dict]:
        """The trajectories of an experiment of this task with where each run started as its step 0: rows with
        `config`, `seed`, `iteration`, `run`, `step`."""
        rows = experiment.trajectory_rows()
        runs = sorted({(row["config"], row["seed"], row["iteration"], row["run"]) for row in rows})
        starts = [(config, seed, i) for config, seed, i in dict.fromkeys(run[:3] for run in runs) if i > 1]
        inits = [experiment.results[config][experiment.seeds.index(seed)].iterations[i - 1].init
                 for config, seed, i in starts]
        sft, *others = self.measure([self.sft, *inits])
        of_start = dict(zip(starts, others))
        return [{"config": config, "seed": seed, "iteration": i, "run": m, "step": 0,
                 **of_start.get((config, seed, i), sft).as_dict()} for config, seed, i, m in runs] + rows

    @cached_property
    def sft_rewards(self) -> tuple[Tensor, Tensor | None]:
        """Rewards, and gold rewards where there are any, (prompts, samples) of completions of the SFT policy."""
        plans.announce(self.task.policy, self.config, completions=len(self.task.eval_prompts) * self.samples)
        return limit_rewards(self.task, self.samples)

    @cached_property
    def limit(self) -> list[dict]:
        """The limit of every method on the held-out prompts, as far as it can be trusted (see `optimal_front`)."""
        rewards, gold = self.sft_rewards
        return optimal_front(rewards=rewards, gold=gold, betas=[beta * rewards.std().item() for beta in BETAS])

    @cached_property
    def grid(self) -> dict:
        """What the explorer shows of `typical`, its smaller grid (see `build_grid`), measured once and kept."""
        key = json_hash([self._about, source_hash("warp_lite.viewing.explorer.grid"), self.typical.config.seed,
                         self.samples])
        path = self.folder / f"grid-{key[:16]}.json"
        if not path.is_file():
            plans.announce(self.task.policy, self.config, completions=completions_of(self.typical, fast=True))
            grid = build_grid(self.typical, fast=True, limit=self.limit, progress=False)
            write_bytes(path, json.dumps(grid).encode())
        return read_json(path)

    @cached_property
    def _about(self) -> list:
        """All that a measurement depends on but the weights."""
        task = self.task
        return [source_hash("warp_lite.evaluation.metrics"), package_versions(), task.max_new_tokens, task.temperature,
                json_hash(task.eval_prompts.given), json_hash(list(task.texts or ())), weights_hash(task.sft),
                reward_key(task.judge), None if task.gold is None else reward_key(task.gold)]


def running_example(lab: Lab) -> RunningExample:
    """The example of a notebook's world; what is kept of it is removed where RETRAIN says so.

    A tiny world's lies in the cache folder, a real one's with its runs. Raises ValueError where that cannot be written.
    """
    task, plan = lab.world, plans.plan("running_example", lab.world.policy, lab.fast, lab.model)
    config = WarpConfig(iterations=2, runs=plan.runs, steps=plan.steps, batch_size=4, lr=plan.lr, beta=0.3, mu=0.01,
                        eta=0.3, eval_every=plan.eval_every, seed=lab.seed)
    seeds = tuple(range(lab.seed, lab.seed + plan.seeds))
    key = json_hash([source_hash("warp_lite.experiment"), package_versions(), weights_hash(task.sft),
                     dataclasses.asdict(config), seeds, plan.traced])
    folder = (writable_cache() if lab.keep is None else lab.keep) / f"running-example-{key[:12]}"
    if lab.retrain:
        shutil.rmtree(folder, ignore_errors=True)
    return RunningExample(task.as_in(config), config, seeds, plan.traced, plan.limit, folder)
