"""Stage 1 by TRL: each run is an `RLOOTrainer` whose reference model is the EMA anchor.

So everything that TRL scales with (accelerate, FSDP, DeepSpeed, vLLM) is there for the runs; the outer loop,
the merges and the front stay ours, from one folder to the next and tensor by tensor. For those who have a TRL script:

    from trl import RLOOConfig
    from warp_lite import WarpConfig, load_result
    from warp_lite.scale.trl import run_warp_trl

    args = RLOOConfig(learning_rate=1e-6, per_device_train_batch_size=64, max_completion_length=128)
    config = WarpConfig(iterations=3, runs=2, steps=1000, beta=0.1, mu=0.01, eta=0.3)
    folder = run_warp_trl("my/sft-policy", reward, dataset, config, args, out="runs/trl")
    front = load_result(folder, reward).front([0, 0.25, 0.5, 0.75, 1])

What TRL's words mean in ours:

- `sync_ref_model` with `ref_model_sync_steps=1` moves the reference after every step by (1 − α)·ref + α·θ: μ = α.
- Its KL is in the reward, as ours: r − β·(log π − log π_ref) summed over a completion, detached. The `kl` that it
  logs is a mean over tokens; metrics.jsonl has it in nats per sequence too, as `kl_to_anchor`.
- Its leave-one-out baseline is the mean of the other completions of the same prompt (`num_generations` of them in
  all); ours is the mean of the other completions in the batch, one a prompt. Both leave the gradient's expectation
  as it is and differ in its variance, and with it in how far a run goes: in the tiny world, with batches of 8 and 60
  steps, a merge by TRL has a KL of 4.0 nats with two completions a prompt and 3.9 with eight, ours 3.3; where ours
  compares the same two it has 4.6, no clear difference from TRL's (4 and 8 seeds; tests/test_trl.py). In batches of
  32 the two agree as they are. num_generations = the whole batch is nearest to ours.
- Its loss is the mean over completions of advantage · log π, not divided by the completion length; so its
  gradient norms, and Adam's ε, are `max_new_tokens` times ours. The same holds for `max_grad_norm`.
- Its warm-up begins with a step of rate 0: it is one step behind ours.
- It scores left-padded prompts without telling the model where they begin. Models that compute positions by
  counting (GPT-2) would be scored at other positions than they were sampled at; such models get theirs from the mask.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..averaging.checkpoints import merge_checkpoints
from ..averaging.state_dicts import freeze, frozen_names, is_finite, parameters
from ..config import WarpConfig
from ..policies.attention import positions
from ..policies.ends import end_ids
from ..policies.loading import from_pretrained, load_policy, quiet
from ..policies.prompts import Prompts, encode_prompts, reading_prompts, room_for_prompts
from ..rewards.calling import RewardFunc, call_reward, reads_whole_texts, reward_name, trained_reward
from ..storage.prompt_sources import prompt_columns
from ..storage.provenance import pinned_threads
from ..storage.run_config import kept_prompts
from ..task import Task, hold_out
from ..training.run import RunState
from ..training.run_folder import RunFolder, run_settings, write_start
from .peft_folders import library

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOConfig

TrlReward = RewardFunc | str | PreTrainedModel  # a function, or a classifier by its name or as a model
# Of TRL's arguments, those that say where and how a run is done and not what it is.
OWN = ("output_dir", "run_name", "logging_dir", "seed", "data_seed", "max_steps", "beta", "sync_ref_model",
       "ref_model_mixup_alpha", "ref_model_sync_steps", "disable_dropout", "save_strategy", "report_to", "disable_tqdm",
       "local_rank", "hub_token", "push_to_hub_token")
JSON = (bool, int, float, str, list, dict)


def run_warp_trl(policy: PreTrainedModel | str | Path, reward_funcs: TrlReward | Sequence[TrlReward],
                 train_dataset: Dataset | Sequence, config: WarpConfig | None = None, args: RLOOConfig | None = None, *,
                 out: str | Path, resume: bool = False, tokenizer: PreTrainedTokenizerBase | None = None,
                 eval_prompts: Sequence | None = None, source: dict | None = None, callbacks: Sequence = (),
                 reward_processing_classes: PreTrainedTokenizerBase | Sequence | None = None) -> Path:
    """Algorithm 1 with TRL's RLOOTrainer as stage 1; returns the run folder, which `load_result` and
    `warp-lite front` read.

    policy: the name or folder of a causal LM, or a model with its `tokenizer`. reward_funcs: TRL's, a function,
    a classifier's name, or a list whose rewards are summed, with `reward_weights` in `args` weighted; None leaves a
    completion out. Fronts are measured by the same sum, unclipped. train_dataset: a `datasets.Dataset` with a `prompt`
    column of texts (or a list of str or of rows); some of its distinct prompts are held out (`task.hold_out`) unless
    `eval_prompts` are given.

    args: your RLOOConfig. It is respected but for what is WARP's: steps, β and the moving reference are `config`'s,
    each run has a seed and so an order of prompts of its own, dropout is off, and TRL saves no checkpoints (it would
    not save the reference). What both have (learning rate, batch, lengths, temperature, Adam) is taken from `args`
    and noted in config.json. Without args everything is from `config`.

    resume: runs that are finished are kept; one that is not starts again from its init. Start it by `accelerate
    launch` as any TRL script: every process calls this, the first one merges.

    Raises ValueError before anything is written for what cannot be used: PEFT models (their reference cannot move;
    see scale/lora.py), weights in 16 bits (nor can an average of those), args that make every run see one order.
    """
    library("trl", "trl")
    from accelerate import PartialState

    config, args = agree(config or WarpConfig(), args)
    task, dataset = checked(policy, tokenizer, reward_funcs, train_dataset, eval_prompts, config, args, source,
                            kept_prompts(out, resume).get("eval"))
    settings, processes = run_settings(task, config) | {"trl": chosen(args)}, PartialState()
    functions = [for_trl(function, task.tokenizer) for function in listed(reward_funcs)]
    if processes.is_main_process:
        folder = RunFolder(out, settings, task.sft, resume)
        write_start(folder, task)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        folder = RunFolder(out, settings, task.sft, resume=True)
    tokenizer, frozen = task.tokenizer, frozen_names(task.policy)
    task.policy = policy = None  # every run loads its own from disk
    gc.collect()
    runs = [(i, m) for i in range(1, config.iterations + 1) for m in range(1, config.runs + 1)]
    with pinned_threads(folder.threads), tqdm(
            total=len(runs), unit="run", disable=None if processes.is_main_process else True, leave=False) as bar:
        for i, m in runs:
            if folder.finished_run(i, m) is None:
                train(folder, config, args, i, m, tokenizer, dataset, functions, callbacks,
                      reward_processing_classes, frozen)
            processes.wait_for_everyone()
            if m == config.runs:
                if processes.is_main_process:
                    merge_iteration(folder, config, i)
                processes.wait_for_everyone()
            bar.update()
    return folder.path


def train(folder: RunFolder, config: WarpConfig, args: RLOOConfig, i: int, m: int, tokenizer: PreTrainedTokenizerBase,
          dataset: Dataset, reward_funcs: Sequence[TrlReward], callbacks: Sequence[TrainerCallback],
          reward_processing_classes: PreTrainedTokenizerBase | Sequence | None, frozen: Sequence[str] = ()) -> None:
    """Stage 1: run m of iteration i, by TRL; its policy, its anchor and TRL's log go into the run folder.

    `frozen` are the weights that do not train. Raises FloatingPointError where its weights are not finite at the end.
    """
    from transformers import PrinterCallback
    from trl import RLOOTrainer

    init = init_folder(folder, i)
    with quiet():
        model = freeze(load_model(init, args), frozen)
        model.generation_config.eos_token_id = list(end_ids(model, tokenizer))  # TRL asks nothing else of the model
        if config.anchor == "sft":
            model.config._name_or_path = str(folder.path / "sft")  # whence TRL loads its reference
        trainer = RLOOTrainer(
            model=model, reward_funcs=list(reward_funcs),
            args=run_arguments(args, config, folder, i, m), train_dataset=dataset,
            processing_class=reading_prompts(tokenizer), reward_processing_classes=reward_processing_classes,
            callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)  # a line a step: metrics.jsonl has them
    for scored in filter(None, (model, trainer.ref_model)):
        place_by_mask(trainer.accelerator.unwrap_model(scored))
    trainer.train()
    get = trainer.accelerator.get_state_dict  # gathers what FSDP and DeepSpeed hold in parts; every process calls it
    policy = get(trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model)
    anchor = None if trainer.ref_model is None else get(trainer.ref_model)
    if trainer.accelerator.is_main_process:
        # without a KL there is no anchor, and the init stands in its place
        anchor = parameters(load_model(init, args)) if anchor is None else anchor
        policy, anchor = ({name: state[name].detach().to("cpu", torch.float32, copy=True) for name in folder.like}
                          for state in (policy, anchor))
        for name, tensor in policy.items():
            if not is_finite(tensor):
                raise FloatingPointError(f"{name!r} is not finite after iteration {i}, run {m}; lower learning_rate "
                                         f"(now {args.learning_rate:g}) or raise beta (now {config.beta:g})")
        (folder.run(i, m) / "metrics.jsonl").unlink(missing_ok=True)
        folder.append(i, m, "metrics.jsonl", log_rows(trainer.state.log_history))
        folder.finish_run(i, m, RunState.finished(config.steps, policy, anchor))
    trainer.accelerator.free_memory()
    del trainer, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def place_by_mask(model: PreTrainedModel) -> None:
    """Have a model that counts its positions from the left edge count them from the first token that is no padding.

    Models of relative positions are left as they are: padding does not move them.
    """
    if not hasattr(model.get_decoder(), "wpe"):
        return

    def place(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and kwargs.get("position_ids") is None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            kwargs["position_ids"] = positions(mask)[:, -ids.shape[1]:]
        return args, kwargs

    model.register_forward_pre_hook(place, with_kwargs=True)


def merge_iteration(folder: RunFolder, config: WarpConfig, i: int) -> None:
    """Stages 2 and 3 of iteration i, from file to file: θ_slerp and the next θ_init."""
    init, target = init_folder(folder, i), folder.iteration(i)
    policies = [folder.run(i, m) / "policy.safetensors" for m in range(1, config.runs + 1)]
    method = "lerp" if config.runs == 1 else config.merge  # which may be "none"
    folder.finish_iteration(i, {
        "merged": lambda path: merge_checkpoints(init, policies, path, method),
        "next-init": lambda path: merge_checkpoints(init, [target / "merged"], path, "lerp", config.eta)})


def init_folder(folder: RunFolder, i: int) -> Path:
    """The folder of the weights that iteration i starts from: those of the SFT policy, or what iteration i − 1 left."""
    return folder.path / "sft" if i == 1 else folder.iteration(i - 1) / "next-init"


def load_model(init: Path, args: RLOOConfig) -> PreTrainedModel:
    """A policy to train, with the arguments that the user has for loading. Raises ValueError where it lacks weights."""
    from transformers import AutoModelForCausalLM

    options = {name: value for name, value in (args.model_init_kwargs or {}).items() if name != "dtype"}
    return from_pretrained(AutoModelForCausalLM, str(init), dtype=torch.float32, **options)


def run_arguments(args: RLOOConfig, config: WarpConfig, folder: RunFolder, i: int, m: int) -> RLOOConfig:
    """The RLOOConfig of one run: the user's, with what is WARP's set."""
    seed = int(np.random.SeedSequence([config.seed, i, m]).generate_state(1)[0]) >> 1  # 31 bits
    beta = 0.0 if config.anchor == "none" else config.beta
    changed = copy.copy(args)  # not dataclasses.replace: its checks refuse arguments that they have completed once
    for name, value in {
            "output_dir": str(folder.run(i, m)), "max_steps": config.steps, "seed": seed, "data_seed": seed,
            "beta": beta, "sync_ref_model": config.anchor == "ema" and beta > 0, "ref_model_mixup_alpha": config.mu,
            "ref_model_sync_steps": 1, "disable_dropout": True, "save_strategy": "no"}.items():
        setattr(changed, name, value)
    return changed


def agree(config: WarpConfig, args: RLOOConfig | None) -> tuple[WarpConfig, RLOOConfig]:
    """WarpConfig and RLOOConfig that say the same: what both have is taken from `args`, or `args` made of `config`.

    Raises TypeError for `args` of another class, ValueError for those that make every run see one order of prompts, or
    resume.
    """
    from trl import RLOOConfig

    if args is None:
        cuda = torch.cuda.is_available()
        return config, RLOOConfig(
            per_device_train_batch_size=config.batch_size, num_generations=config.batch_size,
            max_completion_length=config.max_new_tokens, temperature=config.temperature, learning_rate=config.lr,
            lr_scheduler_type="constant_with_warmup", warmup_steps=config.warmup_steps, weight_decay=0.0,
            adam_beta1=config.adam_beta1, adam_beta2=config.adam_beta2,
            adam_epsilon=config.adam_eps * config.max_new_tokens,
            max_grad_norm=config.max_grad_norm * config.max_new_tokens,
            use_cpu=not cuda, bf16=cuda and torch.cuda.get_device_capability() >= (8, 0), gradient_checkpointing=False,
            logging_steps=1, report_to=[], disable_tqdm=True)
    if not isinstance(args, RLOOConfig):
        raise TypeError(f"args is {type(args).__name__}; pass a trl.RLOOConfig, or leave it out")
    if not args.shuffle_dataset:
        raise ValueError("shuffle_dataset is False: every run would see its prompts in one order; set it to True")
    if args.resume_from_checkpoint:
        raise ValueError("resume_from_checkpoint is set, but TRL's checkpoints lack the moving reference; leave it out "
                         "and pass resume=True, which keeps the runs that are finished")
    length = args.max_completion_length
    return config.replace(
        lr=args.learning_rate, temperature=args.temperature, max_new_tokens=length,
        batch_size=args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        warmup_steps=args.get_warmup_steps(config.steps), adam_beta1=args.adam_beta1, adam_beta2=args.adam_beta2,
        adam_eps=args.adam_epsilon / length,
        **({"max_grad_norm": args.max_grad_norm / length} if args.max_grad_norm else {})), args


def checked(policy: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None,
            reward_funcs: TrlReward | Sequence[TrlReward], train_dataset: Dataset | Sequence,
            eval_prompts: Sequence | None, config: WarpConfig, args: RLOOConfig, source: dict | None,
            kept: Sequence | None = None) -> tuple[Task, Dataset]:
    """The task and the data set to train on.

    Raises ValueError or TypeError that says what cannot be used: a PEFT model, weights in 16 bits or not finite, a
    stream, conversations, too few prompts.
    """
    from datasets import Dataset

    if isinstance(policy, (str, Path)):
        policy, tokenizer = load_policy(policy)
    elif tokenizer is None:
        raise TypeError("policy is a model; pass its tokenizer too, or the name or folder of both")
    if hasattr(policy, "peft_config"):
        raise ValueError("policy is a PEFT model, whose reference TRL cannot move; train adapters by "
                         "run_warp(…, lora=LoraSettings(…)), or pass the whole model")
    wanted = (args.model_init_kwargs or {}).get("dtype", "float32")
    for dtype in (next(policy.parameters()).dtype, wanted):
        if str(dtype).removeprefix("torch.") != "float32":
            raise ValueError(f"the policy's weights are {dtype}: a reference of such weights that moves by mu = "
                             f"{config.mu:g} a step is lost in rounding; load them in float32 and set bf16=True")
    for name, tensor in parameters(policy).items():
        if not is_finite(tensor):
            raise ValueError(f"the policy has NaN or infinite weights in {name!r}; start from a sound one")
    if isinstance(train_dataset, (list, tuple)):
        prompts, columns = prompt_columns(train_dataset)
        train_dataset = Dataset.from_dict({"prompt": prompts, **columns})
    if not isinstance(train_dataset, Dataset):
        raise TypeError(f"train_dataset is {type(train_dataset).__name__}; pass a datasets.Dataset, which is no stream")
    if "prompt" in train_dataset.column_names and train_dataset and not isinstance(train_dataset[0]["prompt"], str):
        raise TypeError("the prompts are conversations; make texts of them first: dataset.map(lambda row: {'prompt': "
                        "tokenizer.apply_chat_template(row['prompt'], tokenize=False, add_generation_prompt=True)})")
    room = room_for_prompts(policy, config.max_new_tokens)
    prompts = encode_prompts(tokenizer, train_dataset, room)
    if eval_prompts is None:
        prompts, held_out = hold_out(prompts, kept=kept)
        apart = set(held_out.texts)
        train_dataset = train_dataset.select([n for n, text in enumerate(train_dataset["prompt"]) if text not in apart])
    else:
        held_out = encode_prompts(tokenizer, eval_prompts, room)
    check_enough(prompts, args)
    trained_reward(reward_funcs, {"reward_weights": args.reward_weights})
    task = Task(policy, tokenizer, reward_funcs, prompts, held_out, max_new_tokens=config.max_new_tokens,
                temperature=config.temperature, source=source or find_source(reward_funcs))
    return task, train_dataset


def check_enough(prompts: Prompts, args: RLOOConfig) -> None:
    """Raises ValueError for fewer prompts than a batch takes: TRL drops one that it cannot fill, and would train on
    nothing."""
    needed = args.generation_batch_size // args.num_generations
    if len(prompts) < needed:
        raise ValueError(f"a batch takes {needed} prompts and there are {len(prompts)} to train on; give more prompts, "
                         "lower the batch size or raise num_generations")


def listed(reward_funcs: TrlReward | Sequence[TrlReward]) -> list:
    """TRL's reward functions, one or several, as a list."""
    return list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]


