"""What is trained: policy, tokenizer, rewards and prompts, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .averaging.state_dicts import copy_weights, is_finite, parameters
from .config import WarpConfig
from .policies.precision import compute_dtype, full_precision
from .policies.prompts import Prompts, check_ids, encode_prompts, encode_texts, room_for_prompts
from .result import WarpResult
from .rewards.bradley_terry import BradleyTerry
from .storage.provenance import json_hash
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
                  source, kept=None) -> tuple[WarpResult, Prompts, list[Callable]]:
    """A result with nothing in it yet, the encoded training prompts and the reward of each run, or the
    ValueError or TypeError that says what cannot be used. `kept` is what a folder that is resumed holds out."""
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
        encoded, held_out = hold_out(encoded, kept=kept)
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


def hold_out(prompts: Prompts, held_out: int = 512, kept: Sequence | None = None) -> tuple[Prompts, Prompts]:
    """Training and held-out prompts: of the distinct ones every fifth is held out, or as many, evenly spread, as make
    no more than `held_out`.

    `kept` are the prompts that a run folder holds out already, as they were given: those are held out again.
    Raises ValueError for fewer than two distinct prompts, and a `held_out` below 1.
    """
    if held_out < 1:
        raise ValueError(f"held_out must be 1 or more, not {held_out}")
    first = {}  # where each distinct prompt stands for the first time
    for i, text in enumerate(prompts.texts):
        first.setdefault(text, i)
    distinct = list(first)
    if len(distinct) < 2:
        raise ValueError("there is only one distinct prompt and none can be held out; give more, or eval_prompts")
    chosen = set(distinct[::max(5, math.ceil(len(distinct) / held_out))])
    if kept is not None:
        given = {json_hash(prompts.given[i]): text for text, i in first.items()}
        again = {given.get(json_hash(prompt)) for prompt in kept}
        if None not in again and 0 < len(again) < len(distinct):  # else they are other prompts, which is refused later
            chosen = again
    apart = np.array([i for text, i in first.items() if text in chosen])
    rest = np.array([i for i, text in enumerate(prompts.texts) if text not in chosen])
    return prompts.batch(rest), prompts.batch(apart)
