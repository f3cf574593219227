"""Rows of tables of which each policy has its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (E, …) of each policy's table (E, N, C), (E, …, C): one flat embedding look-up."""
    E, N, C = table.shape
    return F.embedding(ids if E == 1 else ids + offsets(ids, N), table.reshape(E * N, C))


def offsets(ids: Tensor, N: int) -> Tensor:
    """Where the N rows of each policy begin when those of all lie one after the other, to be added to ids (E, …)."""
    return torch.arange(len(ids), device=ids.device).view(-1, *[1] * (ids.dim() - 1)) * N
