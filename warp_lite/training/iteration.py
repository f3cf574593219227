"""Stage 1 of an iteration: its M runs, measured as they train, saved and taken up again in a folder."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
from tqdm.auto import tqdm

from ..averaging.state_dicts import stack
from ..config import WarpConfig
from ..evaluation.metrics import evaluate_many
from ..policies.forward import make_forward
from ..policies.prompts import Prompts
from ..policies.sampling import sample
from ..result import WarpResult
from ..rewards.calling import reward_name, rollout_rewards
from ..storage.files import first_line
from .reinforce import checked_rewards, draw
from .run import Failure, Run, RunFailed, RunState
from .run_folder import RunFolder, SaveClock
from .serial import train_serial

TRAJECTORY_SAMPLES = 128  # completions a point of a trajectory is measured on, spread over the prompts


def train_runs(train, runs: list[Run], prompts: Prompts, result: WarpResult, folder: RunFolder | None, progress: bool,
               stop: Callable[[], bool] | None, on_failure: str = "stop",
               adapters=None) -> tuple[list[RunState], list[Failure]]:
    """Stage 1: the M runs of an iteration, measured as they train, and saved and taken up again in a folder.

    Returns the states of those that did not fail, in their order, and the failures.
    """
    config, iteration = result.config, runs[0].iteration
    done, failures = take_up(runs, result, folder, on_failure, train is train_serial) if folder else ({}, [])
    left = [run for run in runs if run.number not in {*done, *(failure.run for failure in failures)}]
    taken = sum(run.state.step for run in left if run.state)
    at_once = 1 if train is train_serial else max(1, len(left))
    clock = SaveClock(config.save_every, at_once * 4 * sum(tensor.nbytes for tensor in result.sft.values()))
    unscored: set[int] = set()  # the runs of which it was said that a batch has no reward
    standing = None  # gives the states after the last step that was taken

    def on_step(members: Sequence[Run], step: int, states: Callable[[], list[RunState]], metrics: list[dict]) -> None:
        nonlocal standing
        standing = states
        bar.update(len(members))
        scored = [metric["reward"] for metric in metrics if metric["reward"] is not None]
        bar.set_postfix_str(f"reward {np.mean(scored):.2f}" if scored else "reward None", refresh=False)
        for run, metric in zip(members, metrics):
            if metric["reward"] is None and run.number not in unscored:
                unscored.add(run.number)
                print(f"warp-lite: every reward is None in iteration {iteration}, run {run.number}, step {step}: such "
                      "a batch has no gradient; return a number for some of its completions", file=sys.stderr)
        points, failed = [], {}
        if step in measured_steps(config):
            points, failed = measure(result, members, step, states(), on_failure)
            result.trajectories += points
        if folder is not None:
            for run, metric in zip(members, metrics):
                folder.append(iteration, run.number, "metrics.jsonl", [metric])
            for point in points:
                folder.append(iteration, point["run"], "trajectory.jsonl", [point])
        if failed:
            raise RunFailed(failed)
        stopping = stop is not None and stop()
        if folder is not None and (stopping or clock.due(step) or step == config.steps):
            with clock.timed():
                folder.save_states(iteration, [run.number for run in members], states())
        if stopping:
            where = f"is saved in {folder.path}" if folder else "was the last; there is no folder to save it in"
            raise KeyboardInterrupt(f"step {step} of iteration {iteration} {where}")

    with tqdm(total=len(left) * config.steps, initial=taken, desc=f"iteration {iteration}", unit="step",
              disable=None if progress and left else True, leave=False) as bar:
        for group in [left[n:n + at_once] for n in range(0, len(left), at_once)]:
            while group:
                standing = None
                try:
                    if adapters is None:
                        states = train(result.model, result.tokenizer, prompts, group, on_step)
                    else:
                        states = adapters.train(result.tokenizer, prompts, group, on_step)
                except RunFailed as error:
                    states = standing() if standing else [run.start() for run in group]
                    failures += leave_out(error, group, states, folder, on_failure)
                    group = [run for e, run in enumerate(group) if e not in error.reasons]
                    continue
                for run, state in zip(group, states):
                    done[run.number] = state
                    if folder is not None:
                        if adapters is not None:
                            adapters.save(folder, run, state)
                        folder.finish_run(iteration, run.number, state)
                break
    if not done:
        way_out = f"; to train them again, remove {folder.iteration(iteration)} and resume" if folder else ""
        raise ValueError(f"all {len(runs)} runs of iteration {iteration} failed, the first because "
                         f"{failures[0].reason}{way_out}")
    result.trajectories.sort(key=lambda row: (row["iteration"], row["run"], row["step"]))
    return [done[run.number] for run in runs if run.number in done], sorted(failures, key=lambda failure: failure.run)


def take_up(runs: list[Run], result: WarpResult, folder: RunFolder, on_failure: str,
            one_by_one: bool) -> tuple[dict[int, RunState], list[Failure]]:
    """What the folder has of an iteration's runs: those that are finished, by number, and those that failed; the
    others get the state they go on from. Runs that train as one program go on from one step."""
    iteration, config, done, failures = runs[0].iteration, result.config, {}, []
    for run in runs:
        finished, failed = folder.finished_run(iteration, run.number), folder.failed_run(iteration, run.number)
        if finished is not None:
            done[run.number] = RunState(config.steps, *finished, {}, {})
        elif failed is not None:
            failures.append(Failure(run.number, *failed))
    if failures and on_failure == "stop" and not folder.finished_iteration(iteration):
        first = failures[0]
        raise ValueError(f"run {first.run} of iteration {iteration} in {folder.path} was left out ({first.reason}); "
                         "resume with --on-failure=continue, or remove "
                         f"{folder.run(iteration, first.run)} to train it again")
    left = [run for run in runs if run.number not in {*done, *(failure.run for failure in failures)}]
    for group in [[run] for run in left] if one_by_one else [left]:
        for run, state in zip(group, folder.load_states(iteration, [run.number for run in group])):
            run.state = state
            folder.cut_logs(iteration, run.number, state.step if state else 0, measured_steps(config))
    result.trajectories += [row for run in runs for row in folder.trajectory(iteration, run.number)]
    return done, failures


def leave_out(error: RunFailed, group: list[Run], states: list[RunState], folder: RunFolder | None,
              on_failure: str) -> list[Failure]:
    """Stop runs that failed at their last good step, from which the others of their group go on.

    All are saved there first, so that a process that is killed meanwhile comes to the same. With
    on_failure="stop" the error is raised.
    """
    iteration, numbers = group[0].iteration, [run.number for run in group]
    begun = folder is not None and states[0].step > 0  # else there is nothing to save yet
    if begun:
        folder.save_states(iteration, numbers, states)
    if on_failure == "stop":
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


def measured_steps(config: WarpConfig) -> list[int]:
    """The steps after which a trajectory has a point."""
    every = config.eval_every
    return sorted({*range(every, config.steps + 1, every), config.steps}) if every else []


def measure(result: WarpResult, members: Sequence[Run], step: int, states: list[RunState],
            on_failure: str) -> tuple[list[dict], dict[int, str]]:
    """The trajectory's points of runs after a step, and why some have none: a reward on the held-out prompts that
    is not finite stops its run as one in training does."""
    try:
        return trajectory_points(result, members, step, states), {}
    except ValueError:
        if on_failure == "stop":
            raise
    points, reasons = [], {}
    for e, (run, state) in enumerate(zip(members, states)):
        try:
            points += trajectory_points(result, [run], step, [state])
        except ValueError as error:
            reasons[e] = f"{error}, when run {run.number} of iteration {run.iteration} was measured after step {step}"
    return points, reasons


def trajectory_points(result: WarpResult, members: Sequence[Run], step: int, states: list[RunState]) -> list[dict]:
    """Where runs stand after a step: a dict each, on the held-out prompts."""
    config, held_out = result.config, result.held_out
    metrics = evaluate_many(
        result.model, stack([state.policy for state in states]), result.sft, result.judge, held_out, result.tokenizer,
        gold=result.gold, samples=max(1, math.ceil(TRAJECTORY_SAMPLES / len(held_out))),
        max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    return [{"iteration": run.iteration, "run": run.number, "step": step, **m.as_dict()}
            for run, m in zip(members, metrics)]


def try_rewards(result: WarpResult, prompts: Prompts, rewards: Sequence[Callable]) -> None:
    """Score what the first step will sample, and as many completions of held-out prompts.

    Raises ValueError if a reward function fails, returns the wrong number of values or one that is not finite, or
    nothing but None.
    """
    forward, config, held_out = make_forward(result.model), result.config, result.held_out
    weights = forward.prepare(stack([result.sft], result.model.device))
    for m, reward in enumerate(rewards, 1):
        run = Run(config, 1, m, result.sft, result.sft, reward)
        batch, uniforms = draw([run], 0, prompts)
        other = held_out.batch(np.arange(config.batch_size)[None] % len(held_out))
        rollout, measured = (sample(forward, weights, prompts_, uniforms, result.tokenizer, config.temperature)
                             for prompts_ in (batch, other))
        try:
            trained_on = checked_rewards([run], 0, rollout, result.tokenizer)
            for judge in (reward, result.gold) if result.gold is not None else (reward,):
                values = rollout_rewards([judge], measured, result.tokenizer)
                if judge is reward and bool(values.isnan().all()) and bool(trained_on.isnan().all()):
                    raise ValueError(f"the reward {reward_name(reward)} is None for every completion of a first trial; "
                                     "return a number for some of them")
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"the reward {reward_name(reward)} failed on a first trial with "
                             f"{type(error).__name__}: {first_line(error)}") from error
