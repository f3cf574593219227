"""Random numbers that belong to a policy and a step, never to the batch they are used in.

Every draw comes from a generator seeded by what it is for, so batched, serial and remote
execution use the same numbers, and a resumed run needs no saved generator state.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# What a draw is for: the last word of its key.
PROMPT_ORDER, TOKENS, EVALUATION, WORLD, ADAPTERS = range(5)


def generator(*key: int) -> np.random.Generator:
    """The generator that belongs to a key of non-negative integers."""
    return np.random.default_rng(key)


@lru_cache(maxsize=4096)
def _epoch(key: tuple[int, ...], epoch: int, prompts: int) -> np.ndarray:
    return generator(*key, epoch, PROMPT_ORDER).permutation(prompts)


def prompt_indices(key: tuple[int, ...], step: int, batch: int, prompts: int) -> np.ndarray:
    """Which prompts a run sees at a step (from 0): its own permutation of all, anew each epoch, (batch,)."""
    places = np.arange(step * batch, (step + 1) * batch)
    return np.array([_epoch(key, int(p // prompts), prompts)[p % prompts] for p in places])


def token_uniforms(key: tuple[int, ...], step: int, batch: int, length: int) -> Tensor:
    """The numbers in [0, 1) that decide the tokens of a run at a step, float64 (batch, length)."""
    return torch.from_numpy(generator(*key, step, TOKENS).random((batch, length)))