def for_trl(reward: TrlReward, tokenizer: PreTrainedTokenizerBase) -> TrlReward:
    """A reward as TRL can call it: one that reads whole texts gets them, of the policy's tokens; others stay."""
    if isinstance(reward, (str, torch.nn.Module)) or not reads_whole_texts(reward):
        return reward

    def with_whole_texts(prompts, completions, completion_ids, **columns):
        before = tokenizer(text=prompts)["input_ids"]
        whole_texts = tokenizer.batch_decode([prompt + row for prompt, row in zip(before, completion_ids)],
                                             skip_special_tokens=True)
        return call_reward(reward, prompts, completions, {**columns, "completion_ids": completion_ids}, whole_texts)

    with_whole_texts.__name__ = reward_name(reward)  # what TRL's log calls it
    return with_whole_texts


def find_source(reward_funcs: TrlReward | Sequence[TrlReward]) -> dict | None:
    """Where `warp-lite front` finds the rewards again: classifiers' names, or functions that can be imported."""
    specs = []
    for reward in listed(reward_funcs):
        module, name = getattr(reward, "__module__", None), getattr(reward, "__qualname__", "<none>")
        if isinstance(reward, str):
            specs.append(reward)
        elif isinstance(reward, torch.nn.Module) and getattr(reward, "name_or_path", ""):
            specs.append(reward.name_or_path)
        elif module not in (None, "__main__") and name.isidentifier():
            specs.append(f"{module}:{name}")
        else:
            return None
    return {"reward": specs if isinstance(reward_funcs, (list, tuple)) else specs[0]}


def chosen(args: RLOOConfig) -> dict:
    """The user's own choices among TRL's arguments, as JSON: what differs from the defaults and is not WARP's."""
    values = {"num_generations": args.num_generations}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        value = list(value) if isinstance(value, tuple) else value
        if field.name in OWN or value in (field.default, [], {}) or not isinstance(value, JSON):
            continue
        values[field.name] = str(value.value) if hasattr(value, "value") else value
    return values


def log_rows(history: Sequence[dict]) -> list[dict]:
    """TRL's log as rows of metrics.jsonl: numbers only, one that does not exist (nan) None."""
    rows = []
    for entry in history:
        row = {name: value if math.isfinite(value) else None for name, value in entry.items()
               if isinstance(value, (int, float))}
        if row.get("kl") is not None and row.get("completions/mean_length") is not None:
            row["kl_to_anchor"] = row["kl"] * row["completions/mean_length"]
        rows.append(row)
    return rows
