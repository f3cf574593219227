"""The library's module mapped over policies."""

from __future__ import annotations

import inspect
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ..averaging.state_dicts import Weights
from .attention import attention_bias, positions
from .module_forward import HalvedForward
from .shape import shape_of


class VmapForward(HalvedForward):
    """The library's module mapped over policies, or of one policy, its causal masks and positions passed in."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None):
        super().__init__(model, dtype)
        config = model.config.get_text_config()
        shape = shape_of(model)
        self.layers, self.kv_heads, self.head_size = shape.layers, shape.kv_heads, shape.head_size
        self.window = getattr(config, "sliding_window", None)
        self.kinds = set(getattr(config, "layer_types", None) or ())
        self.by_kind = bool(self.kinds)  # the module wants a mask for each kind of layer, or one for all of them
        if not self.kinds:
            self.kinds = {"sliding_attention" if self.window else "full_attention"}

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether a trial is worth it: attention of known kinds alone."""
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
        return shape_of(model).heads > 0 and {"full_attention", "sliding_attention"}.issuperset(kinds)

    def new_cache(self, policies: int, batch: int, length: int, like: Tensor) -> StackedCache:
        """Room for the keys and values of `length` tokens of `batch` sequences of each policy."""
        shape = (policies, batch, self.kv_heads, length, self.head_size)
        return StackedCache([like.new_zeros(shape, dtype=self.dtype) for _ in range(2 * self.layers)])

    def cache_of(self, cache: StackedCache, rows: Tensor) -> StackedCache:
        """The cache of those sequences alone whose places in the batch are `rows` (E, some)."""
        policies = torch.arange(len(rows), device=rows.device).unsqueeze(1)
        return StackedCache([buffer[policies, rows] for buffer in cache.buffers], cache.length)

    def run(self, module: torch.nn.Module, w: Weights, ids: Tensor, mask: Tensor | None, cache: StackedCache | None,
            field: str, keep: int = 0) -> Tensor:
        """A field of the module's output for ids (E, B, Q), from position `keep` on, all policies at once: (E, B, Q −
        keep, …)."""
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
            output = functional_call(module, weights, (ids,), {
                "attention_mask": attention, "position_ids": positions, "past_key_values": past,
                "use_cache": past is not None, **last_alone(module, Q - keep)})
            return getattr(output, field)[:, keep - Q:]

        given = (w, ids, positions(mask)[..., start:], masks, cache.buffers if cache else [])
        narrow = nullcontext() if self.dtype is None else NarrowProducts(self.dtype)
        if E == 1:  # nothing to map: the kernels without a batch of policies are faster
            with narrow:
                result = one(*tree_map(partial(torch.squeeze, dim=0), given)).unsqueeze(0)
        else:  # the fused kernels of attention have no batching rule and would be looped over
            with narrow, sdpa_kernel(SDPBackend.MATH), _padding_without_gradient(self.model.get_input_embeddings()):
                result = vmap(one)(*given)
        if cache:
            cache.length += Q
        return result


def last_alone(module: torch.nn.Module, count: int) -> dict[str, int]:
    """The option by which the library's module computes the logits of the last `count` tokens alone, where it has it:
    a head of many words costs as much as some layers."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}


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
