"""What is trained and measured on a real language model: units, each kept on disk when it has ended.

A unit is one training run or one measured front, minutes of one core; what is interrupted loses no more than that. The
seeds share θ_sft and reward model, of which there is one: they are seeds of the RL runs alone.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..averaging.liti import liti
from ..averaging.slerp import angles, lerp, task_vector
from ..averaging.state_dicts import Weights, stack
from ..config import WarpConfig
from ..evaluation.limit import best_of_n_front, optimal_front, reference_rewards
from ..evaluation.metrics import evaluate_many, sample_completions
from ..policies.forward import make_forward
from ..storage.files import read_json, write_json
from ..storage.provenance import json_hash, package_versions, provenance, source_hash
from ..storage.tensors import load_tensors, save_tensors
from ..task import World
from ..training.batched import train_batched
from ..training.iteration import MeasuredSteps
from ..training.run import Run
from ..warp import finish_iteration
from ..worlds import REAL, load_world

HELD_OUT, TEXTS, LIMIT_SAMPLES_REAL = 48, 32, 96  # prompts and texts measured on, completions a prompt for the limit
PILOT_SEED = 9000  # chose the settings, and has the short runs whose angle the law reads; no claim is decided by it
SHORT = 20  # their steps, as in settings.py, of which no other change is to have finished units run again
# μ · steps = 1, as in the tiny worlds.
WARP = WarpConfig(iterations=2, runs=4, steps=32, batch_size=4, lr=2e-5, beta=0.1, mu=0.03, eta=0.4,
                  max_new_tokens=16, warmup_steps=4, eval_every=0)
WIDE = WARP.replace(runs=1, batch_size=16, merge="none")  # as many samples an iteration, in one run
SFT_BETAS_REAL = (0.03, 0.1, 0.3)
LINES = {"WARP": WARP, "batch of 16": WIDE, **{
    f"SFT, β = {beta:g}": WARP.replace(iterations=1, runs=1, merge="none", anchor="sft", beta=beta)
    for beta in SFT_BETAS_REAL}}
TRACED = {"WARP": 1, "batch of 16": 0, **{name: 1 for name in LINES if name.startswith("SFT")}}  # runs with a path
FRONT_ETAS, FAR_ETAS = (0.2, 0.4, 0.6, 0.8, 1.0), (0.3, 0.6, 1.0, 1.4, 1.8)  # the latter for LERP: shorter steps
SHOWN_ETAS, SHOWN_PROMPTS = (0.0, 0.25, 0.5, 1.0), 12  # of whose policies the completions are kept


@dataclass(frozen=True)
class RealUnit:
    """One piece of work: a `kind` of `KINDS`, of a line with one seed, at an iteration, and of which of its runs.

    `seed` is None for what θ_sft alone decides. `run` 0 is the merge.
    """

    kind: str
    seed: int | None = None
    line: str = "θ_sft"
    iteration: int = 0
    run: int = 0

    def path(self, folder: Path) -> Path:
        """Where it is kept: a name with the hash of all that it depends on."""
        words = [self.kind, self.line, "" if self.seed is None else f"seed-{self.seed}", f"{self.iteration}-{self.run}"]
        name = "-".join("".join(c for c in word if c.isalnum() or c in "-.") for word in words if word)
        return folder / "units" / f"{name}-{self.fingerprint()[:12]}.json"

    def fingerprint(self) -> str:
        """A hash of the code, the versions of packages, the settings, policy and reward model, and the unit itself."""
        shared = {name: repr(value) for name, value in globals().items() if name.isupper() and name != "KINDS"}
        return json_hash([code_of_units(), package_versions(), shared, real_world().folder.name,
                          dataclasses.astuple(self)])

    def keeps_policy(self) -> bool:
        """Whether other units read the policy that it trains: of a run with the SFT anchor the trajectory is all."""
        return self.kind == "run" and LINES[self.line].anchor == "ema"

    def completions(self) -> int:
        """What it costs, in completions sampled and scored as a measurement does it: a training step of B took as long
        as 5 + 1.6 B of them, where B is 4 and 16."""
        points = {"front": len(FRONT_ETAS), "sft": 1, "texts": 1, "geometry": 0.5, "limit": 0.5 * LIMIT_SAMPLES_REAL}
        if self.kind in points:
            return round(HELD_OUT * points[self.kind])
        config = LINES[self.line]
        if self.kind == "pilot":
            return round(2 * SHORT * (5 + 1.6 * config.batch_size))
        traced = config.steps if self.run <= TRACED[self.line] and self.iteration == 1 else 0
        return round(config.steps * (5 + 1.6 * config.batch_size) + traced * HELD_OUT)


@lru_cache(maxsize=1)
def code_of_units() -> str:
    """The hash of the code that units depend on."""
    return source_hash(__name__)


@lru_cache(maxsize=1)
def real_world() -> World:
    """The world of the experiment, its first held-out prompts and texts alone; once a process."""
    world = load_world(REAL)
    texts = world.texts[:TEXTS]
    return dataclasses.replace(world.first(HELD_OUT).as_in(WARP), texts=texts)


def units_of_seeds(seeds: Sequence[int]) -> list[RealUnit]:
    """Every unit of those seeds, the most urgent first: training runs, those of a first iteration before those of a
    second, then what measures them; among equals the longest."""
    units = [RealUnit("limit"), RealUnit("pilot", PILOT_SEED, "WARP", 1)]
    for seed in seeds:
        units += [run for name, config in LINES.items() for i in range(1, config.iterations + 1)
                  for run in runs_of(seed, name, i)]
        units += [RealUnit("front", seed, "WARP", 1, m) for m in range(WARP.runs + 1)]
        units += [RealUnit("front", seed, "LERP", 1), RealUnit("geometry", seed, "WARP", 1)]
        units += [RealUnit("front", seed, "WARP", 2), *(RealUnit("front", seed, "batch of 16", i) for i in (1, 2))]
        units += [RealUnit("texts", seed, "WARP", i) for i in (1, 2)]

    def urgency(unit: RealUnit) -> tuple[int, int]:
        return unit.iteration if unit.kind == "run" else 3, -unit.completions()

    return [RealUnit("sft"), *sorted(units, key=urgency)]


def runs_of(seed: int, line: str, iteration: int) -> list[RealUnit]:
    """The training runs of an iteration of a line."""
    return [RealUnit("run", seed, line, iteration, m) for m in range(1, LINES[line].runs + 1)]


def needs(unit: RealUnit) -> list[RealUnit]:
    """The units that must have ended before this one can start: the training runs whose policies it reads."""
    if unit.kind in ("sft", "limit", "pilot"):
        return []
    line, last = ("WARP" if unit.line == "LERP" else unit.line), unit.iteration - (unit.kind == "run")
    return [run for i in range(1, last + 1) for run in runs_of(unit.seed, line, i)]


# --- what a unit does ---------------------------------------------------------------------------


def train_unit(unit: RealUnit, folder: Path) -> list[dict]:
    """One training run; its policy, where others need it, is kept beside the unit's file. Rows: its trajectory, where
    it is traced."""
    world, config = real_world(), LINES[unit.line].replace(seed=unit.seed)
    init = world.sft if unit.iteration == 1 else merge_and_next(unit.seed, unit.line, unit.iteration - 1, folder)[1]
    run = Run(config, unit.iteration, unit.run, init, world.sft, world.reward)
    rows, turn = [], None
    if unit.run <= TRACED[unit.line] and unit.iteration == 1:
        turn = MeasuredSteps(dataclasses.replace(run, config=config.replace(eval_every=config.steps)), config.runs)

    def on_step(runs, step, states, metrics):
        if turn is not None and turn.is_due(step):
            (row,) = measured([states()[0].policy])
            turn.note(step, row["kl"])
            rows.append({"line": trajectory_name(unit.line), "seed": unit.seed, "run": unit.run, "step": step, **row})

    (state,) = train_batched(world.policy, world.tokenizer, world.prompts, [run], on_step)
    if unit.keeps_policy():
        save_tensors(dict(state.policy), unit.path(folder).with_suffix(".safetensors"))
    return rows


def trajectory_name(line: str) -> str:
    """The line of the trajectories of a line's runs."""
    return "trajectory" if line == "WARP" else line


