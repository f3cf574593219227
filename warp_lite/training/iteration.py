"""Stage 1 of an iteration: its M runs, measured as they train, saved and taken up again in a folder."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from ..averaging.state_dicts import Weights, bytes_of, stack
from ..config import WarpConfig
from ..evaluation.metrics import evaluate_many
from ..policies.sampling import Policies, Rollout
from ..rewards.calling import reward_name, rollout_rewards
from ..storage.files import first_line
from ..task import Task
from .executors import Trainer
from .reinforce import checked_rewards, draw
from .run import Failure, Run, RunFailed, RunState
from .run_folder import RunFolder, SaveClock

TRAJECTORY_SAMPLES = 128  # completions a point of a trajectory is measured on, spread over the prompts
# Of a run that is traced: nats up to which it is measured closely, nats and steps from one point to the next
CLOSE_UP_TO, CLOSE, WIDEST = 5.0, 0.2, 4


@dataclass(frozen=True)
class Trained:
    """What stage 1 leaves of an iteration: the policies and anchors of the runs that did not fail, in their order, the
    failures, and what was measured of all of them on the way."""

    policies: list[Weights]
    anchors: list[Weights]
    failures: list[Failure]
    trajectory: list[dict]


@dataclass
class Stage1:
    """Trains the runs of an iteration by a trainer, in a run folder where there is one.

    `stop` is asked after every step; when it says True the states are saved and KeyboardInterrupt is raised.
    `on_failure`: "stop" raises RunFailed, "continue" leaves a run that failed out.
    """

    task: Task
    config: WarpConfig
    trainer: Trainer
    folder: RunFolder | None = None
    progress: bool = True
    stop: Callable[[], bool] | None = None
    on_failure: str = "stop"

    def train(self, runs: list[Run]) -> Trained:
        """Take the runs of an iteration to their ends, or as far as they come.

        Raises RunFailed, ValueError where all of them failed or the trainer returns too few, KeyboardInterrupt when it
        was told to stop.
        """
        config, folder, iteration = self.config, self.folder, runs[0].iteration
        ended, failures, trajectory = {}, [], []
        if folder is not None:
            self.trainer.ahead(runs, folder, self.progress, self.stop, self.on_failure)
            ended, failures, trajectory = self._take_up(runs)
        waiting = _not_over(runs, ended, failures)
        at_once = max(1, min(self.trainer.at_once, len(waiting)))
        steps_taken = sum(run.state.step for run in waiting if run.state)
        with tqdm(total=len(waiting) * config.steps, initial=steps_taken, desc=f"iteration {iteration}", unit="step",
                  disable=None if self.progress and waiting else True, leave=False) as bar:
            clock = SaveClock(config.save_every, at_once * 4 * bytes_of(self.task.sft))
            watch = _Watch(self, bar, clock, trajectory)
            for group in self._programs(runs, waiting):
                states, failed = self._train_group(group, watch)
                ended |= states
                failures += failed
        if not ended:
            way_out = f"; to train them again, remove {folder.iteration(iteration)} and resume" if folder else ""
            raise ValueError(f"all {len(runs)} runs of iteration {iteration} failed, the first because "
                             f"{failures[0].reason}{way_out}")
        states = [ended[run.number] for run in runs if run.number in ended]
        return Trained([state.policy for state in states], [state.anchor for state in states],
                       sorted(failures, key=lambda failure: failure.run),
                       sorted(trajectory, key=lambda row: (row["run"], row["step"])))

    def _programs(self, runs: list[Run], waiting: list[Run]) -> list[list[Run]]:
        """The runs that wait, by program: that of a run is the same whichever of an iteration's `runs` are over."""
        size, numbers = max(1, min(self.trainer.at_once, len(runs))), {run.number for run in waiting}
        programs = [[run for run in runs[start:start + size] if run.number in numbers]
                    for start in range(0, len(runs), size)]
        return [program for program in programs if program]

    def _train_group(self, group: list[Run], watch: _Watch) -> tuple[dict[int, RunState], list[Failure]]:
        """Train runs that share a program: the states of those that ended, by number, and those that failed on the
        way, without which the others went on."""
        failures = []
        while group:
            watch.states = None
            try:
                states = self.trainer.train(group, watch.on_step)
            except RunFailed as error:
                last_good = watch.states() if watch.states else [run.start() for run in group]
                failures += self._leave_out(error, group, last_good)
                group = [run for e, run in enumerate(group) if e not in error.reasons]
                continue
            if len(states) != len(group):
                raise ValueError(f"the trainer {self.trainer.name!r} returned {len(states)} states for the "
                                 f"{len(group)} runs that it was given; it must return one for each")
            if self.folder is not None:
                for run, state in zip(group, states):
                    self.trainer.keep(self.folder, run, state)
                    self.folder.finish_run(run.iteration, run.number, state)
            return {run.number: RunState.finished(state.step, state.policy, state.anchor)  # the moments are let go
                    for run, state in zip(group, states)}, failures
        return {}, failures

    def _take_up(self, runs: list[Run]) -> tuple[dict[int, RunState], list[Failure], list[dict]]:
        """What the folder has of an iteration's runs: those that are finished, by number, those that failed, and what
        was measured; the others get the state they go on from. Runs of one program go on from one step."""
        iteration, config, folder, ended, failures = runs[0].iteration, self.config, self.folder, {}, []
        for run in runs:
            finished, failed = folder.finished_run(iteration, run.number), folder.failed_run(iteration, run.number)
            if finished is not None:
                ended[run.number] = RunState.finished(config.steps, *finished)
            elif failed is not None:
                failures.append(Failure(run.number, *failed))
        if failures and self.on_failure == "stop" and not folder.finished_iteration(iteration):
            first = failures[0]
            raise ValueError(f"run {first.run} of iteration {iteration} in {folder.path} was left out "
                             f"({first.reason}); resume with --on-failure=continue, or remove "
                             f"{folder.run(iteration, first.run)} to train it again")
        waiting = _not_over(runs, ended, failures)
        for group in self._programs(runs, waiting):
            for run, state in zip(group, folder.load_states(iteration, [run.number for run in group])):
                run.state = state
                folder.cut_logs(iteration, run.number, state.step if state else 0, measured_steps(config))
        return ended, failures, [row for run in runs for row in folder.trajectory(iteration, run.number)]

    def _leave_out(self, error: RunFailed, group: list[Run], states: list[RunState]) -> list[Failure]:
        """Stop runs that failed at their last good step, from which the others of their group go on.

        All are saved there first, so that a process that is killed meanwhile comes to the same. With
        on_failure="stop" the error is raised.
        """
        iteration, folder, numbers = group[0].iteration, self.folder, [run.number for run in group]
        begun = folder is not None and states[0].step > 0  # else there is nothing to save yet
        if begun:
            folder.save_states(iteration, numbers, states)
        if self.on_failure == "stop":
            saved = f"; step {states[0].step} is saved in {folder.path}" if begun else ""
            text = f"{error}{saved}; on-failure=continue would merge the other runs without it"
            raise RunFailed({**error.reasons, min(error.reasons): text}) from error
        failures = []
        for e, (run, state) in enumerate(zip(group, states)):
            run.state = state if state.step else None  # else it starts anew, with adapters too
            if e in error.reasons:
                failures.append(Failure(run.number, state.step, error.reasons[e], state.policy, state.anchor))
                if folder is not None:
                    folder.finish_run(iteration, run.number, state, error.reasons[e])
        return failures


