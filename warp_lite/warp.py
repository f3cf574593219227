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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from .averaging.liti import liti
from .averaging.merging import merge
from .averaging.state_dicts import load_weights
from .config import WarpConfig
from .policies.loading import load_policy
from .policies.prompts import Prompts
from .result import Iteration, WarpResult, run_settings, write_iteration, write_start
from .storage.files import locked
from .storage.provenance import pinned_threads
from .storage.run_config import check_out, kept_prompts
from .task import checked_input
from .training.executors import EXECUTORS, remote_workers, same_executor
from .training.iteration import train_runs, try_rewards
from .training.memory import fitting_executor
from .training.run import Run
from .training.run_folder import RunFolder


def run_warp(policy, tokenizer=None, reward=None, prompts=None, config: WarpConfig | None = None, out=None,
             resume: bool = False, executor="batched", *, on_failure: str = "stop", eval_prompts=None,
             gold=None, texts=None, progress: bool = True, stop: Callable[[], bool] | None = None,
             source: dict | None = None, lora=None) -> WarpResult:
    """Algorithm 1 on any Hugging Face causal LM, whose own weights are left as they were.

    Everything is computed and stored in float32 or wider; a narrower policy is widened first.
    policy: a model, or a name or folder (then its tokenizer comes with it). reward: a function of
    TRL's signature, or a list with one for each of the M runs. prompts: a list of str, or a data set
    with a `prompt` column; without `eval_prompts` every fifth is held out (`task.hold_out`). executor: "batched"
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
                                             on_failure, eval_prompts, gold, texts, source,
                                             kept=kept_prompts(out, resume).get("eval"))
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


def adapter_trainer(policy, settings):
    """Stage 1 with adapters, from the optional module."""
    from .scale.lora import AdapterTrainer

    return AdapterTrainer(policy, settings)


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
