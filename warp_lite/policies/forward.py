"""How the logits of E policies of one architecture are computed from weights with a leading axis E.

Four ways with one interface, `Forward`, which `sampling.Policies` alone calls:

- `ModuleForward`: the library's module, one policy after the other. The readable reference.
- `VmapForward`: the same module under `torch.func.vmap`. Any architecture whose forward vmaps
  and takes its masks from outside.
- `GPT2Forward` and `LlamaForward`: batched matrix products written by hand.

Each is tried on a few tokens before it is used (`trial.py`); what fails is left to `ModuleForward`.

With a `dtype` the products with the layers' matrices are taken in it, and the head in the
dtype of the weights. With `checkpointing` a layer keeps its input alone for the backward pass.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..averaging.state_dicts import Weights
from .gpt2_forward import GPT2Forward
from .llama_forward import LlamaForward
from .module_forward import ModuleForward
from .trial import learned, serves, trial_of
from .vmap_forward import VmapForward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BY_HAND = (GPT2Forward, LlamaForward)


class Forward(Protocol):
    """Logits of E policies from their weights (E, …).

    `prepared` is what `prepare` made of the weights, `cache` what `new_cache` or `cache_of` made. Of tokens
    ids (E, B, Q) the `mask` (E, B, K), K the tokens of the cache and these, is 1 for tokens and 0 for padding
    on the left or right; None says that there is no padding.
    """

    model: torch.nn.Module
    dtype: torch.dtype | None

    def prepare(self, weights: Weights) -> Any:
        """What many calls with the same weights share; differentiable."""

    def new_cache(self, policies: int, batch: int, length: int, like: Tensor) -> Any:
        """An empty cache for `length` tokens of `batch` sequences of each policy, with dtype and device of `like`."""

    def cache_of(self, cache: Any, rows: Tensor) -> Any:
        """The cache of those sequences alone whose places in the batch are `rows` (E, some)."""

    def __call__(self, prepared: Any, ids: Tensor, mask: Tensor | None = None, cache: Any = None,
                 keep: int = 0) -> Tensor:
        """Logits (E, B, Q − keep, V) of ids (E, B, Q), from position `keep` on; a cache takes in the tokens."""

    def hidden(self, prepared: Any, ids: Tensor, mask: Tensor | None = None, cache: Any = None,
               keep: int = 0) -> Tensor:
        """The first half of a call: the hidden states (E, B, Q − keep, C) that `head` takes, from `keep` on."""

    def head(self, prepared: Any, x: Tensor) -> Tensor:
        """The second half: logits (E, N, V) of hidden states (E, N, C), for whom all at once are too many."""


def make_forward(model: PreTrainedModel, executor: str = "batched", dtype: torch.dtype | None = None,
                 checkpointing: bool = False, chunked: bool = False) -> Forward:
    """The forward for an executor: the reference for "serial", else the fastest that serves the model.

    Raises ValueError where it cannot do with `checkpointing`, or with logits in chunks, and for a model that is no
    causal LM.
    """
    learned(model, "itself", lambda: trial_of(model) is not None)
    if executor == "serial":
        forward = ModuleForward(model, dtype, checkpointing)
    else:
        reuse_memory()
        fastest = next((kind for kind in (*BY_HAND, VmapForward)
                        if kind.supports(model) and serves(kind(model), model)), ModuleForward)
        if checkpointing and fastest not in BY_HAND:
            raise ValueError(f"checkpointing: policies of type {type(model).__name__} cannot be checkpointed while "
                             "they train together; use executor='serial'")
        forward = fastest(model, dtype, checkpointing) if checkpointing else fastest(model, dtype)
    if chunked and not isinstance(forward, BY_HAND) and forward.linear_head is None:
        raise ValueError(f"logit_chunk: the logits of a {type(model).__name__} are not a linear map of its last "
                         "hidden states; leave it at 0")
    return forward


@lru_cache(maxsize=1)
def reuse_memory() -> None:
    """Have the C library keep freed memory for the next step instead of giving it back.

    A step frees and asks for the same megabytes again and again; on Linux each time costs a page
    fault for every 4 kB, a fifth of a step of the tiny policies. Elsewhere this does nothing.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold, top_pad = -3, -1, -2
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)