def policies_of(seed: int, line: str, iteration: int, folder: Path) -> list[Weights]:
    """The policies of a line's runs, as they are kept. Raises ValueError for one that is missing or altered."""
    names = list(real_world().sft)
    found = []
    for unit in runs_of(seed, line, iteration):
        path = unit.path(folder)
        tensors = load_tensors(path.with_suffix(".safetensors"), "cpu", f"remove {path} to train it again")
        found.append({name: tensors[name] for name in names})
    return found


def merge_and_next(seed: int, line: str, iteration: int, folder: Path) -> tuple[Weights, Weights]:
    """A line's merge at an iteration and where its next one starts, by its policies and where they started."""
    sft = real_world().sft
    init = sft if iteration == 1 else merge_and_next(seed, line, iteration - 1, folder)[1]
    return finish_iteration(init, policies_of(seed, line, iteration, folder), LINES[line])


def front_unit(unit: RealUnit, folder: Path) -> list[dict]:
    """The LITI front from θ_sft of one run, or of a merge; perplexities of merges and of the larger batch alone."""
    sft, etas, texts = real_world().sft, FRONT_ETAS, unit.run == 0
    if unit.line == "LERP":
        theta, label, etas = lerp(sft, policies_of(unit.seed, "WARP", 1, folder)), {"line": "lerp-4"}, FAR_ETAS
    elif unit.run:
        theta = policies_of(unit.seed, unit.line, 1, folder)[unit.run - 1]
        label = {"line": "run", "run": unit.run}
    else:
        theta = merge_and_next(unit.seed, unit.line, unit.iteration, folder)[0]
        name = "slerp-4" if unit.line == "WARP" else unit.line
        label = {"line": name if unit.iteration == 1 else f"{unit.line}, 2"}
    rows = measured((liti(sft, theta, eta) for eta in etas), texts)
    return [{**label, "seed": unit.seed, "eta": eta, **row} for eta, row in zip(etas, rows)]