@dataclass
class _Watch:
    """What is done after every step of an iteration's runs: the bar moves on, runs are measured into `trajectory`, and
    the folder is written to."""

    stage: Stage1
    bar: tqdm
    clock: SaveClock
    trajectory: list[dict]
    states: Callable[[], list[RunState]] | None = None  # gives those after the last step that a group took
    unscored: set[int] = field(default_factory=set)  # runs of which it was said that a batch has no reward

    def on_step(self, members: Sequence[Run], step: int, states: Callable[[], list[RunState]],
                metrics: list[dict]) -> None:
        """Raises RunFailed where a run cannot be measured, KeyboardInterrupt where the stage was told to stop."""
        stage, folder, iteration = self.stage, self.stage.folder, members[0].iteration
        self.states = states
        self._say(members, step, metrics)
        points, failed = [], {}
        if step in measured_steps(stage.config):
            points, failed = self._measure(members, step, states())
            self.trajectory.extend(points)
        if folder is not None:
            for run, metric in zip(members, metrics):
                folder.append(iteration, run.number, "metrics.jsonl", [metric])
            for point in points:
                folder.append(iteration, point["run"], "trajectory.jsonl", [point])
        if failed:
            raise RunFailed(failed)
        stopping = stage.stop is not None and stage.stop()
        if folder is not None and (stopping or self.clock.due(step) or step == stage.config.steps):
            with self.clock.timed():
                folder.save_states(iteration, [run.number for run in members], states())
        if stopping:
            where = f"is saved in {folder.path}" if folder else "was the last; there is no folder to save it in"
            raise KeyboardInterrupt(f"step {step} of iteration {iteration} {where}")

    def _measure(self, members: Sequence[Run], step: int,
                 states: list[RunState]) -> tuple[list[dict], dict[int, str]]:
        """The trajectory's points of runs after a step, and why some have none: a reward on the held-out prompts that
        is not finite stops its run as one in training does."""
        try:
            return trajectory_points(self.stage.task, members, step, states), {}
        except ValueError:
            if self.stage.on_failure == "stop":
                raise
        points, reasons = [], {}
        for e, (run, state) in enumerate(zip(members, states)):
            try:
                points += trajectory_points(self.stage.task, [run], step, [state])
            except ValueError as error:
                reasons[e] = (f"{error}, when run {run.number} of iteration {run.iteration} was measured after "
                              f"step {step}")
        return points, reasons

    def _say(self, members: Sequence[Run], step: int, metrics: list[dict]) -> None:
        """Move the bar on, and say once of each run that a batch of it has no reward."""
        self.bar.update(len(members))
        scored = [metric["reward"] for metric in metrics if metric["reward"] is not None]
        self.bar.set_postfix_str(f"reward {np.mean(scored):.2f}" if scored else "reward None", refresh=False)
        for run, metric in zip(members, metrics):
            if metric["reward"] is None and run.number not in self.unscored:
                self.unscored.add(run.number)
                print(f"warp-lite: every reward is None in iteration {run.iteration}, run {run.number}, step {step}: "
                      "such a batch has no gradient; return a number for some of its completions", file=sys.stderr)


