"""What is trained: policy, tokenizer, rewards and prompts, checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .averaging.state_dicts import copy_weights, is_finite, parameters
from .config import WarpConfig
from .policies.ends import end_ids
from .policies.loading import check_whole
from .policies.precision import compute_dtype, full_precision
from .policies.prompts import Prompts, check_ids, encode_prompts, encode_texts, room_for_prompts
from .result import WarpResult
from .rewards.bradley_terry import BradleyTerry
from .training.executors import EXECUTORS
from .worlds.grammar import GoldReward


@dataclass
class World:
    """A task ready to run: policy, tokenizer, rewards, prompts.

    `reward` is what RL sees and `gold` the truth, both in standard deviations of SFT
    samples. `train_prompts` and `eval_prompts` have no prompt in common. `texts` are
    held-out reviews, for perplexity. `folder` is where the artefacts are cached.
    """

    model: object
    tokenizer: object
    reward: BradleyTerry
    gold: GoldReward
    train_prompts: list[str]
    eval_prompts: list[str]
    texts: list[str]
    folder: Path | None
    facts: dict

    def to(self, device) -> World:
        """The same world with its policy and reward model on a device."""
        self.model.to(device)
        self.reward.to(device)
        return self


def checked_input(policy, tokenizer, reward, prompts, config, executor, on_failure, eval_prompts, gold, texts,
                  source) -> tuple[WarpResult, Prompts, list[Callable]]:
    """A result with nothing in it yet, the encoded training prompts and the reward of each run, or the
    ValueError or TypeError that says what cannot be used."""
    if not isinstance(policy, torch.nn.Module):
        raise TypeError(f"policy is {type(policy).__name__}; pass a causal LM, or the name or folder of one")
    check_whole(policy)
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
        encode_texts(tokenizer, texts, room_for_prompts(policy, 0), end_ids(policy, tokenizer)[0])
    compute_dtype(config.precision, policy.device)
    model = full_precision(policy)
    result = WarpResult(
        config, model, tokenizer, reward, held_out.given, copy_weights(parameters(model)), gold=gold, texts=texts,
        train_prompts=encoded.given, eval_columns=held_out.columns, source=source, dtype=policy.dtype)
    return result, encoded.to(policy.device), rewards


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
