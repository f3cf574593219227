"""How the logits of E policies of one architecture are computed from weights with a leading axis E.

Three ways with one interface:

- `ModuleForward`: the library's module, one policy after the other. The readable reference.
- `VmapForward`: the same module under `torch.func.vmap`. Any architecture whose forward vmaps
  and takes its masks from outside; `supports` tries it, and what fails is left to `ModuleForward`.
- `gpt2.GPT2Forward`: batched matrix products written by hand.

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
from contextlib import contextmanager, nullcontext
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .gpt2 import GPT2Forward, attention_bias, positions


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


class LinearHead:
    """Where a module's logits come from: W·x + b of its last hidden states, capped where its config says so."""

    def __init__(self, model):
        layer, names = model.get_output_embeddings(), {id(p): name for name, p in model.named_parameters()}
        self.weight, self.bias = names[id(layer.weight)], names.get(id(layer.bias))
        self.cap = getattr(model.config, "final_logit_softcapping", None)

    def __call__(self, w, x: Tensor) -> Tensor:
        """Logits (E, N, V) of hidden states (E, N, C)."""
        matrix = w[self.weight].transpose(1, 2)
        x = x.to(matrix.dtype)
        logits = torch.bmm(x, matrix) if self.bias is None else torch.baddbmm(w[self.bias].unsqueeze(1), x, matrix)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class HalvedForward:
    """What `ModuleForward` and `VmapForward` share: a library's module, its trunk and its head."""

    def __init__(self, model, dtype: torch.dtype | None = None):
        self.model, self.dtype = model.eval(), dtype  # dropout would make the scored policy another than the sampled

    def prepare(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layers' matrices in the dtype that they are multiplied in, once for many calls."""
        if self.dtype is None:
            return weights
        return {name: tensor.to(self.dtype) if name in self.matrices else tensor for name, tensor in weights.items()}

    def __call__(self, w, ids: Tensor, mask: Tensor | None = None, cache=None, keep: int = 0) -> Tensor:
        """Logits (E, B, Q − keep, V)."""
        if self.dtype is None or self.linear_head is None:
            return self.run(self.model, w, ids, mask, cache, lambda output: output.logits[:, keep:])
        x = self.hidden(w, ids, mask, cache)[:, :, keep:]
        return self.head(w, x.flatten(1, 2)).view(*x.shape[:3], -1)

    def hidden(self, w, ids: Tensor, mask: Tensor | None = None, cache=None) -> Tensor:
        """The last hidden states, (E, B, Q, C)."""
        prefix = f"{self.model.base_model_prefix}."
        inner = {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
        return self.run(self.model.base_model, inner, ids, mask, cache, lambda output: output.last_hidden_state)

    def head(self, w, x: Tensor) -> Tensor:
        """Logits (E, N, V) of last hidden states (E, N, C), where there is a `linear_head`."""
        return self.linear_head(w, x)

    @cached_property
    @torch.no_grad()
    def linear_head(self) -> LinearHead | None:
        """The head, if it gives the module's logits (tried on a few tokens), else None."""
        ids = torch.arange(4, device=self.model.device).view(1, 1, 4) % self.model.config.vocab_size
        weights = {name: tensor.detach().unsqueeze(0) for name, tensor in self.model.named_parameters()}
        mask = torch.ones_like(ids)
        expected = self.run(self.model, weights, ids, mask, None, lambda output: output.logits)
        try:
            head = LinearHead(self.model)
            logits = head(weights, self.hidden(weights, ids, mask).flatten(1, 2)).view(expected.shape)
        except Exception:  # whatever a module has in place of a trunk and a head
            return None
        tolerance = 1e-4 if self.dtype is None else 0.05  # the module's own head is in `dtype`, too
        return head if (logits - expected).abs().max() < tolerance * expected.abs().max() else None

    @cached_property
    def matrices(self) -> set[str]:
        """The names of weights and biases of the linear layers, the head's left out."""
        head = self.model.get_output_embeddings()
        inside = {f"{name}.{own}" for name, module in self.model.named_modules() if module is not head
                  and isinstance(module, (torch.nn.Linear, Conv1D)) for own, _ in module.named_parameters()}
        return inside & {name for name, _ in self.model.named_parameters()}


class ModuleForward(HalvedForward):
    """The library's own module, cache and masks, one policy after the other.

    With `checkpointing` the library computes its layers again in the backward pass, with the module's
    own weights: those of `w` must be they.
    """

    def __init__(self, model, dtype: torch.dtype | None = None, checkpointing: bool = False):
        super().__init__(model, dtype)
        self.layers = []  # those that are computed again
        if checkpointing:
            self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
            if not self.layers:
                raise ValueError(f"checkpointing: {type(model).__name__} has no layers that can be checkpointed; "
                                 "leave it out")

    def new_cache(self, policies: int, batch: int, length: int, like: Tensor) -> list[DynamicCache]:
        """One dynamic cache a policy."""
        return [DynamicCache(config=self.model.config) for _ in range(policies)]

    def cache_of(self, cache: list[DynamicCache], rows: Tensor) -> list[DynamicCache]:
        """The cache of those sequences alone whose places in the batch are `rows` (E, some)."""
        for own, some in zip(cache, rows):
            own.batch_select_indices(some)
        return cache

    def run(self, module, w, ids: Tensor, mask: Tensor | None, cache, pick) -> Tensor:
        """What `pick` takes of the module's output, for each policy."""
        results = []
        again = self.layers and cache is None and torch.is_grad_enabled()
        with (nullcontext() if self.dtype is None else torch.autocast(
                ids.device.type, self.dtype, cache_enabled=False),
              _checkpointed_layers(self.layers) if again else nullcontext()):
            for e in range(ids.shape[0]):
                options = {"use_cache": cache is not None, "past_key_values": cache[e] if cache else None}
                if mask is not None:
                    options["attention_mask"] = mask[e].long()
                    options["position_ids"] = positions(mask[e])[:, -ids.shape[-1]:]
                out = functional_call(module, {name: tensor[e] for name, tensor in w.items()}, (ids[e],), options)
                results.append(pick(out))
        return torch.stack(results)


@contextmanager
def _checkpointed_layers(layers: list[GradientCheckpointingLayer]):
    """The library's gradient checkpointing, which it heeds in layers that train: it is switched on in the
    layers themselves, so that the dropout within them stays off and no flag of the user's model changes."""
    before = [(layer.gradient_checkpointing, getattr(layer, "_gradient_checkpointing_func", None)) for layer in layers]
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer, (on, function) in zip(layers, before):
            layer.training, layer.gradient_checkpointing, layer._gradient_checkpointing_func = False, on, function


class VmapForward(HalvedForward):
    """The library's module mapped over policies, its causal masks and positions passed in."""

    def __init__(self, model, dtype: torch.dtype | None = None):
        super().__init__(model, dtype)
        config = model.config
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

    def new_cache(self, policies: int, batch: int, length: int, like: Tensor) -> StackedCache:
        """Room for the keys and values of `length` tokens of `batch` sequences of each policy."""
        shape = (policies, batch, self.kv_heads, length, self.head_size)
        return StackedCache([like.new_zeros(shape, dtype=self.dtype) for _ in range(2 * self.layers)])

    def cache_of(self, cache: StackedCache, rows: Tensor) -> StackedCache:
        """The cache of those sequences alone whose places in the batch are `rows` (E, some)."""
        policies = torch.arange(len(rows), device=rows.device).unsqueeze(1)
        return StackedCache([buffer[policies, rows] for buffer in cache.buffers], cache.length)

    def run(self, module, w, ids: Tensor, mask: Tensor | None, cache: StackedCache | None, pick) -> Tensor:
        """What `pick` takes of the module's output, for all policies."""
        E, B, Q = ids.shape
        start = cache.length if cache else 0
        if mask is None:
            mask = ids.new_ones(E, B, start + Q)
        dtype = self.dtype or next(iter(w.values())).dtype
        full = attention_bias(mask, Q, start, dtype, ids.device).view(E, B, 1, Q, start + Q)
        masks = {"full_attention": full}
        if "sliding_attention" in self.kinds:
            distance = torch.arange(start, start + Q, device=ids.device)[:, None] - torch.arange(
                start + Q, device=ids.device)
            masks["sliding_attention"] = full.masked_fill(distance >= self.window, torch.finfo(dtype).min)
        masks = {kind: masks[kind] for kind in self.kinds}

        def one(weights, ids, positions, masks, buffers):
            attention = masks if self.by_kind else next(iter(masks.values()))
            past = None
            if buffers:
                past = Cache(layers=[_Slot(k, v, start) for k, v in zip(buffers[::2], buffers[1::2])])
            return pick(functional_call(module, weights, (ids,), {
                "attention_mask": attention, "position_ids": positions, "past_key_values": past,
                "use_cache": past is not None}))

        # The fused kernels have no batching rule and would be looped over.
        with (nullcontext() if self.dtype is None else NarrowProducts(self.dtype), sdpa_kernel(SDPBackend.MATH),
              _padding_without_gradient(self.model.get_input_embeddings())):
            result = vmap(one)(w, ids, positions(mask)[..., start:], masks, cache.buffers if cache else [])
        if cache:
            cache.length += Q
        return result


class NarrowProducts(TorchFunctionMode):
    """What `torch.autocast` does to matrix products and attention; under vmap that reaches some of them only."""

    products = {F.linear, F.scaled_dot_product_attention, torch.addmm, torch.matmul, torch.bmm, torch.baddbmm,
                Tensor.matmul, Tensor.__matmul__}

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call the function, its float32 tensors narrowed if it is a product."""
        kwargs = kwargs or {}
        if function in self.products:
            args, kwargs = tree_map_only(Tensor, self.narrow, (args, kwargs))
        return function(*args, **kwargs)

    def narrow(self, tensor: Tensor) -> Tensor:
        """A float32 tensor in the dtype of the products."""
        return tensor.to(self.dtype) if tensor.dtype == torch.float32 else tensor


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

    def __init__(self, buffers: list[Tensor], length: int = 0):
        self.buffers, self.length = buffers, length


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
