"""`run_warp`: what a user has, made ready for Algorithm 1: a task, a trainer that fits, a run folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import LoraSettings, WarpConfig
from .policies.precision import compute_dtype
from .result import WarpResult
from .rewards.calling import RewardFunc
from .storage.files import locked
from .storage.provenance import pinned_threads
from .storage.run_config import check_out, kept_prompts
from .task import Task, check_task_alone
from .training.duration import WORTH_SAYING, expected_duration
from .training.executors import BatchedTrainer, SerialTrainer, Trainer, adapter_trainer, as_begun, trainer_for
from .training.iteration import Stage1, try_rewards
from .training.memory import fitting_trainer
from .training.run_folder import RunFolder, run_settings, write_iteration, write_start
from .warp import warp


def run_warp(policy: Task | PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None = None,
             reward: RewardFunc | Sequence[RewardFunc] | None = None, prompts: Sequence | None = None,
             config: WarpConfig | None = None, out: str | Path | None = None, resume: bool = False,
             executor: str | Trainer = "batched", *, on_failure: str = "stop", eval_prompts: Sequence | None = None,
             gold: RewardFunc | None = None, texts: Sequence[str] | None = None, progress: bool = True,
             stop: Callable[[], bool] | None = None, source: dict | None = None,
             lora: LoraSettings | None = None) -> WarpResult:
    """Algorithm 1 on any Hugging Face causal LM, whose own weights are left as they were.

    Everything is computed and stored in float32 or wider; a narrower policy is widened first. Weights that do not
    require a gradient stay as they are; a PEFT model is refused (see `lora`).
    policy: a model, or a name or folder (then its tokenizer comes with it), or a Task, which brings tokenizer,
    rewards and prompts, and beside which none of them may stand. reward: a function of TRL's signature, or a list with
    one for each of the M runs.
    prompts: a list of str, or a data set with a `prompt` column; without `eval_prompts` every fifth is held out
    (`task.hold_out`).
    executor: "batched" trains the M runs as one program where that fits in memory (on a CPU large policies as several),
    "serial" one after the other,
    "ray" (or a `RayExecutor` with settings) as tasks of Ray, with the policies that "serial" gives.
    out: a run folder, written as the run goes; with resume=True an unfinished one is continued.
    on_failure: what follows when the reward, loss or gradient of a run is not finite: "stop", with the last
    good step of every run saved, or "continue", with that run left out of its iteration's merge.
    gold, texts: a true reward and held-out texts, measured but never trained on. stop: asked after
    every step; when it says True the state is saved and KeyboardInterrupt raised. source: noted in
    config.json, so that the run folder can find its rewards again. lora: a LoraSettings; the runs then
    train adapters, and weights are merged as ever (scale/lora.py).

    Raises ValueError or TypeError on input that cannot be used, before anything is written; RunFailed (a
    ValueError), naming run, step and prompt, when a run fails or, with "continue", all of an iteration do;
    CannotWrite (an OSError) when the folder cannot be written. Source: Algorithm 1.
    """
    config = WarpConfig() if config is None else config
    if not isinstance(config, WarpConfig):
        raise TypeError(f"config is {type(config).__name__}; pass a WarpConfig")
    if on_failure not in ("stop", "continue"):
        raise ValueError(f"on_failure must be 'stop' or 'continue', not {on_failure!r}")
    trainer = trainer_for(executor)
    if lora is not None:
        trainer = adapter_trainer(lora, trainer)
    if isinstance(policy, Task):
        besides = {"tokenizer": tokenizer, "reward": reward, "prompts": prompts, "eval_prompts": eval_prompts,
                   "gold": gold, "texts": texts, "source": source}
        check_task_alone({name: value is not None for name, value in besides.items()})
        task = policy.as_in(config)
    else:
        task = Task.of(policy, tokenizer, reward, prompts, eval_prompts, gold=gold, texts=texts,
                       max_new_tokens=config.max_new_tokens, temperature=config.temperature, source=source,
                       kept=kept_prompts(out, resume).get("eval"))
    task.rewards(config.runs)
    compute_dtype(config.precision, task.policy.device)
    was_training = task.policy.training
    try:
        out = trainer.start(task, config, out)
        trainer = fitting_trainer(trainer, task, config, progress)
        with (open_folder(out, resume, task, config, lora, trainer, progress) as folder,
              pinned_threads(folder.threads if folder else torch.get_num_threads())):
            stage_1 = Stage1(task, config, as_begun(trainer, folder), folder, progress, stop, on_failure)

            def keep(result: WarpResult) -> None:
                if folder is not None:
                    last = result.iterations[-1]
                    write_iteration(folder, task, len(result.iterations), last.merged, last.next_init)

            result = warp(task, config, stage_1.train, keep)
    finally:
        task.restore(was_training)
        trainer.close()
    result.lora = lora
    return result


@contextmanager
def open_folder(out: str | Path | None, resume: bool, task: Task, config: WarpConfig, lora: LoraSettings | None,
                trainer: Trainer, progress: bool) -> Iterator[RunFolder | None]:
    """The run folder, held for this process: made, if the rewards can score what the first step will sample (with
    `progress` a bar counts it, and long training is announced), or taken up again. None where `out` is."""
    if out is None:
        yield None
        return
    settings = run_settings(task, config, lora)
    if not check_out(out, resume, settings):
        try_rewards(task, config, progress)
        if progress:
            say_duration(task, config, trainer)
    with locked(Path(out)):
        folder = RunFolder(out, settings, task.sft, resume, trainer.name, min(trainer.at_once, config.runs))
        folder.tidy()
        write_start(folder, task)
        yield folder


def say_duration(task: Task, config: WarpConfig, trainer: Trainer) -> None:
    """Say on stderr how long training will take, where that is more than a minute; not of what trains elsewhere, or by
    a trainer of its own."""
    if type(trainer) in (SerialTrainer, BatchedTrainer):
        expected = expected_duration(task, config, trainer.name, trainer.at_once)
        if expected.seconds > WORTH_SAYING:
            print(f"warp-lite: training takes {expected}", file=sys.stderr)
