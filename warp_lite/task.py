"""What is trained: policy, tokenizer, rewards and prompts in one object, checked once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .averaging.state_dicts import Weights, copy_weights, is_finite, load_weights, parameters
from .config import WarpConfig, check_count, check_sampling
from .policies.ends import end_ids
from .policies.loading import check_whole, load_policy
from .policies.precision import full_precision
from .policies.prompts import Prompts, check_ids, encode_prompts, encode_texts, room_for_prompts
from .rewards.calling import RewardFunc, mean_reward
from .storage.provenance import json_hash


@dataclass
class Task:
    """A policy, its tokenizer, what rewards it and the prompts that it is trained and measured on.

    `policy` is a causal LM in float32 or wider, `sft` its weights when the task was made, on the CPU: θ_sft, which
    every KL is to. `dtype` is that of the policy that came in. `reward` is one function, or a list with one for each
    run; `gold` a true reward, measured but never trained on. `prompts` and `eval_prompts` are encoded, on the policy's
    device; `texts` are held-out texts, for perplexity. Completions have at most `max_new_tokens` tokens and are
    sampled at `temperature`. `source` says where policy and rewards came from, for the run folder. `eval_seed` is that
    of the random numbers on which policies are measured: the same for all that one task measures, so that their
    differences are more exact than each of them.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reward: RewardFunc | Sequence[RewardFunc]
    prompts: Prompts
    eval_prompts: Prompts
    gold: RewardFunc | None = None
    texts: Sequence[str] | None = None
    max_new_tokens: int = WarpConfig.max_new_tokens
    temperature: float = WarpConfig.temperature
    source: dict | None = None
    dtype: torch.dtype | None = None
    sft: Weights = field(default=None, repr=False)
    eval_seed: int = 0

    def __post_init__(self):
        if self.sft is None:
            self.sft = copy_weights(parameters(self.policy))

    @classmethod
    def of(cls, policy: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None = None,
           reward: RewardFunc | Sequence[RewardFunc] | None = None, prompts: Sequence | None = None,
           eval_prompts: Sequence | None = None, *, gold: RewardFunc | None = None, texts: Sequence[str] | None = None,
           max_new_tokens: int = WarpConfig.max_new_tokens, temperature: float = WarpConfig.temperature,
           source: dict | None = None, kept: Sequence | None = None) -> Task:
        """A task of what a user has, everything checked.

        policy: a model, or a name or folder (then its tokenizer comes with it); a narrower one than float32 is
        widened, and left as it is. prompts, eval_prompts: a list of str or a data set with a `prompt` column; without
        `eval_prompts` some of the distinct prompts are held out (see `hold_out`, which `kept` is for).
        Raises TypeError for what is missing or of the wrong kind, ValueError for a policy that is not finite, prompts
        that are empty or leave no room for a completion, token ids that the policy has no embedding for, and a length
        or temperature that no config takes.
        """
        check_sampling(max_new_tokens, temperature)
        if isinstance(policy, (str, Path)):
            policy, tokenizer = load_policy(policy)
        if not isinstance(policy, torch.nn.Module):
            raise TypeError(f"policy is {type(policy).__name__}; pass a causal LM, or the name or folder of one")
        check_whole(policy)
        needed = {"tokenizer": tokenizer, "reward": reward, "prompts": prompts}
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise TypeError(f"a task needs {' and '.join(missing)}")
        check_rewards(reward, gold)
        for name, tensor in parameters(policy).items():
            if not is_finite(tensor):
                raise ValueError(f"the policy has NaN or infinite weights in {name!r}; start from a sound one")
        room = room_for_prompts(policy, max_new_tokens)
        encoded = encode_prompts(tokenizer, prompts, room)
        if eval_prompts is None:
            encoded, held_out = hold_out(encoded, kept=kept)
        else:
            held_out = encode_prompts(tokenizer, eval_prompts, room)
        for encoded_prompts in (encoded, held_out):
            check_ids(policy, tokenizer, encoded_prompts)
        if texts is not None:
            encode_texts(tokenizer, texts, room_for_prompts(policy, 0), end_ids(policy, tokenizer)[0])
        return cls(full_precision(policy), tokenizer, reward, encoded.to(policy.device), held_out.to(policy.device),
                   gold, texts, max_new_tokens, temperature, source, policy.dtype)

    @property
    def judge(self) -> RewardFunc:
        """The reward that everything is measured by: the only one, or the mean of several."""
        return mean_reward(self.reward) if isinstance(self.reward, (list, tuple)) else self.reward

    def rewards(self, runs: int) -> list[RewardFunc]:
        """The reward of each of so many runs. Raises ValueError where there is a list of another length."""
        if not isinstance(self.reward, (list, tuple)):
            return [self.reward] * runs
        if len(self.reward) != runs:
            raise ValueError(f"there are {len(self.reward)} rewards for {runs} runs; give one, or one for each run")
        return list(self.reward)

    def as_in(self, config: WarpConfig) -> Task:
        """The task with a config's length of completions and temperature.

        Raises ValueError where a prompt then leaves no room for a completion.
        """
        room = room_for_prompts(self.policy, config.max_new_tokens)
        for prompts in (self.prompts, self.eval_prompts):
            if room is not None and len(prompts) and prompts.ids.shape[-1] > room:
                encode_prompts(self.tokenizer, prompts.given, room)  # raises, naming the first that is too long
        return dataclasses.replace(self, max_new_tokens=config.max_new_tokens, temperature=config.temperature)

    def measured_on(self, prompts: Sequence | Prompts) -> Task:
        """The task with other held-out prompts, encoded or as a user gives them.

        Raises ValueError or TypeError for prompts that cannot be used (see `prompts_for`).
        """
        if not isinstance(prompts, Prompts):
            prompts = prompts_for(self.policy, self.tokenizer, prompts, self.max_new_tokens)
        return dataclasses.replace(self, eval_prompts=prompts)

    def first(self, count: int) -> Task:
        """The task measured on the first `count` of its held-out prompts alone. Raises ValueError for less than 1."""
        check_count("count", count)
        return self.measured_on(self.eval_prompts.batch(np.arange(min(count, len(self.eval_prompts)))))

    def to(self, device: str | torch.device) -> Task:
        """The same task with policy, prompts and reward model on a device; θ_sft stays where it is."""
        self.policy.to(device)
        for reward in {id(reward): reward for reward in self.reward_functions()}.values():
            if hasattr(reward, "to"):
                reward.to(device)
        self.prompts, self.eval_prompts = self.prompts.to(device), self.eval_prompts.to(device)
        return self

    def reward_functions(self) -> list[RewardFunc]:
        """The reward functions there are, in a list: the only one, or one for each run."""
        return list(self.reward) if isinstance(self.reward, (list, tuple)) else [self.reward]

    def restore(self, training: bool = False) -> None:
        """Put θ_sft back into the policy, without gradients, and its mode of training."""
        load_weights(self.policy, self.sft).train(training)
        self.policy.zero_grad(set_to_none=True)


