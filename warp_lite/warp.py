"""Algorithm 1: iterations of M RL runs, their merge, and the interpolation back.

    θ_init ← θ_sft
    for i = 1 … I:
        for m = 1 … M, in parallel:
            θ^m ← RL from θ_init, with a moving anchor             stage 1: reinforce.py, ema.py
        θ_slerp ← slerp(θ_init, {θ^m}, 1/M)                        stage 2: slerp.py
        θ_init ← (1 − η) θ_init + η θ_slerp                        stage 3: liti.py
    return {(1 − η) θ_sft + η θ_slerp : 0 ≤ η ≤ 1}                 the front: result.py
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .config import WarpConfig
from .evaluation.metrics import encode_texts, evaluate_many
from .files import locked
from .forward import make_forward
from .liti import liti
from .memory import free_memory, settings_that_fit, training_memory
from .policies import (
    Prompts,
    Weights,
    check_ids,
    encode_prompts,
    first_line,
    load_policy,
    load_weights,
    parameters,
    room_for_prompts,
    sample,
    stack,
)
from .precision import compute_dtype, full_precision
from .reinforce import Run, RunFailed, RunState, checked_rewards, draw, forward_for, train_batched, train_serial
from .result import Failure, Iteration, WarpResult, copy_weights, run_settings, write_iteration, write_start
from .rewards import reward_name, rollout_rewards
from .runs import RunFolder, SaveClock, check_out, pinned_threads
from .slerp import lerp, slerp
from .weights import is_finite

EXECUTORS = {"batched": train_batched, "serial": train_serial, "ray": train_serial}  # a Ray worker trains one run
MEMORY_SHARE = 0.8  # of the free memory, that a run may take by its estimate
WORTH_SAYING = 2**30  # bytes from which on the estimate is printed though it fits
TRAJECTORY_SAMPLES = 128  # completions a point of a trajectory is measured on, spread over the prompts


def run_warp(policy, tokenizer=None, reward=None, prompts=None, config: WarpConfig | None = None, out=None,
             resume: bool = False, executor="batched", *, on_failure: str = "stop", eval_prompts=None,
             gold=None, texts=None, progress: bool = True, stop: Callable[[], bool] | None = None,
             source: dict | None = None, lora=None) -> WarpResult:
    """Algorithm 1 on any Hugging Face causal LM, whose own weights are left as they were.

    Everything is computed and stored in float32 or wider; a narrower policy is widened first.
    policy: a model, or a name or folder (then its tokenizer comes with it). reward: a function of
    TRL's signature, or a list with one for each of the M runs. prompts: a list of str, or a data set
    with a `prompt` column; without `eval_prompts` a fifth of them is held out. executor: "batched"
    trains the M runs as one program where that fits in memory, "serial" one after the other, "ray" (or a
    `RayExecutor` with settings) as tasks of Ray, with the policies that "serial" gives.
    out: a run folder, written as the run goes; with resume=True an unfinished one is continued.
    on_failure: what follows when the reward, loss or gradient of a run is not finite: "stop", with the last
    good step of every run saved, or "continue", with that run left out of its iteration's merge.
    gold, texts: a true reward and held-out texts, measured but never trained on. stop: asked after
    every step; when it says True the state is saved and KeyboardInterrupt raised. source: noted in
    config.json, so that the run folder can find its rewards again. lora: a LoraSettings; the runs then
    train adapters, and weights are merged as ever (scale/lora.py).

    Raises ValueError or TypeError on input that cannot be used, before anything is written; RunFailed (a
    ValueError), naming run, step and prompt, when a run fails or, with "continue", all of an iteration do;
    CannotWrite (an OSError) when the folder cannot be written.
    """
    if isinstance(policy, (str, Path)):
        policy, tokenizer = load_policy(policy)
    executor, workers = remote_workers(executor)
    if workers is not None and lora is not None:
        raise ValueError("adapters (lora) train in this process alone; leave out executor='ray', or lora")
    result, prompts, rewards = checked_input(policy, tokenizer, reward, prompts, config or WarpConfig(), executor,
                                             on_failure, eval_prompts, gold, texts, source)
    result.lora = lora
    config, was_training = result.config, policy.training
    adapters = None if lora is None else adapter_trainer(policy, lora)
    executor = fitting_executor(executor, result.model, prompts, config, progress, adapters and adapters.size)
    try:
        if workers is not None:
            out = workers.start(out, result, prompts)
        with (open_folder(out, resume, result, prompts, rewards, executor) as folder,
              pinned_threads(folder.threads if folder else torch.get_num_threads())):
            train = EXECUTORS[same_executor(executor, folder)]
            theta_init = theta_sft = result.sft
            for i in range(1, config.iterations + 1):
                runs = [Run(config, i, m, theta_init, theta_sft, r) for m, r in enumerate(rewards, 1)]
                if workers is not None:  # they leave their runs in the folder, finished; here these are taken up
                    workers.train(runs, folder, progress, stop, on_failure)
                states, failures = train_runs(train, runs, prompts, result, folder, progress, stop, on_failure,
                                              adapters)
                policies = [state.policy for state in states]
                theta_slerp = merge(theta_init, policies, config.merge)
                next_init = liti(theta_init, theta_slerp, config.eta)
                anchors = [state.anchor for state in states]
                result.iterations.append(Iteration(theta_init, policies, anchors, theta_slerp, next_init, failures))
                if folder is not None:
                    write_iteration(folder, result, i)
                theta_init = next_init
    finally:
        load_weights(policy, result.sft).train(was_training)
        policy.zero_grad(set_to_none=True)
        if workers is not None:
            workers.close()
    return result


def remote_workers(executor) -> tuple[str, object]:
    """The executor's name, and what takes runs to other processes (scale/ray.py); None if they train in this one."""
    if executor == "ray":
        from .scale.ray import RayExecutor
        executor = RayExecutor()
    return (executor, None) if not hasattr(executor, "train") else ("ray", executor)


