"""A GPT-2 forward for many policies at once, written by hand because it is several times faster.

The weights keep the names and layout of the library's `GPT2LMHeadModel`, with a leading
axis E, so they convert both ways by stacking and indexing. It agrees with the library's
module in float64 (tests/test_forward.py); `forward.VmapForward` serves any other architecture.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel, GPT2Model, PreTrainedModel

from ..averaging.state_dicts import Weights
from .attention import attention_bias, positions
from .gelu import gelu_
from .products import Packs, multiply_each, served
from .rows import gather_rows, offsets

# Weights (E, …) by name, and the folded ones: (gain, shift, matrix, bias) of a layer norm and what follows it.
Prepared = dict[str, Tensor | tuple[Tensor | None, ...]]
FOLD_UP_TO = 256  # width up to which the gains and shifts of layer norms are folded into matrices
SMALL = 1024  # a head's size times tokens up to which attention token by token is no product of matrices on a CPU


class GPT2Forward:
    """Logits of E GPT-2 policies in one pass, by batched products of their weights (E, …); a `Forward`."""

    def __init__(self, model: GPT2LMHeadModel | GPT2Model, dtype: torch.dtype | None = None,
                 checkpointing: bool = False):
        self.model, self.dtype, self.checkpointing = model, dtype, checkpointing
        config = model.config
        self.layers, self.heads, self.width = config.n_layer, config.n_head, config.n_embd
        self.eps = config.layer_norm_epsilon

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether this forward computes what the module does: plain GPT-2 with tied embeddings, or its trunk."""
        config = model.config
        return (
            type(model) in (GPT2LMHeadModel, GPT2Model)
            and config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
            and config.scale_attn_weights
            and not config.scale_attn_by_inverse_layer_idx
            and not config.add_cross_attention
            and config.tie_word_embeddings
        )

    def prepare(self, weights: Weights) -> Prepared:
        """What is computed once for many calls with the same weights.

        LN(x)·g + b followed by W is LN(x)·(g∘W) + bW, which saves two passes over the activations.
        It pays while the matrices are small against them.
        """
        w = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        for layer in range(self.layers):
            h = f"h.{layer}"
            for norm, matrix, name in (("ln_1", "attn.c_attn", "qkv"), ("ln_2", "mlp.c_fc", "fc")):
                w[f"{h}.{name}"] = self._fold(
                    w[f"{h}.{norm}.weight"], w[f"{h}.{norm}.bias"], w[f"{h}.{matrix}.weight"], w[f"{h}.{matrix}.bias"])
                if self.dtype is not None:  # once, not in every call
                    gain, shift, folded, bias = w[f"{h}.{name}"]
                    w[f"{h}.{name}"] = gain, shift, folded.to(self.dtype), bias
            if self.dtype is not None:
                for name in ("attn.c_proj.weight", "mlp.c_proj.weight"):
                    w[f"{h}.{name}"] = w[f"{h}.{name}"].to(self.dtype)
        w["head"] = self._fold(w["ln_f.weight"], w["ln_f.bias"], w["wte.weight"].transpose(1, 2), None)
        return w

    def _fold(self, gain: Tensor, shift: Tensor, matrix: Tensor, bias: Tensor | None):
        """(gain, shift, matrix, bias) of LN followed by a matrix, each (E, 1, ·) or (E, C, D) or None."""
        gain, shift = gain.unsqueeze(1), shift.unsqueeze(1)
        bias = None if bias is None else bias.unsqueeze(1)
        if self.width > FOLD_UP_TO:
            return gain, shift, matrix, bias
        folded = torch.bmm(shift, matrix)
        return None, None, gain.transpose(1, 2) * matrix, folded if bias is None else folded + bias

    def new_cache(self, policies: int, batch: int, length: int, like: Tensor) -> GPT2Cache | ColumnCache:
        """Room for the keys and values of `length` tokens of `batch` sequences of each policy."""
        rows, size = policies * batch * self.heads, self.width // self.heads
        if like.device.type == "cpu" and self.dtype is None and size * length <= SMALL:
            return ColumnCache([like.new_empty(length, 3, size, rows) for _ in range(self.layers)], self.heads)
        return GPT2Cache([like.new_empty(2, rows, length, size, dtype=self.dtype) for _ in range(self.layers)],
                         self.heads, Packs(batch, length))

    def cache_of(self, cache: GPT2Cache | ColumnCache, rows: Tensor) -> GPT2Cache | ColumnCache:
        """The cache of those sequences alone whose places in the batch are `rows` (E, some)."""
        return cache.of(rows)

    def hidden(self, w: Prepared, ids: Tensor, mask: Tensor | None = None, cache: Cache | None = None,
               keep: int = 0) -> Tensor:
        """The last hidden states before the final norm, (E, B, Q − keep, C), from position `keep` on."""
        E, B, Q = ids.shape
        start = cache.length if cache else 0
        if isinstance(cache, GPT2Cache):
            cache.packs.expect(start, Q)
        table = w["wte.weight"]
        bias = attention_bias(mask, Q, start, self.dtype or table.dtype, table.device)  # (E·B, 1, Q, K), (Q, K) or None
        x = gather_rows(table, ids)                                                 # (E, B, Q, C)
        if mask is None:
            x = x + w["wpe.weight"][:, None, start:start + Q]
        else:
            x = x + gather_rows(w["wpe.weight"], positions(mask)[..., start:])
        x = x.view(E, B * Q, self.width)
        again = self.checkpointing and cache is None and torch.is_grad_enabled()
        with nullcontext() if self.dtype is None else torch.autocast(x.device.type, self.dtype, cache_enabled=False):
            for layer in range(self.layers):
                dropped = keep if layer == self.layers - 1 else 0
                if again:
                    x = checkpoint(self._layer, w, layer, x, bias, B, None, dropped, use_reentrant=False,
                                   preserve_rng_state=False)
                else:
                    x = self._layer(w, layer, x, bias, B, cache, dropped)
        if cache:
            cache.length += Q
        return x.view(E, B, Q - keep, self.width)

    def _layer(self, w, layer: int, x: Tensor, bias: Tensor | None, B: int, cache: Cache | None,
               dropped: int) -> Tensor:
        """Attention and feed-forward of one layer, (E, B·Q, C) → (E, B·(Q − dropped), C): the first `dropped` tokens
        are looked at and go no further."""
        h, (E, N, C), H = f"h.{layer}", x.shape, self.heads
        Q = N // B
        qkv = self._norm_linear(w, f"{h}.qkv", x, cache)                            # (E, B·Q, 3C)
        if isinstance(cache, ColumnCache) and Q == 1:
            y = cache.attend(layer, qkv.view(E * B, 3, H, C // H), bias).reshape(E, B, C)
        else:
            q, k, v = qkv.view(E * B, Q, 3, H, C // H).permute(2, 0, 3, 1, 4).reshape(3, E * B * H, Q, C // H)
            if cache:
                k, v = cache.append(layer, k, v)
            if dropped:
                q, bias, Q = q[:, dropped:], bias[..., dropped:, :], Q - dropped
                x = x.view(E, B, -1, C)[:, :, dropped:].reshape(E, B * Q, C)
            y = attend(q, k, v, bias, H)                                            # (E·B·H, Q, C/H)
            y = y.view(E * B, H, Q, C // H).transpose(1, 2).reshape(E, B * Q, C)
        x = self._add_linear(w, f"{h}.attn.c_proj", x, y, cache)
        y = gelu_(self._norm_linear(w, f"{h}.fc", x, cache))                        # (E, B·Q, 4C)
        return self._add_linear(w, f"{h}.mlp.c_proj", x, y, cache)

    def head(self, w: Prepared, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (E, N, V) of last hidden states (E, N, C)."""
        return self._norm_linear(w, "head", x, cache)

    def __call__(self, w: Prepared, ids: Tensor, mask: Tensor | None = None, cache: Cache | None = None,
                 keep: int = 0) -> Tensor:
        """Logits (E, B, Q − keep, V) of tokens ids (E, B, Q), from position `keep` on."""
        x = self.hidden(w, ids, mask, cache, keep)
        return self.head(w, x.flatten(1, 2), cache).view(*x.shape[:-1], -1)

    def _norm_linear(self, w: Prepared, name: str, x: Tensor, cache: Cache | None) -> Tensor:
        """LN and a matrix, (E, N, C) → (E, N, D)."""
        gain, shift, matrix, bias = w[name]
        x = F.layer_norm(x, (self.width,), eps=self.eps)
        if gain is not None:
            x = torch.addcmul(shift, x, gain)
        if (y := self._large(name, x, matrix, cache)) is not None:
            return y if bias is None else y + bias
        return torch.bmm(x, matrix) if bias is None else torch.baddbmm(bias, x, matrix)

    def _add_linear(self, w: Prepared, name: str, x: Tensor, y: Tensor, cache: Cache | None) -> Tensor:
        """x + bias + y·matrix, (E, N, C); in the place of x where no gradient is taken.

        To the last bit the same with and without: where policy and anchor are one, they have one log-probability.
        """
        matrix, bias = w[f"{name}.weight"], w[f"{name}.bias"].unsqueeze(1)
        if self.dtype is not None:
            return x + torch.baddbmm(bias, y, matrix)
        product = self._large(name, y, matrix, cache)
        if torch.is_grad_enabled():
            return torch.baddbmm(x + bias, y, matrix) if product is None else x + bias + product
        x.add_(bias)
        return x.baddbmm_(y, matrix) if product is None else x.add_(product)

    def _large(self, name: str, x: Tensor, matrix: Tensor, cache: Cache | None) -> Tensor | None:
        """The product (E, N, D) with a large matrix by oneDNN; None where it is small or narrow."""
        if self.dtype is not None or not served(x, matrix):
            return None
        packs = cache.packs if isinstance(cache, GPT2Cache) else None
        return multiply_each(x, [matrix.transpose(1, 2)], packs, name)[0]


class GPT2Cache:
    """Preallocated keys and values, one tensor (2, E·B·H, length, C/H) a layer, and large matrices as they are
    multiplied by."""

    def __init__(self, layers: list[Tensor], heads: int, packs: Packs, length: int = 0):
        self.layers, self.heads, self.packs, self.length = layers, heads, packs, length

    def of(self, rows: Tensor) -> GPT2Cache:
        """That of the sequences whose places in the batch are `rows` (E, some)."""
        flat = (rows + offsets(rows, self.layers[0].shape[1] // (len(rows) * self.heads))).flatten()
        layers = [kv.unflatten(1, (-1, self.heads))[:, flat].flatten(1, 2) for kv in self.layers]
        return GPT2Cache(layers, self.heads, self.packs, self.length)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (E·B·H, Q, C/H) behind what is there; return all keys and values so far."""
        end = self.length + k.shape[1]
        kv = self.layers[layer]
        kv[0, :, self.length:end], kv[1, :, self.length:end] = k, v
        return kv[0, :, :end], kv[1, :, :end]


class ColumnCache:
    """Keys and values of small heads: the same number of every head side by side, (length, 3, C/H, E·B·H) a layer.

    One token's attention is then sums over columns, whose additions a CPU does eight at a time; a product of
    matrices as small as one head's costs several times as much, most of it around the arithmetic. The first of the
    three are queries, which the token alone needs.
    """

    def __init__(self, layers: list[Tensor], heads: int, length: int = 0):
        self.layers, self.heads, self.length = layers, heads, length

    def of(self, rows: Tensor) -> ColumnCache:
        """That of the sequences whose places in the batch are `rows` (E, some)."""
        length, three, size, columns = self.layers[0].shape
        flat = (rows + offsets(rows, columns // (len(rows) * self.heads))).flatten()
        layers = []
        for old in self.layers:
            new = old.new_empty(length, three, size, len(flat) * self.heads)
            new[:self.length, 1:] = old[:self.length, 1:].unflatten(-1, (-1, self.heads))[..., flat, :].flatten(-2)
            layers.append(new)
        return ColumnCache(layers, self.heads, self.length)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (E·B·H, Q, C/H) behind what is there; return all keys and values so far."""
        end = self.length + k.shape[1]
        columns = self.layers[layer]
        columns[self.length:end, 1], columns[self.length:end, 2] = k.permute(1, 2, 0), v.permute(1, 2, 0)
        if self.length == 0:
            return k, v
        return columns[:end, 1].permute(2, 0, 1).contiguous(), columns[:end, 2].permute(2, 0, 1).contiguous()

    def attend(self, layer: int, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """Write down one token's qkv (E·B, 3, H, C/H), and let it look at all tokens so far: (E·B, H, C/H).

        `bias` (E·B, 1, 1, K) is added to the scores.
        """
        rows, three, heads, size = qkv.shape
        columns, end = self.layers[layer], self.length + 1
        columns[self.length].view(three, size, rows, heads).copy_(qkv.permute(1, 3, 0, 2))
        q, k, v = columns[self.length, 0], columns[:end, 1], columns[:end, 2]
        scores = (k * q.mul_(size ** -0.5)).sum(1)                                  # (K, E·B·H)
        if bias is not None:
            scores.view(end, rows, heads).add_(bias.view(rows, end).t().unsqueeze(-1))
        y = (v * scores.softmax(0).unsqueeze(1)).sum(0)                             # (C/H, E·B·H)
        return y.view(size, rows, heads).permute(1, 2, 0)


Cache = GPT2Cache | ColumnCache


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Softmax attention of q (rows·H, Q, D) over k and v (rows·H, K, D), with an additive bias: (rows·H, Q, D)."""
    scale = q.shape[-1] ** -0.5
    if bias is None:
        scores = torch.bmm(q * scale, k.transpose(1, 2))
    elif bias.dim() == 2:                                  # causal alone: the product and the mask in one pass
        scores = torch.baddbmm(bias.expand(q.shape[0], -1, -1), q, k.transpose(1, 2), alpha=scale)
    else:
        scores = torch.bmm(q * scale, k.transpose(1, 2)).view(-1, heads, q.shape[1], k.shape[1])
        scores = (scores + bias).view(q.shape[0], q.shape[1], k.shape[1])
    return torch.bmm(scores.softmax(-1), v)
