"""Attention masks and positions of padded batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attention_bias(mask: Tensor | None, queries: int, start: int, dtype: torch.dtype,
                   device: str | torch.device) -> Tensor | None:
    """0 where a query may look and the least number of `dtype` where not; None where it may look everywhere.

    Added to scores of `queries` tokens, the first at place `start`, over all K = start + queries so far: (Q, K), or
    (E·B, 1, Q, K) with a `mask` (E, B, K), 1 for tokens and 0 for padding. The least number instead of −∞
    keeps the rows of padding finite: they look at everything and nobody looks at them.
    """
    if mask is None and queries == 1:
        return None
    keys = start + queries
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(start)
    allowed = causal if mask is None else causal & (mask.reshape(-1, 1, 1, keys) > 0)
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)


def position_limit(model: PreTrainedModel) -> int | None:
    """How many tokens a causal LM has positions for; None where its architecture sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None  # XLNet says −1


def positions(mask: Tensor) -> Tensor:
    """The place of each token in its sequence by a mask (…, K), (…, K), padding not counted; 0 for that on the left."""
    return (mask.long().cumsum(-1) - 1).clamp_(min=0)
