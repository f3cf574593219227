"""How rewards are called.

A reward is any callable `reward(prompts, completions, **kwargs) -> list[float]`, the
signature that TRL uses; where the prompts are conversations, so are the completions. It may
be `async def`, and None in the place of a number leaves a completion out. A text-classification
pipeline of the library will do too. One that names `whole_texts` among its parameters is given
each prompt with its completion as one text in the policy's words, and one that has a method
`from_ids(prompts, ids, mask)` the token ids instead, and nothing is decoded.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import lru_cache
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..policies.prompts import is_conversation
from ..policies.sampling import Rollout, completion_ids, completions_text, without_end
from .classifiers import PipelineReward

if TYPE_CHECKING:
    from transformers import Pipeline

# reward(prompts=…, completions=…, **columns of the data set) -> a number for each completion, as TRL's reward
# functions: prompts and completions are lists of texts or of conversations, and what it does not name it is not given.
RewardFunc = Callable[..., Sequence[float]]
Value = TypeVar("Value")
LEFT_OUT = ("completion", "completion_ids")  # columns that no reward is given, as by TRL


class NotFinite(ValueError):
    """Rewards that are NaN or infinite: `places` has, by policy, the first such completion and its value."""

    def __init__(self, places: Mapping[int, tuple[int, float]], prompt: str):
        value = next(iter(places.values()))[1]
        super().__init__(f"the reward is {value} for a completion of the prompt {prompt[:80]!r}; "
                         "rewards must be finite")
        self.places = dict(places)


class SeveralRewards:
    """Several rewards as one: their mean or, with `weights`, Σ w_k r_k as TRL's `reward_weights` make it.

    A reward that does not score a completion (None) is left out of its mean or sum; where none does, the
    completion has none.
    """

    def __init__(self, rewards: Sequence[RewardFunc], weights: Sequence[float] | None = None):
        """Raises ValueError where there is not one weight for each reward."""
        if weights is not None and len(weights) != len(rewards):
            raise ValueError(f"there are {len(weights)} reward_weights for {len(rewards)} rewards; give one for each")
        self.rewards, self.weights = list(rewards), weights

    def __call__(self, /, prompts: list, completions: list, completion_ids: list | None = None,
                 whole_texts: list[str] | None = None, **columns: object) -> list[float | None]:
        """The values (N,) of all rewards, brought together; None where none has one.

        Raises ValueError where a reward returns something else than a number for each completion.
        """
        if completion_ids is not None:
            columns["completion_ids"] = completion_ids
        rows = np.array([reward_values(call_reward(reward, prompts, completions, columns, whole_texts),
                                       len(completions)) for reward in self.rewards], dtype=object)    # (K, N)
        scored = rows != None  # noqa: E711 (by element)
        values = np.where(scored, rows, 0).astype(float)
        if self.weights is not None:
            total = (np.array(self.weights, dtype=float)[:, None] * values).sum(0)
        else:
            total = values.sum(0) / np.maximum(scored.sum(0), 1)
        return [value if has_one else None for value, has_one in zip(total.tolist(), scored.any(0))]


def mean_reward(rewards: Sequence[RewardFunc]) -> RewardFunc:
    """The mean of several rewards, as one; the reward itself where all are the same."""
    return rewards[0] if len({id(reward) for reward in rewards}) == 1 else SeveralRewards(rewards)


def trained_reward(reward: RewardFunc | Sequence[RewardFunc], trl: Mapping) -> RewardFunc:
    """What a run of TRL maximised, of its reward functions and what config.json notes of its arguments: Σ w_k r_k.

    One function in the place of several that were weighted is somebody's own measure and stays as it is.
    Raises ValueError for a list that the noted weights do not fit.
    """
    several, weights = isinstance(reward, (list, tuple)), trl.get("reward_weights")
    if weights is None:
        return SeveralRewards(reward, [1.0] * len(reward)) if several else reward
    if several or len(weights) == 1:
        return SeveralRewards(reward if several else [reward], weights)
    return reward


def rollout_rewards(rewards: Sequence[RewardFunc], rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The reward (E, B) of each completion, float64; no gradient passes through it.

    `rewards` holds the reward of each of the E policies; one that several share is called once. A completion
    for which a function returned None has NaN: it is left out of every mean.
    Raises ValueError when a function returns something else than as many numbers as there are completions,
    and NotFinite when one of those is NaN or infinite.
    """
    E, B, _ = rollout.ids.shape
    result = torch.empty(E, B, dtype=torch.float64)
    places: dict[int, tuple[int, float]] = {}
    for reward in {id(reward): reward for reward in rewards}.values():
        members = [e for e in range(E) if rewards[e] is reward]
        part = rollout if len(members) == E else rollout.select(members)
        values_of = _from_ids if hasattr(reward, "from_ids") else _from_texts
        values, bad = values_of(reward, part, tokenizer)
        result[members] = values.cpu()
        for row, column in bad.nonzero().tolist():
            places.setdefault(members[row], (column, result[members[row], column].item()))
    if places:
        e, (b, _) = min(places.items())
        raise NotFinite(dict(sorted(places.items())), rollout.prompts.texts[e * B + b])
    return result.to(rollout.ids.device)