def sft_unit(unit: RealUnit, folder: Path) -> list[dict]:
    """θ_sft itself, the point η = 0 of every front and the start of every trajectory."""
    return [{"line": "θ_sft", "seed": None, "eta": 0.0, **measured([real_world().sft], True)[0]}]


def geometry_unit(unit: RealUnit, folder: Path) -> list[dict]:
    """Values: the mean angle between the task vectors of four runs over weight matrices, in degrees, and what LERP of
    the four leaves of their mean norm."""
    sft, policies = real_world().sft, policies_of(unit.seed, "WARP", 1, folder)
    matrices = [name for name, tensor in sft.items() if tensor.dim() > 1]
    shorter = task_vector(lerp(sft, policies), sft)
    norms = [task_vector(policy, sft) for policy in policies]
    ratios = [shorter[name].norm() / torch.stack([norm[name].norm() for norm in norms]).mean() for name in matrices]
    return [{"line": "angle", "seed": unit.seed, "value": mean_angle(sft, policies)},
            {"line": "norm of LERP", "seed": unit.seed, "value": float(torch.stack(ratios).mean())}]


def pilot_unit(unit: RealUnit, folder: Path) -> list[dict]:
    """A value: the mean angle between the task vectors of two runs of `SHORT` steps, in degrees."""
    world, config = real_world(), WARP.replace(seed=unit.seed, steps=SHORT)
    policies = []
    for number in (1, 2):  # one after the other: together they need a third more memory
        run = Run(config, 1, number, world.sft, world.sft, world.reward)
        (state,) = train_batched(world.policy, world.tokenizer, world.prompts, [run])
        policies.append(dict(state.policy))
    return [{"line": "short angle", "seed": None, "value": mean_angle(world.sft, policies)}]


def mean_angle(init: Weights, policies: Sequence[Weights]) -> float:
    """The angle in degrees between two task vectors, in the mean over pairs of policies and weight matrices."""
    matrices = [name for name, tensor in init.items() if tensor.dim() > 1]
    degrees = angles({name: init[name] for name in matrices},
                     [{name: policy[name] for name in matrices} for policy in policies])
    apart = ~torch.eye(len(policies), dtype=torch.bool)
    return float(torch.stack([degrees[name][apart].mean() for name in matrices]).mean())


def texts_unit(unit: RealUnit, folder: Path) -> list[dict]:
    """Completions of the same held-out prompts, by the same random numbers, at each of `SHOWN_ETAS`."""
    world = real_world().first(SHOWN_PROMPTS)
    theta = merge_and_next(unit.seed, unit.line, unit.iteration, folder)[0]
    prompts = world.eval_prompts.texts
    rows = []
    for eta in SHOWN_ETAS:
        (texts,) = sample_completions(world, [liti(world.sft, theta, eta)])
        cut_off = world.tokenizer(texts, add_special_tokens=False)["input_ids"]  # else each would count as ended
        judged = [world.reward(prompts, texts, cut_off), world.gold(prompts, texts)]
        rows += [{"line": "completion", "seed": unit.seed, "iteration": unit.iteration, "eta": eta, "prompt": prompt,
                  "completion": text, "reward": round(reward, 3), "gold": round(gold, 3)}
                 for prompt, text, reward, gold in zip(prompts, texts, *judged)]
    return rows


def limit_unit(unit: RealUnit, folder: Path) -> list[dict]:
    """The limit as far as the effective sample size carries it, and best-of-n, whose KL is an upper bound."""
    rewards, gold = reference_rewards(real_world(), LIMIT_SAMPLES_REAL)
    betas = np.geomspace(20, 0.1, 40) * rewards.std().item()
    return [*({"line": "limit", "seed": None, **point} for point in optimal_front(rewards=rewards, gold=gold,
                                                                                  betas=betas)),
            *({"line": "best of n", "seed": None, "kl": point["kl_bound"], **point}
              for point in best_of_n_front(rewards=rewards))]


