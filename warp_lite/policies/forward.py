"""How the logits of E policies of one architecture are computed from weights with a leading axis E.

Three ways with one interface:

- `ModuleForward`: the library's module, one policy after the other. The readable reference.
- `VmapForward`: the same module under `torch.func.vmap`. Any architecture whose forward vmaps
  and takes its masks from outside; `supports` tries it, and what fails is left to `ModuleForward`.
- `GPT2Forward`: batched matrix products written by hand.

Each has `prepare(weights)` (what many calls with the same weights share), `new_cache(...)`,
`cache_of(cache, rows)` and `__call__(prepared, ids, mask=None, cache=None, keep=0)`: logits (E, B, Q − keep, V) of
tokens ids (E, B, Q), where `mask` (E, B, K) is 1 for tokens and 0 for left or right padding
and None says that there is no padding. `hidden` (the same arguments but `keep`) and `head` are
its two halves, for whom all logits at once are too many.

With a `dtype` the products with the layers' matrices are taken in it, and the head in the
dtype of the weights. With `checkpointing` a layer keeps its input alone for the backward pass.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

import torch

from .gpt2_forward import GPT2Forward
from .module_forward import ModuleForward
from .vmap_forward import VmapForward


def make_forward(model, executor: str = "batched", dtype: torch.dtype | None = None, checkpointing: bool = False,
                 chunked: bool = False):
    """The forward for an executor: the reference for "serial", else the fastest that serves the model.

    Raises ValueError where it cannot do with `checkpointing`, or with logits in chunks.
    """
    if executor == "serial":
        forward = ModuleForward(model, dtype, checkpointing)
    else:
        reuse_memory()
        fastest = next((kind for kind in (GPT2Forward, VmapForward) if kind.supports(model)), ModuleForward)
        if checkpointing and fastest is not GPT2Forward:
            raise ValueError(f"checkpointing: policies of type {type(model).__name__} cannot be checkpointed while "
                             "they train together; use executor='serial'")
        forward = fastest(model, dtype, checkpointing) if checkpointing else fastest(model, dtype)
    if chunked and not isinstance(forward, GPT2Forward) and forward.linear_head is None:
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