def _from_ids(reward, rollout: Rollout, tokenizer) -> tuple[Tensor, Tensor]:
    """The values (E, B) of a model that reads token ids, and which of them are not finite; it is handed copies, which
    it may change."""
    if not _same_tokens(getattr(reward, "tokenizer", tokenizer), tokenizer):
        raise ValueError(f"the {type(reward).__name__} reads token ids, but those of another tokenizer than the "
                         "policy's; take a reward model of the policy's tokenizer, or one that reads texts")
    prompts = rollout.prompts
    prompts = dataclasses.replace(prompts, texts=list(prompts.texts), ids=prompts.ids.clone(),
                                  mask=prompts.mask.clone(), columns=fresh(prompts.columns),
                                  given=fresh(prompts.given))
    values = reward.from_ids(prompts, rollout.ids.clone(), rollout.mask.clone())
    values = values.detach().to(rollout.ids.device).double().view(rollout.ids.shape[:-1])
    return values, ~torch.isfinite(values)


def _from_texts(reward, rollout: Rollout, tokenizer) -> tuple[Tensor, Tensor]:
    """The values (E, B) of a function of TRL's signature, NaN for None, and which of them are numbers that are not
    finite; it is handed texts or conversations."""
    E, B, _ = rollout.ids.shape
    prompts, whole_texts = rollout.prompts.given, None
    completions = completions_text(tokenizer, rollout)
    if is_conversation(prompts[0]):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    elif reads_whole_texts(reward):
        backwards = completion_ids(rollout.prompts.ids.flip(-1), rollout.prompts.mask)  # padded on the left
        rows = [prompt[::-1] + row for prompt, row in zip(backwards, without_end(rollout))]
        whole_texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    columns = {name: values for name, values in rollout.prompts.columns.items() if name not in LEFT_OUT}
    columns["completion_ids"] = completion_ids(rollout.ids, rollout.mask)
    values = reward_values(call_reward(reward, prompts, completions, columns, whole_texts), E * B)
    bad = [value is not None and not math.isfinite(value) for value in values]
    values = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
    return values.to(rollout.ids.device).view(E, B), torch.tensor(bad, device=rollout.ids.device).view(E, B)


@lru_cache(maxsize=8)
def _same_tokens(first, second) -> bool:
    return first is second or first.get_vocab() == second.get_vocab()


