"""The library's module, one policy after the other: the readable reference of a forward."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..averaging.state_dicts import Weights
from .attention import positions
from .trial import cached, learned, left_in_modules, padded, trial_of

# what a config calls the bound of its logits, which are then cap · tanh(logits / cap)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class LinearHead:
    """Where a module's logits come from: W·x + b of its last hidden states, capped where its config says so."""

    def __init__(self, model: PreTrainedModel):
        layer, names = model.get_output_embeddings(), {id(p): name for name, p in model.named_parameters()}
        self.weight, self.bias = names[id(layer.weight)], names.get(id(layer.bias))
        config = model.config.get_text_config()
        self.cap = next((cap for cap in (getattr(config, name, None) for name in CAPS) if cap is not None), None)

    def __call__(self, w: Weights, x: Tensor) -> Tensor:
        """Logits (E, N, V) of hidden states (E, N, C)."""
        matrix = w[self.weight].transpose(1, 2)
        x = x.to(matrix.dtype)
        logits = torch.bmm(x, matrix) if self.bias is None else torch.baddbmm(w[self.bias].unsqueeze(1), x, matrix)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class HalvedForward:
    """What `ModuleForward` and `VmapForward` share: a library's module, its trunk and its head."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None):
        self.model, self.dtype = model.eval(), dtype  # dropout would make the scored policy another than the sampled

    def prepare(self, weights: Weights) -> Weights:
        """The layers' matrices in the dtype that they are multiplied in, once for many calls."""
        if self.dtype is None:
            return weights
        return {name: tensor.to(self.dtype) if name in self.matrices else tensor for name, tensor in weights.items()}

    def __call__(self, w: Weights, ids: Tensor, mask: Tensor | None = None, cache: Any = None, keep: int = 0) -> Tensor:
        """Logits (E, B, Q − keep, V) of tokens ids (E, B, Q), from position `keep` on."""
        again = isinstance(cache, Recomputed)  # then the logits of all tokens so far would be computed at each
        if (self.dtype is None and not again) or self.linear_head is None:
            return self.run(self.model, w, ids, mask, cache, "logits", keep)
        x = self.hidden(w, ids, mask, cache, keep)
        return self.head(w, x.flatten(1, 2)).view(*x.shape[:3], -1)

    def hidden(self, w: Weights, ids: Tensor, mask: Tensor | None = None, cache: Any = None, keep: int = 0) -> Tensor:
        """The last hidden states, (E, B, Q − keep, C), from position `keep` on."""
        prefix = f"{self.model.base_model_prefix}."
        inner = {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
        return self.run(self.model.base_model, inner, ids, mask, cache, "last_hidden_state", keep)

    def head(self, w: Weights, x: Tensor) -> Tensor:
        """Logits (E, N, V) of last hidden states (E, N, C), where there is a `linear_head`."""
        return self.linear_head(w, x)

    @cached_property
    @torch.no_grad()
    def linear_head(self) -> LinearHead | None:
        """The head, if it gives the module's logits (tried on a few tokens), else None.

        Tried with logits made large, too: under small ones a cap of a name unknown here would not show.
        """
        size = self.model.get_input_embeddings().num_embeddings
        ids = torch.arange(4, device=self.model.device).view(1, 1, 4) % size
        weights = {name: tensor.detach().unsqueeze(0) for name, tensor in self.model.named_parameters()}
        mask = torch.ones_like(ids)
        tolerance = 1e-4 if self.dtype is None else 0.05  # the module's own head is in `dtype`, too
        self.run(self.model, weights, ids, mask, None, "logits")  # a module that has no logits says so
        try:
            head = LinearHead(self.model)
            for factor in (1, 1000):
                own = weights | {head.weight: factor * weights[head.weight]}
                expected = self.run(self.model, own, ids, mask, None, "logits")
                logits = head(own, self.hidden(own, ids, mask).flatten(1, 2)).view(expected.shape)
                if not (logits - expected).abs().max() < tolerance * expected.abs().max():
                    return None
        except Exception:  # whatever a module has in place of a trunk and a head
            return None
        return head

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

    A module that takes no heed of padding is given sequences of one length at a time. One whose cache does not
    give its own logits (Mamba's and RWKV's go by other names than the library's caches) goes without.
    Raises ValueError where nothing can be checkpointed.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None, checkpointing: bool = False):
        super().__init__(model, dtype)
        self.layers = []  # those that are computed again
        if checkpointing:
            self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
            if not self.layers:
                raise ValueError(f"checkpointing: {type(model).__name__} has no layers that can be checkpointed; "
                                 "leave it out")

    @cached_property
    def can_pad(self) -> bool:
        """Whether the module's logits are the same with padding and without, as a trial says."""
        def find():
            plain = ModuleForward(self.model)
            plain.can_pad = True
            return padded(plain, trial_of(self.model))

        return learned(self.model, "padding", find)

    @cached_property
    def can_cache(self) -> bool:
        """Whether the module's logits are the same with a cache and without, as a trial says."""
        def find():
            plain = ModuleForward(self.model)
            plain.can_pad = plain.can_cache = True
            return cached(plain, trial_of(self.model))

        return self.can_pad and learned(self.model, "cache", find)

    @cached_property
    def states(self) -> list[tuple[torch.nn.Module, str]]:
        """Where modules keep the state of their last sequences, by module and name (RecurrentGemma's do)."""
        def find():
            trial_of(self.model)
            return left_in_modules(self.model)

        return learned(self.model, "states", find)

    def new_cache(self, policies: int, batch: int, length: int, like: Tensor) -> list[DynamicCache] | Recomputed:
        """One dynamic cache a policy, or the tokens themselves where those do not serve."""
        if not self.can_cache:
            tell_once(f"warp-lite: the cache of a {type(self.model).__name__} does not give its own logits; it is "
                      "sampled without one, which is slower")
            return Recomputed()
        return [DynamicCache(config=self.model.config) for _ in range(policies)]

    def cache_of(self, cache: list[DynamicCache] | Recomputed, rows: Tensor) -> list[DynamicCache] | Recomputed:
        """The cache of those sequences alone whose places in the batch are `rows` (E, some)."""
        if isinstance(cache, Recomputed):
            cache.ids = cache.ids.gather(1, rows.unsqueeze(-1).expand(-1, -1, cache.ids.shape[-1]))
            return cache
        for own, places in zip(cache, rows):
            own.reorder_cache(places)  # which the states of linear attention heed; `batch_select_indices` does not
        return cache

    def run(self, module: torch.nn.Module, w: Weights, ids: Tensor, mask: Tensor | None,
            cache: list[DynamicCache] | Recomputed | None, field: str, keep: int = 0) -> Tensor:
        """A field of the module's output for ids (E, B, Q), from position `keep` on, a policy at a time: (E, B, Q −
        keep, …)."""
        if isinstance(cache, Recomputed):
            cache.ids = ids if cache.ids is None else torch.cat([cache.ids, ids], -1)
            start = cache.ids.shape[-1] - ids.shape[-1]
            return self.run(module, w, cache.ids, mask, None, field, start + keep)
        results = []
        again = self.layers and cache is None and torch.is_grad_enabled()
        with (nullcontext() if self.dtype is None else torch.autocast(
                ids.device.type, self.dtype, cache_enabled=False),
              _checkpointed_layers(self.layers) if again else nullcontext()):
            for e in range(ids.shape[0]):
                own = {name: tensor[e] for name, tensor in w.items()}
                if mask is not None and not self.can_pad:
                    results.append(_by_length(module, own, ids[e], mask[e], field)[:, keep:])
                    continue
                options = {"use_cache": cache is not None, "past_key_values": cache[e] if cache else None}
                if mask is not None:
                    options["attention_mask"] = mask[e].long()
                    options["position_ids"] = positions(mask[e])[:, -ids.shape[-1]:]
                results.append(getattr(functional_call(module, own, (ids[e],), options), field)[:, keep:])
        for keeper, name in self.states:  # with a gradient in it a module could not be copied
            value = getattr(keeper, name)
            setattr(keeper, name, None if value is None else value.detach())
        return torch.stack(results)


class Recomputed:
    """In the place of a cache, the tokens (E, B, K) so far: all are computed again for each that follows."""

    ids: Tensor | None = None


def _by_length(module, weights, ids: Tensor, mask: Tensor, field: str) -> Tensor:
    """A field of the module's output for ids (B, Q), those of equal padding on the left together and without it."""
    padding = (mask.cumsum(-1) == 0).sum(-1)
    result = None
    for count in padding.unique().tolist():
        rows = (padding == count).nonzero()[:, 0]
        part = getattr(functional_call(module, weights, (ids[rows, count:],), {"use_cache": False}), field)
        if result is None:
            result = part.new_zeros(*ids.shape, part.shape[-1])
        result = result.index_copy(0, rows, torch.nn.functional.pad(part, (0, 0, count, 0)))
    return result


@cache
def tell_once(line: str) -> None:
    """A line on stderr, once in the life of the process."""
    print(line, file=sys.stderr)


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