def adapter_trainer(policy, settings):
    """Stage 1 with adapters, from the optional module."""
    from .scale.lora import AdapterTrainer

    return AdapterTrainer(policy, settings)


def fitting_executor(executor: str, policy, prompts: Prompts, config: WarpConfig, progress: bool = True,
                     adapter: tuple[int, int] | None = None) -> str:
    """How an iteration's runs train: one after the other if together they would not fit in memory, or cannot be
    checkpointed. Says so, and what to set where not even one fits, on stderr in one line. adapter: as
    `training_memory` has it.

    Raises ValueError for settings that the policy cannot be trained with.
    """
    if executor == "batched" and config.checkpointing:
        try:
            forward_for(policy, "batched", config)
        except ValueError as error:
            print(f"warp-lite: {str(error).partition(';')[0]}; they train one after the other", file=sys.stderr)
            executor = "serial"
    if config.checkpointing or config.logit_chunk:
        forward_for(policy, executor, config)
    shape = config.batch_size, prompts.ids.shape[-1], config.max_new_tokens, config
    free = free_memory(policy.device)
    there, told, apart = f"{free / 2**30:.2f} GiB are free", "", ""
    together = executor == "batched"
    needed = training_memory(policy, config.runs if together else 1, *shape, together, adapter)
    if together and needed.total > MEMORY_SHARE * free:
        told = f"warp-lite: together the runs would take {needed}, and {there}; they train one after the other"
        apart = "the runs do not fit together and they train one after the other; even "
        executor, needed = "serial", training_memory(policy, 1, *shape, False, adapter)
    if executor != "batched" and needed.total > MEMORY_SHARE * free:
        changes, then = settings_that_fit(policy, 1, *shape, MEMORY_SHARE * free, False, adapter)
        advice = f"set {' '.join(changes)}: {then}" if changes else "take a smaller policy or batch"
        told = f"warp-lite: {apart}a run would take {needed}, and {there}; {advice}"
    if told or progress and needed.total > WORTH_SAYING:
        print(told or f"warp-lite: training takes {needed}; {there}", file=sys.stderr)
    return executor


def same_executor(executor: str, folder: RunFolder | None) -> str:
    """The executor, or "serial" where a folder's runs began one after the other: together they would have no
    step in common to go on from, and would round otherwise."""
    if folder is not None and executor == "batched" and folder.executor in ("serial", "ray"):
        print(f"warp-lite: the runs in {folder.path} began one after the other and go on so", file=sys.stderr)
        return "serial"
    return executor