def _not_over(runs: Sequence[Run], ended: Collection[int], failures: Sequence[Failure]) -> list[Run]:
    """The runs that are neither among those `ended`, by number, nor among the failures."""
    over = {*ended, *(failure.run for failure in failures)}
    return [run for run in runs if run.number not in over]


def measured_steps(config: WarpConfig) -> list[int]:
    """The steps after which a trajectory has a point."""
    every = config.eval_every
    return sorted({*range(every, config.steps + 1, every), config.steps}) if every else []


class MeasuredSteps:
    """After which steps of a run a trajectory has a point: every `eval_every`, as in `measured_steps`, and below
    `CLOSE_UP_TO` nats more often.

    With `traced` only runs 1 … `traced` have any. Until a point lies above `CLOSE_UP_TO` the next follows so soon that
    KL, at its pace, grows by `CLOSE` at most, and `WIDEST` steps later at the latest; where KL grows fast, after every
    step. On a straight line between two points that are nats apart, a reward at a KL would be that of no policy.
    """

    def __init__(self, run: Run, traced: int | None = None):
        self.steps = set(measured_steps(run.config)) if traced is None or run.number <= traced else set()
        self.close = traced is not None and bool(self.steps)
        self.step, self.kl, self.next = 0, None, 1  # of the last point, and after which step the next is due

    def is_due(self, step: int) -> bool:
        """Whether the run is to be measured after a step."""
        return step in self.steps or (self.close and step >= self.next)

    def note(self, step: int, kl: float) -> None:
        """Take in a measurement, the KL in nats, to decide when the next is due."""
        pace = CLOSE if self.kl is None else max((kl - self.kl) / (step - self.step), CLOSE / WIDEST)
        self.step, self.kl, self.next = step, kl, step + max(1, int(CLOSE / pace))
        self.close = self.close and kl <= CLOSE_UP_TO


def trajectory_points(task: Task, members: Sequence[Run], step: int, states: list[RunState]) -> list[dict]:
    """Where runs stand after a step: a dict each, on the held-out prompts, perplexity left out."""
    samples = max(1, math.ceil(TRAJECTORY_SAMPLES / len(task.eval_prompts)))
    metrics = evaluate_many(task, stack([state.policy for state in states]), samples=samples, texts=False)
    return [{"iteration": run.iteration, "run": run.number, "step": step, **m.as_dict()}
            for run, m in zip(members, metrics)]


def try_rewards(task: Task, config: WarpConfig, progress: bool = False) -> None:
    """Score what the first step of each run will sample, and as many completions of held-out prompts.

    With `progress` a bar counts the batches: those of a large policy take a minute. Raises ValueError if a reward
    function fails, returns the wrong number of values or one that is not finite, or nothing but None.
    """
    policies, held_out = Policies.of(task.policy, [task.sft]), task.eval_prompts
    with tqdm(total=2 * config.runs, desc="trying the reward", unit="batch", leave=False,
              disable=None if progress else True) as bar:
        for m, reward in enumerate(task.rewards(config.runs), 1):
            run = Run(config, 1, m, task.sft, task.sft, reward)
            batch, uniforms = draw([run], 0, task.prompts)
            other = held_out.batch(np.arange(config.batch_size)[None] % len(held_out))
            rollouts = []
            for prompts in (batch, other):
                rollouts.append(policies.sample(prompts, uniforms, task.tokenizer, config.temperature))
                bar.update()
            try_reward(task, run, *rollouts)


def try_reward(task: Task, run: Run, rollout: Rollout, measured: Rollout) -> None:
    """Score the completions of a training step and of held-out prompts. Raises ValueError as `try_rewards` does."""
    reward = run.reward
    try:
        trained_on = checked_rewards([run], 0, rollout, task.tokenizer)
        for judge in (reward,) if task.gold is None else (reward, task.gold):
            values = rollout_rewards([judge], measured, task.tokenizer)
            if judge is reward and bool(values.isnan().all()) and bool(trained_on.isnan().all()):
                raise ValueError(f"the reward {reward_name(reward)} is None for every completion of a first trial; "
                                 "return a number for some of them")
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the reward {reward_name(reward)} failed on a first trial with "
                         f"{type(error).__name__}: {first_line(error)}") from error