def measured(states: Iterable[Weights], texts: bool = False) -> list[dict]:
    """Metrics of weights, an iterable of them, one by one, on the held-out prompts: a dict each; with the perplexity of
    the held-out texts or not."""
    return [{name: round(value, 5) for name, value in
             evaluate_many(real_world(), stack([state]), texts=texts)[0].as_dict().items() if value is not None}
            for state in states]


KINDS = {"run": train_unit, "front": front_unit, "sft": sft_unit, "geometry": geometry_unit, "pilot": pilot_unit,
         "texts": texts_unit, "limit": limit_unit}


# --- and how they are run ---------------------------------------------------------------------


def run_real_unit(unit: RealUnit, folder: Path) -> dict:
    """Run one unit on one thread and keep its rows, with what made them and what it cost; returns what is kept."""
    torch.set_num_threads(1)
    world, path, made_by = real_world(), unit.path(folder), {**provenance(), "code": code_of_units()[:12]}
    make_forward(world.policy)  # which is tried when it is first asked for, a quarter of a minute
    wall, cpu = time.perf_counter(), time.process_time()
    rows = KINDS[unit.kind](unit, folder)
    config = LINES[unit.line] if unit.kind == "run" else None
    kept = {"unit": dataclasses.asdict(unit), "seconds": round(time.perf_counter() - wall, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1), "steps": config.steps if config else 0,
            "samples": config.steps * config.batch_size if config else 0, "provenance": made_by,
            "world": world.folder.name, "rows": rows}
    write_json(path, kept)
    return kept


def run_real_units(seeds: Sequence[int], folder: Path, workers: int = 2, progress: bool = True) -> list[dict]:
    """What every unit of those seeds holds; those that `folder` lacks are run, `workers` processes of one thread each.

    How long the whole will take is printed before it begins, by the time that one measurement took.
    """
    start, *others = units = units_of_seeds(seeds)
    found = {start: kept_unit(start, folder) or run_real_unit(start, folder)}
    found |= {unit: kept for unit in others if (kept := kept_unit(unit, folder)) is not None}
    missing = [unit for unit in units if unit not in found]
    waiting = sum(unit.completions() for unit in missing)
    hours = waiting / HELD_OUT * found[start]["seconds"] / workers / 3600
    disk = sum(unit.keeps_policy() for unit in missing) * real_world().policy.get_memory_footprint()
    if progress and waiting:
        print(f"{len(missing)} units to run, {len(found)} kept in {folder}: about {hours:.1f} hours by "
              f"{workers} processes of one thread each, 9 GB of memory a process, {disk / 1e9:.0f} GB of disk",
              flush=True)
    with tqdm(total=waiting, unit="completion", desc="evidence", disable=None if progress else True) as bar:
        for unit, kept in in_processes(missing, found, folder, workers):
            found[unit] = kept
            bar.update(unit.completions())
            if progress:
                tqdm.write(f"{time.strftime('%H:%M')} {unit.kind} {unit.line} seed {unit.seed} iteration "
                           f"{unit.iteration} run {unit.run}: {kept['seconds']:.0f} s")
    return [found[unit] for unit in units]


def in_processes(units: Sequence[RealUnit], finished: Collection[RealUnit], folder: Path,
                 workers: int) -> Iterator[tuple[RealUnit, dict]]:
    """Run units in this process or in several, each as soon as what it needs is finished, in their order as far as
    that allows; gives each with what it holds as it ends. Ctrl-C keeps those that are finished."""
    left, finished = list(units), set(finished)

    def following() -> RealUnit | None:
        unit = next((unit for unit in left if finished.issuperset(needs(unit))), None)
        if unit is not None:
            left.remove(unit)
        return unit

    if workers == 1 or len(left) < 2:
        while unit := following():
            yield unit, run_real_unit(unit, folder)
            finished.add(unit)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_answer_no_interrupt) as pool:
        running = {}
        try:
            while True:
                while len(running) < workers and (unit := following()):
                    running[pool.submit(run_real_unit, unit, folder)] = unit
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    unit = running.pop(future)
                    finished.add(unit)
                    yield unit, future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def kept_unit(unit: RealUnit, folder: Path) -> dict | None:
    """What is kept of a unit; None where it is not, or its policy is gone that others may need."""
    path = unit.path(folder)
    if not path.is_file() or unit.keeps_policy() and not path.with_suffix(".safetensors").is_file():
        return None
    try:
        return read_json(path)
    except ValueError:  # damaged: run again
        return None


def _answer_no_interrupt() -> None:
    """Ctrl-C reaches every process of a terminal; the one that waits for the others answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