def merge(init: Weights, policies: Sequence[Weights], method: str) -> Weights:
    """Stage 2: the merge of an iteration's policies; a single one is taken as it is."""
    if len(policies) == 1:
        return dict(policies[0])
    return {"slerp": slerp, "lerp": lerp}[method](init, policies)


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
    standing = None  # gives the states after the last step that was taken

    def on_step(members: Sequence[Run], step: int, states: Callable[[], list[RunState]], metrics: list[dict]) -> None:
        nonlocal standing
        standing = states
        bar.update(len(members))
        bar.set_postfix_str(f"reward {np.mean([m['reward'] for m in metrics]):.2f}", refresh=False)
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
        run.state = state
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


# --- everything is checked before anything is written ---


def checked_input(policy, tokenizer, reward, prompts, config, executor, on_failure, eval_prompts, gold, texts,
                  source) -> tuple[WarpResult, Prompts, list[Callable]]:
    """A result with nothing in it yet, the encoded training prompts and the reward of each run, or the
    ValueError or TypeError that says what cannot be used."""
    if not isinstance(policy, torch.nn.Module):
        raise TypeError(f"policy is {type(policy).__name__}; pass a causal LM, or the name or folder of one")
    if not isinstance(config, WarpConfig):
        raise TypeError(f"config is {type(config).__name__}; pass a WarpConfig")
    missing = [n for n, v in (("tokenizer", tokenizer), ("reward", reward), ("prompts", prompts)) if v is None]
    if missing:
        raise TypeError(f"run_warp needs {' and '.join(missing)}")
    if executor not in EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}, not {executor!r}")
    if on_failure not in ("stop", "continue"):
        raise ValueError(f"on_failure must be 'stop' or 'continue', not {on_failure!r}")
    rewards = list(reward) if isinstance(reward, (list, tuple)) else [reward] * config.runs
    if len(rewards) != config.runs:
        raise ValueError(f"there are {len(rewards)} rewards for {config.runs} runs; give one, or one for each run")
    for function in [*rewards, *([gold] if gold is not None else [])]:
        if not callable(function):
            raise TypeError(f"a reward is {type(function).__name__}, not a function of prompts and completions")
    for name, tensor in parameters(policy).items():
        if not is_finite(tensor):
            raise ValueError(f"the policy has NaN or infinite weights in {name!r}; start from a sound one")
    room = room_for_prompts(policy, config.max_new_tokens)
    encoded = encode_prompts(tokenizer, prompts, room)
    if eval_prompts is None:
        encoded, held_out = hold_out(encoded)
    else:
        held_out = encode_prompts(tokenizer, eval_prompts, room)
    for prompts in (encoded, held_out):
        check_ids(policy, tokenizer, prompts)
    if texts is not None:
        encode_texts(tokenizer, texts, room_for_prompts(policy, 0))
    compute_dtype(config.precision, policy.device)
    model = full_precision(policy)
    result = WarpResult(
        config, model, tokenizer, reward, held_out.given, copy_weights(parameters(model)), gold=gold, texts=texts,
        train_prompts=encoded.given, eval_columns=held_out.columns, source=source, dtype=policy.dtype)
    return result, encoded.to(policy.device), rewards


@contextmanager
def open_folder(out, resume: bool, result: WarpResult, prompts: Prompts, rewards: Sequence[Callable],
                executor: str) -> Iterator[RunFolder | None]:
    """The run folder, held for this process: made, if the rewards can score what the first step will sample, or
    taken up again. None where `out` is."""
    if out is None:
        yield None
        return
    settings = run_settings(result)
    if not check_out(out, resume, settings):
        try_rewards(result, prompts, rewards)
    with locked(Path(out)):
        folder = RunFolder(out, settings, result.sft, resume, executor)
        folder.tidy()
        write_start(folder, result)
        yield folder


def try_rewards(result: WarpResult, prompts: Prompts, rewards: Sequence[Callable]) -> None:
    """Score what the first step will sample, and as many completions of held-out prompts.

    Raises ValueError if a reward function fails, returns the wrong number of values or one that is not finite.
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
            checked_rewards([run], 0, rollout, result.tokenizer)
            for judge in (reward, result.gold) if result.gold is not None else (reward,):
                rollout_rewards([judge], measured, result.tokenizer)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"the reward {reward_name(reward)} failed on a first trial with "
                             f"{type(error).__name__}: {first_line(error)}") from error


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
