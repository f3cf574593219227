"""A Llama forward for many policies at once, written by hand: one large policy alone is its main use.

Norms over the root of the mean square, rotated queries and keys, fewer key heads than query heads, a gated
feed-forward: Llama's layer is also Mistral's and Qwen2's. The weights keep the names and layout of the library's
module, with a leading axis E. Large matrices in float32 on a CPU are multiplied by `products`, others by batched
products. It agrees with the library's module (tests/test_forward.py).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
)

from ..averaging.state_dicts import Weights
from .attention import attention_bias, positions
from .products import Packs, multiply_each, served
from .rows import gather_rows, offsets
from .shape import shape_of

CAUSAL_LMS, TRUNKS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM), (LlamaModel, MistralModel, Qwen2Model)
QKV, GATED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")


class LlamaForward:
    """Logits of E Llama policies in one pass from their weights (E, …); a `Forward`."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None, checkpointing: bool = False):
        self.model, self.dtype, self.checkpointing = model.eval(), dtype, checkpointing
        shape = shape_of(model)
        self.layers, self.heads, self.kv_heads, self.size = shape.layers, shape.heads, shape.kv_heads, shape.head_size
        self.width, self.eps = shape.width, model.config.rms_norm_eps
        trunk = model if isinstance(model, TRUNKS) else model.model
        self.angles = trunk.rotary_emb
        self.padding = trunk.embed_tokens.padding_idx

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether this forward computes what the module does: full attention, SiLU, and not float64, where the
        library takes its norms in float32 and one last bit of float64 can come out as one of float32."""
        config = model.config
        return (
            type(model) in CAUSAL_LMS + TRUNKS
            and next(model.parameters()).dtype != torch.float64
            and config.hidden_act == "silu"
            and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
            and getattr(config, "sliding_window", None) is None
        )

    def prepare(self, weights: Weights) -> Weights:
        """The weights by their names in the trunk, matrices of layers in the dtype that they are multiplied in."""
        w = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        if self.dtype is not None:
            w = {name: tensor.to(self.dtype) if name.endswith("_proj.weight") else tensor
                 for name, tensor in w.items()}
        return w

    def new_cache(self, policies: int, batch: int, length: int, like: Tensor) -> LlamaCache:
        """Room for the keys and values of `length` tokens of `batch` sequences of each policy."""
        shape = (2, policies * batch, self.kv_heads, length, self.size)
        layers = [like.new_empty(shape, dtype=self.dtype) for _ in range(self.layers)]
        return LlamaCache(layers, Packs(batch, length))

    def cache_of(self, cache: LlamaCache, rows: Tensor) -> LlamaCache:
        """The cache of those sequences alone whose places in the batch are `rows` (E, some)."""
        return cache.of(rows)

    def hidden(self, w: Weights, ids: Tensor, mask: Tensor | None = None, cache: LlamaCache | None = None,
               keep: int = 0) -> Tensor:
        """The last hidden states before the final norm, (E, B, Q − keep, C), from position `keep` on."""
        E, B, Q = ids.shape
        start = cache.length if cache else 0
        if cache:
            cache.packs.expect(start, Q)
        table = w["embed_tokens.weight"]
        x = gather_rows(table, ids)                                                 # (E, B, Q, C)
        if self.padding is not None and torch.is_grad_enabled():  # the library gives that row no gradient
            x = torch.where((ids == self.padding).unsqueeze(-1), x.detach(), x)
        bias = attention_bias(mask, Q, start, self.dtype or table.dtype, table.device)  # (E·B, 1, Q, K), (Q, K) or None
        places = torch.arange(start, start + Q, device=ids.device).unsqueeze(0) if mask is None else (
            positions(mask)[..., start:].reshape(E * B, Q))
        cos, sin = (part.unsqueeze(2) for part in self.angles(x.flatten(0, 1), places))  # (E·B or 1, Q, 1, D)
        half = self.size // 2
        rotation = cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)
        x = x.view(E, B * Q, self.width)
        again = self.checkpointing and cache is None and torch.is_grad_enabled()
        with nullcontext() if self.dtype is None else torch.autocast(x.device.type, self.dtype, cache_enabled=False):
            for layer in range(self.layers):
                dropped = keep if layer == self.layers - 1 else 0
                if again:
                    x = checkpoint(self._layer, w, layer, x, rotation, bias, B, None, dropped, use_reentrant=False,
                                   preserve_rng_state=False)
                else:
                    x = self._layer(w, layer, x, rotation, bias, B, cache, dropped)
        if cache:
            cache.length += Q
        return x.view(E, B, Q - keep, self.width)

    def _layer(self, w: Weights, layer: int, x: Tensor, rotation: tuple[Tensor, Tensor], bias: Tensor | None, B: int,
               cache: LlamaCache | None, dropped: int) -> Tensor:
        """Attention and feed-forward of one layer, (E, B·Q, C) → (E, B·(Q − dropped), C): the first `dropped` tokens
        are looked at and go no further."""
        h, (E, N, C), D = f"layers.{layer}", x.shape, self.size
        Q = N // B
        y = self._norm(x, w[f"{h}.input_layernorm.weight"])
        q, k, v = (part.view(E * B, Q, -1, D) for part in self._products(w, h, QKV, y, cache))
        q, k = (rotate(part, *rotation).transpose(1, 2) for part in (q, k))         # (E·B, heads, Q, D)
        v = v.transpose(1, 2)
        if cache:
            k, v = cache.append(layer, k, v)
        if dropped:
            q, x = q[:, :, dropped:], x.view(E, B, Q, C)[:, :, dropped:].flatten(1, 2)
            bias, Q = None if bias is None else bias[..., dropped:, :], Q - dropped
        if Q == 1:  # the queries of all heads that share a key, as so many tokens
            y = F.scaled_dot_product_attention(q.reshape(E * B, self.kv_heads, -1, D), k, v, bias)
            y = y.reshape(E, B, -1)
        else:
            y = F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=self.kv_heads < self.heads)
            y = y.transpose(1, 2).reshape(E, B * Q, -1)
        x = x + self._products(w, h, ("self_attn.o_proj",), y, cache)[0]
        y = self._norm(x, w[f"{h}.post_attention_layernorm.weight"])
        gate, up = self._products(w, h, GATED, y, cache)
        return x + self._products(w, h, ("mlp.down_proj",), F.silu(gate) * up, cache)[0]

    def head(self, w: Weights, x: Tensor, cache: LlamaCache | None = None) -> Tensor:
        """Logits (E, N, V) of last hidden states (E, N, C)."""
        name = "lm_head" if "lm_head.weight" in w else "embed_tokens"
        return self._products(w, "", (name,), self._norm(x, w["norm.weight"]), cache)[0]

    def __call__(self, w: Weights, ids: Tensor, mask: Tensor | None = None, cache: LlamaCache | None = None,
                 keep: int = 0) -> Tensor:
        """Logits (E, B, Q − keep, V) of tokens ids (E, B, Q), from position `keep` on."""
        x = self.hidden(w, ids, mask, cache, keep)
        return self.head(w, x.flatten(1, 2), cache).view(*x.shape[:-1], -1)

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """x over the root of its mean square, in float32 as the library does, times the gain, (E, N, C)."""
        return gain.unsqueeze(1) * F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)

    def _products(self, w: Weights, h: str, names: tuple[str, ...], x: Tensor,
                  cache: LlamaCache | None) -> list[Tensor]:
        """x (E, N, C) times each of these matrices, plus its bias: (E, N, D) each."""
        names = [f"{h}.{name}".lstrip(".") for name in names]
        matrices = [w[f"{name}.weight"] for name in names]
        if self.dtype is not None or not served(x, matrices[0]):
            results = [torch.bmm(x, matrix.transpose(1, 2)) for matrix in matrices]
        else:
            results = multiply_each(x, matrices, cache.packs if cache else None, names[0])
        biases = [w.get(f"{name}.bias") for name in names]
        return [y if bias is None else y + bias.unsqueeze(1) for y, bias in zip(results, biases)]


class LlamaCache:
    """Preallocated keys and values, one tensor (2, E·B, heads, length, D) a layer, and large matrices as they are
    multiplied by."""

    def __init__(self, layers: list[Tensor], packs: Packs, length: int = 0):
        self.layers, self.packs, self.length = layers, packs, length

    def of(self, rows: Tensor) -> LlamaCache:
        """That of the sequences whose places in the batch are `rows` (E, some)."""
        flat = (rows + offsets(rows, self.layers[0].shape[1] // len(rows))).flatten()
        return LlamaCache([kv[:, flat] for kv in self.layers], self.packs, self.length)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (E·B, heads, Q, D) behind what is there; return all keys and values so far."""
        end = self.length + k.shape[2]
        kv = self.layers[layer]
        kv[0, :, :, self.length:end], kv[1, :, :, self.length:end] = k, v
        return kv[0, :, :, :end], kv[1, :, :, :end]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (rows, Q, heads, D) turned by the angles of its places, `sin` with the sign of each half; all broadcast."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
