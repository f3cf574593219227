"""How rewards are called.

A reward is any callable `reward(prompts, completions, **kwargs) -> list[float]`, the
signature that TRL uses; where the prompts are conversations, so are the completions. A
text-classification pipeline of the library will do too. One that has a method
`from_ids(prompts, ids, mask)` is given the token ids instead, and nothing is decoded.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..policies.prompts import is_conversation
from ..policies.sampling import Rollout, completion_ids, completions_text
from .classifiers import PipelineReward


def mean_reward(rewards: Sequence[Callable]) -> Callable:
    """The mean of several rewards, as one."""
    if len({id(reward) for reward in rewards}) == 1:
        return rewards[0]

    def mean(prompts, completions, **kwargs):
        values = [call_reward(reward, prompts, completions, **kwargs) for reward in rewards]
        return np.array(values, dtype=float).mean(0).tolist()

    return mean


def rollout_rewards(rewards: Sequence, rollout: Rollout, tokenizer) -> Tensor:
    """The reward (E, B) of each completion, float64; no gradient passes through it.

    `rewards` holds the reward of each of the E policies; one that several share is called once.
    Raises ValueError when a function returns the wrong number of values. Values that are
    not finite are returned as they are: the caller knows the run and the step.
    """
    E, B, _ = rollout.ids.shape
    if all(reward is rewards[0] for reward in rewards):
        return _one_reward(rewards[0], rollout, tokenizer)
    result = torch.empty(E, B, dtype=torch.float64)
    for reward in {id(reward): reward for reward in rewards}.values():
        members = [e for e in range(E) if rewards[e] is reward]
        result[members] = _one_reward(reward, rollout.select(members), tokenizer).cpu()
    return result.to(rollout.ids.device)


def _one_reward(reward, rollout: Rollout, tokenizer) -> Tensor:
    E, B, _ = rollout.ids.shape
    if hasattr(reward, "from_ids"):
        if not _same_tokens(getattr(reward, "tokenizer", tokenizer), tokenizer):
            raise ValueError(f"the {type(reward).__name__} reads token ids, but those of another tokenizer than the "
                             "policy's; take a reward model of the policy's tokenizer, or one that reads texts")
        values = reward.from_ids(rollout.prompts, rollout.ids, rollout.mask)
        return values.detach().to(rollout.ids.device).double().view(E, B)
    ids = completion_ids(rollout.ids, rollout.mask)
    given = rollout.prompts.given
    completions = completions_text(tokenizer, rollout)
    if is_conversation(given[0]):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    values = call_reward(reward, given, completions, **{**rollout.prompts.columns, "completion_ids": ids})
    try:
        values = values.detach().tolist() if isinstance(values, Tensor) else values
        values = [math.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(f"the reward function returned {str(values)[:60]!r}, not a list of numbers") from None
    if len(values) != E * B:
        raise ValueError(f"the reward function returned {len(values)} values for {E * B} completions")
    return torch.tensor(values, dtype=torch.float64).to(rollout.ids.device).view(E, B)


@lru_cache(maxsize=8)
def _same_tokens(first, second) -> bool:
    return first is second or first.get_vocab() == second.get_vocab()


def call_reward(reward, prompts: list[str], completions: list[str], **kwargs):
    """Call a reward function with those arguments that it takes.

    By keyword, as TRL does, if it names `completions` or `completion_ids` or takes nothing but
    keywords; else prompts and completions are its first two arguments, whatever it calls them.
    """
    pipelines = sys.modules.get("transformers.pipelines")
    if pipelines and isinstance(reward, pipelines.Pipeline):
        reward = PipelineReward(reward)
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return reward(prompts, completions)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if places and not named & {"completions", "completion_ids"}:
        rest = {name: value for name, value in accepted(reward, **kwargs).items() if name not in places[:2]}
        return reward(prompts, completions, **rest)
    return reward(**accepted(reward, prompts=prompts, completions=completions, **kwargs))


def accepted(reward, **kwargs) -> dict:
    """Those keyword arguments that the function takes."""
    parameters = inspect.signature(reward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in {p.name for p in parameters}}


def reward_name(reward) -> str:
    """How a run folder calls a reward."""
    if isinstance(reward, (list, tuple)):
        return json.dumps([reward_name(r) for r in reward])
    return getattr(reward, "__qualname__", type(reward).__qualname__)