def reward_values(returned: object, count: int) -> list[float | None]:
    """What a reward function returned as `count` numbers, None where it scored nothing.

    Taken are lists, tuples, arrays, series and tensors of one axis, and what else gives numbers in an order.
    Raises ValueError in one line for anything else (dicts, sets and texts have no numbers in an order) and for
    another count.
    """
    refused = ValueError(f"the reward function returned {str(returned)[:60]!r} ({type(returned).__name__}), "
                         "not a list of numbers")
    values = returned.detach().tolist() if isinstance(returned, Tensor) else returned
    if (not isinstance(values, Iterable) or isinstance(values, (Mapping, Set, str, bytes, bytearray))
            or getattr(returned, "ndim", 1) != 1):
        raise refused
    numbers: list[float | None] = []
    for value in values:
        if isinstance(value, (str, bytes, bytearray, complex, np.complexfloating)) or getattr(value, "ndim", 0):
            raise refused
        try:
            numbers.append(None if value is None else float(value))
        except (TypeError, ValueError, OverflowError):
            raise refused from None
    if len(numbers) != count:
        raise ValueError(f"the reward function returned {len(numbers)} values for {count} completions")
    return numbers


def call_reward(reward: RewardFunc | Pipeline, prompts: list, completions: list,
                columns: Mapping[str, list] | None = None, whole_texts: list[str] | None = None) -> object:
    """Call a reward function with those arguments that it takes, all of them copies that it may change.

    `columns` are further keyword arguments, a value for each completion; `whole_texts` are for a function that
    names them. By keyword, as TRL does, if it names `completions` or `completion_ids` or takes nothing but
    keywords; else prompts and completions are its first two arguments, whatever it calls them.
    What an `async def` gives is awaited.
    """
    reward = as_function(reward)
    prompts, completions, columns = fresh(prompts), fresh(completions), fresh(dict(columns or {}))
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return awaited(reward(prompts, completions))
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    by_position = [p.name for p in parameters
                   if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if whole_texts is not None and "whole_texts" in named:
        columns["whole_texts"] = list(whole_texts)
    if by_position and not named & {"completions", "completion_ids"}:
        first_two = {*by_position[:2], "prompts", "completions"}
        further = {name: value for name, value in accepted(reward, columns).items() if name not in first_two}
        return awaited(reward(prompts, completions, **further))
    return awaited(reward(**accepted(reward, {**columns, "prompts": prompts, "completions": completions})))


def as_function(reward: RewardFunc | Pipeline) -> Callable:
    """A pipeline of the library as a function; any other reward as it is."""
    pipelines = sys.modules.get("transformers.pipelines")
    return PipelineReward(reward) if pipelines and isinstance(reward, pipelines.Pipeline) else reward


def accepted(reward: RewardFunc, arguments: Mapping[str, object]) -> dict:
    """Those keyword arguments that a function names; all of them where it takes any."""
    parameters = inspect.signature(reward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in {p.name for p in parameters}}


def reads_whole_texts(reward: RewardFunc | Pipeline) -> bool:
    """Whether a reward names `whole_texts`: each prompt and its completion, decoded together."""
    try:
        return "whole_texts" in inspect.signature(as_function(reward)).parameters
    except (TypeError, ValueError):
        return False


def fresh(value: Value) -> Value:
    """A copy of lists, dicts, arrays and tensors, all the way down; anything else is handed on as it is."""
    if isinstance(value, list):
        return [fresh(item) for item in value]
    if isinstance(value, tuple):
        return tuple(map(fresh, value)) if type(value) is tuple else value
    if isinstance(value, dict):
        return {name: fresh(item) for name, item in value.items()}
    return copy.deepcopy(value) if isinstance(value, (set, np.ndarray, Tensor)) else value


def awaited(value: object) -> object:
    """What a function returned; of an `async def` what it comes to, in one event loop for all calls.

    That loop has a thread of its own, since a notebook's is running already; and it stays, as TRL's does, since
    clients of a server are bound to the loop in which they were first used. Raises what the function raises.
    """
    if not inspect.isawaitable(value):
        return value

    async def result():
        return await value

    return asyncio.run_coroutine_threadsafe(result(), _event_loop()).result()


@lru_cache(maxsize=1)
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


def reward_name(reward: RewardFunc | Sequence[RewardFunc]) -> str:
    """How a run folder calls a reward: its qualified name, or that of its class; of a list, JSON of the names."""
    if isinstance(reward, (list, tuple)):
        return json.dumps([reward_name(r) for r in reward])
    return getattr(reward, "__qualname__", type(reward).__qualname__)