@dataclass
class World(Task):
    """A task that is made here: `folder` is where its artefacts are cached, `facts` what is known of them."""

    folder: Path | None = None
    facts: dict = field(default_factory=dict)


def prompts_for(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence,
                max_new_tokens: int) -> Prompts:
    """Prompts to measure a policy on, encoded, on its device.

    Raises ValueError or TypeError for those that cannot be read, leave no room for a completion, or have token ids that
    the policy has no embedding for.
    """
    encoded = encode_prompts(tokenizer, prompts, room_for_prompts(policy, max_new_tokens))
    check_ids(policy, tokenizer, encoded)
    return encoded.to(policy.device)


def check_task_alone(besides: Mapping[str, bool]) -> None:
    """Raises TypeError for arguments, those of `besides` that are True, which stand beside a Task that has its own."""
    if names := [name for name, is_there in besides.items() if is_there]:
        raise TypeError(f"the Task has its own {', '.join(names)}; leave out what stands beside it, or pass another "
                        "Task: dataclasses.replace(task, reward=…), task.measured_on(prompts)")


def check_rewards(reward: RewardFunc | Sequence[RewardFunc], gold: RewardFunc | None = None) -> None:
    """Raises TypeError for a reward, or gold reward, that can neither be called nor reads token ids."""
    rewards = list(reward) if isinstance(reward, (list, tuple)) else [reward]
    for function in [*rewards, *([] if gold is None else [gold])]:
        if not callable(function) and not hasattr(function, "from_ids"):
            raise TypeError(f"a reward is {type(function).__name__}, not a function of prompts and completions")


def hold_out(prompts: Prompts, held_out: int = 512, kept: Sequence | None = None) -> tuple[Prompts, Prompts]:
    """Training and held-out prompts: of the distinct ones every fifth is held out, or as many, evenly spread, as make
    no more than `held_out`.

    `kept` are the prompts that a run folder holds out already, as they were given: those are held out again.
    Raises ValueError for fewer than two distinct prompts, and a `held_out` below 1.
    """
    if held_out < 1:
        raise ValueError(f"held_out must be 1 or more, not {held_out}")
    first_row = {}  # where each distinct prompt stands for the first time
    for i, text in enumerate(prompts.texts):
        first_row.setdefault(text, i)
    distinct = list(first_row)
    if len(distinct) < 2:
        raise ValueError("there is only one distinct prompt and none can be held out; give more, or eval_prompts")
    chosen = set(distinct[::max(5, math.ceil(len(distinct) / held_out))])
    if kept is not None:
        text_of = {json_hash(prompts.given[i]): text for text, i in first_row.items()}
        chosen_before = {text_of.get(json_hash(prompt)) for prompt in kept}
        if None not in chosen_before and 0 < len(chosen_before) < len(distinct):
            chosen = chosen_before  # else they are other prompts, which is refused later
    held_out_rows = np.array([i for text, i in first_row.items() if text in chosen])
    training_rows = np.array([i for i, text in enumerate(prompts.texts) if text not in chosen])
    return prompts.batch(training_rows), prompts.batch(held_out_rows)
