"""How the logits of E policies of one architecture are computed from weights with a leading axis E.

Three ways with one interface:

- `ModuleForward`: the library's module, one policy after the other. The readable reference.
- `VmapForward`: the same module under `torch.func.vmap`. Any architecture whose forward vmaps
  and takes its masks from outside; `supports` tries it, and what fails is left to `ModuleForward`.
- `gpt2.GPT2Forward`: batched matrix products written by hand.

Each has `prepare(weights)` (what many calls with the same weights share), `new_cache(...)`
and `__call__(prepared, ids, mask=None, cache=None, keep=0)`: logits (E, B, Q − keep, V) of
tokens ids (E, B, Q), where `mask` (E, B, K) is 1 for tokens and 0 for left or right padding
and None says that there is no padding.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from .gpt2 import GPT2Forward, attention_bias, positions


def make_forward(model, executor: str = "batched"):
    """The forward for an executor: the reference for "serial", else the fastest that serves the model."""
    if executor == "serial":
        return ModuleForward(model)
    reuse_memory()
    fastest = next((kind for kind in (GPT2Forward, VmapForward) if kind.supports(model)), ModuleForward)
    return fastest(model)


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


class ModuleForward:
    """The library's own module, cache and masks, one policy after the other."""

    def __init__(self, model):
        self.model = model.eval()  # dropout would make the scored policy another than the sampled one

    def prepare(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nothing to share."""
        return weights

    def new_cache(self, policies: int, batch: int, length: int, like: Tensor) -> list[DynamicCache]:
        """One dynamic cache a policy."""
        return [DynamicCache(config=self.model.config) for _ in range(policies)]

    def __call__(self, w, ids: Tensor, mask: Tensor | None = None, cache=None, keep: int = 0) -> Tensor:
        """Logits (E, B, Q − keep, V)."""
        logits = []
        for e in range(ids.shape[0]):
            options = {"use_cache": cache is not None, "past_key_values": cache[e] if cache else None}
            if mask is not None:
                options["attention_mask"] = mask[e].long()
                options["position_ids"] = positions(mask[e])[:, -ids.shape[-1]:]
            out = functional_call(self.model, {name: tensor[e] for name, tensor in w.items()}, (ids[e],), options)
            logits.append(out.logits[:, keep:])
        return torch.stack(logits)


class VmapForward:
    """The library's module mapped over policies, its causal masks and positions passed in."""

    def __init__(self, model):
        self.model, config = model.eval(), model.config
        self.layers = config.num_hidden_layers
        self.kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.window = getattr(config, "sliding_window", None)
        self.kinds = set(getattr(config, "layer_types", None) or ())
        self.by_kind = bool(self.kinds)  # the module wants a mask for each kind of layer, or one for all of them
        if not self.kinds:
            self.kinds = {"sliding_attention" if self.window else "full_attention"}

    @classmethod
    @torch.no_grad()
    def supports(cls, model) -> bool:
        """Whether this forward computes what the module does: tried on a few tokens, padded and cached."""
        if not {"full_attention", "sliding_attention"}.issuperset(getattr(model.config, "layer_types", None) or ()):
            return False
        weights = {name: tensor.detach().unsqueeze(0) for name, tensor in model.named_parameters()}
        ids = torch.arange(8, device=model.device).view(1, 2, 4) % model.config.vocab_size
        mask = torch.tensor([[[1, 1, 1, 1], [0, 1, 1, 1]]], device=model.device)
        expected = ModuleForward(model)(weights, ids, mask)
        try:
            forward = cls(model)
            cache = forward.new_cache(1, 2, 4, next(iter(weights.values())))
            logits = torch.cat([forward(weights, ids[..., :2], mask[..., :2], cache),
                                forward(weights, ids[..., 2:], mask, cache)], 2)
        except Exception:  # whatever a module does that does not vmap
            return False
        difference = (logits - expected)[mask.bool()].abs().max()
        return bool(difference < 0.05 * expected[mask.bool()].abs().max())  # a wrong mask is far off, bfloat16 is not

    def prepare(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nothing to share."""
        return weights

    def new_cache(self, policies: int, batch: int, length: int, like: Tensor) -> StackedCache:
        """Room for the keys and values of `length` tokens of `batch` sequences of each policy."""
        shape = (policies, batch, self.kv_heads, length, self.head_size)
        return StackedCache([like.new_zeros(shape) for _ in range(2 * self.layers)])

    def __call__(self, w, ids: Tensor, mask: Tensor | None = None, cache: StackedCache | None = None, keep: int = 0):
        """Logits (E, B, Q − keep, V)."""
        E, B, Q = ids.shape
        start = cache.length if cache else 0
        if mask is None:
            mask = ids.new_ones(E, B, start + Q)
        like = next(iter(w.values()))
        full = attention_bias(mask, Q, start, like).view(E, B, 1, Q, start + Q)
        masks = {"full_attention": full}
        if "sliding_attention" in self.kinds:
            distance = torch.arange(start, start + Q, device=ids.device)[:, None] - torch.arange(
                start + Q, device=ids.device)
            masks["sliding_attention"] = full.masked_fill(distance >= self.window, torch.finfo(like.dtype).min)
        masks = {kind: masks[kind] for kind in self.kinds}

        def one(weights, ids, positions, masks, buffers):
            attention = masks if self.by_kind else next(iter(masks.values()))
            past = None
            if buffers:
                past = Cache(layers=[_Slot(k, v, start) for k, v in zip(buffers[::2], buffers[1::2])])
            return functional_call(self.model, weights, (ids,), {
                "attention_mask": attention, "position_ids": positions, "past_key_values": past,
                "use_cache": past is not None}).logits[:, keep:]

        # The fused kernels have no batching rule and would be looped over.
        with sdpa_kernel(SDPBackend.MATH), _padding_without_gradient(self.model.get_input_embeddings()):
            logits = vmap(one)(w, ids, positions(mask)[..., start:], masks, cache.buffers if cache else [])
        if cache:
            cache.length += Q
        return logits


@contextmanager
def _padding_without_gradient(embedding):
    """What `padding_idx` of an embedding means, which vmap heeds for the first policy only."""
    row = getattr(embedding, "padding_idx", None)
    if row is None or not torch.is_grad_enabled():
        yield
        return

    def stop(module, inputs, output):
        return torch.where((inputs[0] == row).unsqueeze(-1), output.detach(), output)

    embedding.padding_idx = None
    handle = embedding.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()
        embedding.padding_idx = row


class StackedCache:
    """Preallocated keys and values of every layer, (E, B, heads, length, size) each."""

    def __init__(self, buffers: list[Tensor]):
        self.buffers, self.length = buffers, 0


class _Slot(DynamicLayer):
    """One layer of the library's cache that writes into a buffer instead of growing."""

    def __init__(self, keys: Tensor, values: Tensor, start: int):
        super().__init__()
        self.keys, self.values, self.start, self.is_initialized = keys, values, start, True

    def update(self, key_states, value_states, *args, **kwargs):
        """Write behind what is there; return all keys and values so far."""
        end = self.start + key_states.shape[-2]
        self.keys[..., self.start:end, :] = key_states
        self.values[..., self.start:end, :] = value_states
        return self.keys[..., :end, :], self.values[..., :end, :]

    def get_seq_length(self) -> int:
        """The tokens before this call."""
        return self.start
